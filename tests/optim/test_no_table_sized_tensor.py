"""No tensor of the table's size is made in a step: by its every allocation, and by the peak memory of a process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from table_training import Training, build, loss_of, value_tables
from torch.profiler import ProfilerActivity, profile

SPARSE = ["lazy_adamw", "row_adagrad"]


@pytest.fixture(autouse=True)
def _no_fill() -> Any:
    """As in training: without it every uninitialised tensor is filled, which the trace would show as well."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def largest_allocation(training: Training, steps: int = 2) -> int:
    """Bytes of the largest block that the allocator gave out in these steps, inside opaque ops too."""
    training.run(2)  # lazily made state, and compilation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        training.run(steps)
    events = trace.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def table_bytes(training: Training) -> int:
    return training.tables()[0].nbytes


def test_the_trace_shows_a_dense_gradient() -> None:
    training = Training(build(knum=128), tables="adamw")
    assert largest_allocation(training) >= table_bytes(training)


@pytest.mark.parametrize("tables", SPARSE)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_allocation_of_a_step_is_near_the_table(tables: str, autocast: bool, dtype: torch.dtype) -> None:
    model = build(knum=128, experts=True)
    for table in value_tables(model):
        table.to(dtype)
    loss = loss_of(model)

    def step_loss(*batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            return loss(*batch)

    training = Training(model, loss=step_loss, tables=tables, parts=2)
    assert largest_allocation(training) < table_bytes(training) / 4


@pytest.mark.slow
def test_no_allocation_of_a_compiled_step_is_near_the_table() -> None:
    model = build(knum=128)
    torch._dynamo.reset()
    training = Training(model, loss=torch.compile(loss_of(model), fullgraph=True), tables="lazy_adamw")
    assert largest_allocation(training) < table_bytes(training) / 4


PROGRAM = """
import json, sys
import torch
from table_training import Training, build, loss_of, value_tables

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False
tables, compiled = sys.argv[1], sys.argv[2] == "compiled"
model = build(knum=1024)
loss = torch.compile(loss_of(model), fullgraph=True) if compiled else loss_of(model)
training = Training(model, loss=loss, tables=tables)
training.run(2)
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
training.run(3)
print(json.dumps({"growth": (kilobytes("VmHWM") - before) * 1024, "table": training.tables()[0].nbytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory of a process")
@pytest.mark.parametrize(("tables", "how"), [("adamw", "eager"), ("lazy_adamw", "compiled"), ("row_adagrad", "eager")])
def test_peak_memory_of_a_process(tables: str, how: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tables, how],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    if tables == "adamw":  # the probe sees two dense gradients
        assert measured["growth"] > measured["table"]
    else:
        assert measured["growth"] < measured["table"] / 8
