from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ultramem import ops

PROGRAM = """
import torch
from ultramem.ops._registration import traceable_op

@traceable_op("ultramem_test::scale")
def scale(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR

print(torch.compile(lambda x: torch.ops.ultramem_test.scale(x) + 1, fullgraph=True)(torch.ones(3)).tolist())
"""


@pytest.mark.slow
def test_an_edited_op_is_not_served_from_the_graph_cache(tmp_path: Path) -> None:
    pytest.importorskip("triton")  # without it torch hashes no kernels
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    program = tmp_path / "program.py"
    for factor, expected in ((2.0, "[3.0, 3.0, 3.0]"), (5.0, "[6.0, 6.0, 6.0]")):
        program.write_text(PROGRAM.replace("FACTOR", str(factor)))
        command = [sys.executable, program]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == expected


def make_lookup(*, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.randn(5, 8, requires_grad=requires_grad)
    return values, torch.tensor([[0, 3], [4, 4]]), torch.rand(2, 2, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each call of lookup_reduce went: "body", or "op" through the dispatcher."""
    went: list[str] = []
    op = sys.modules["ultramem.ops.lookup_reduce"]._lookup_reduce
    for name, way in (("body", op.body), ("overload", op.overload)):
        monkeypatch.setattr(op, name, lambda *args, name=name, way=way: went.append(name) or way(*args))
    return went


def test_an_op_that_nobody_watches_is_its_body(calls: list[str]) -> None:
    direct = ops.lookup_reduce(*make_lookup())
    with torch.no_grad():
        ops.lookup_reduce(*make_lookup(requires_grad=True))
    assert calls == ["body", "body"]
    assert direct.grad_fn is None


def test_a_gradient_goes_through_the_op(calls: list[str]) -> None:
    values, *rest = make_lookup(requires_grad=True)
    ops.lookup_reduce(values, *rest).sum().backward()
    assert calls == ["overload"]
    assert values.grad is not None


def test_a_trace_sees_the_op(calls: list[str]) -> None:
    graph = make_fx(lambda *inputs: ops.lookup_reduce(*inputs), tracing_mode="fake")(*make_lookup()).graph
    assert calls == ["overload"]
    assert any(node.target is torch.ops.ultramem.lookup_reduce.default for node in graph.nodes)


def test_a_profile_sees_the_op(calls: list[str]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ops.lookup_reduce(*make_lookup())
    assert calls == ["overload"]
    assert "ultramem::lookup_reduce" in {event.name for event in profiler.events()}


def test_a_function_transform_sees_the_op(calls: list[str]) -> None:
    values, indices, scores = make_lookup()
    with pytest.raises(RuntimeError, match="functorch"):  # of PyTorch, for every op of torch.library
        torch.func.grad(lambda v: ops.lookup_reduce(v, indices, scores).sum())(values)
    assert calls == ["overload"]
