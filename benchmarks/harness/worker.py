"""One row in a process of its own: build it, check every contender, time those that are right, write a record.

    python -m benchmarks.harness.worker --suite cpu --row NAME --out FILE

`--out` gets a JSON object. Started by `benchmarks.harness.scheduler`; useful by itself under a profiler or debugger.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import memory
from benchmarks.harness.clock import clock_for
from benchmarks.harness.contender import Case, Contender, UnavailableError, WrongResultError
from benchmarks.harness.goals import evaluate, floor_record
from benchmarks.harness.launches import count_launches
from benchmarks.harness.measure import FULL, QUICK, REHEARSAL, Budget, Clock, measure, summary
from benchmarks.harness.row import Row
from ultramem.machine import Machine, gemm_flops_per_second, measure_machine
from ultramem.ops.implementation import runs_native, runs_triton

GPU = Budget(seconds=0.1, min_rounds=5, max_samples=60)
GPU_ARRAY_BYTES = 2**32  # 80 times the L2 cache of an H100, and long beside the launch
PROBE = "probe"
"""The name of the row that measures the machine."""


def probe(device: torch.device, *, rehearse: bool) -> dict[str, Any]:
    """What the device can do, as a record that rows are compared with."""
    if rehearse:
        machine = measure_machine(device, array_bytes=2**22, gemm_size=128)
    else:
        machine = measure_machine(device, **({"array_bytes": GPU_ARRAY_BYTES} if device.type == "cuda" else {}))
    flops = {"float32": machine.gemm_flops_per_second}
    if device.type == "cuda":
        flops["bfloat16"] = gemm_flops_per_second(device, torch.bfloat16)
    return _machine_record(machine) | {"bytes_per_second": machine.bytes_per_second, "flops_per_second": flops}


def _machine_record(machine: Machine) -> dict[str, Any]:
    record = asdict(machine)
    del record["gemm_flops_per_second"]  # of float32, beside those of other dtypes
    return record


def measure_row(row: Row, case: Case, device: torch.device, probed: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The record of a row: every contender with its times, or with the reason why it has none."""
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, make in case.contenders.items():
        records[name], contender = _make(name, make)
        if contender is not None:
            ready[name] = contender
    if case.measures == "memory":
        for name, contender in ready.items():
            peak = memory.peak_bytes(contender, device)
            records[name] |= {
                "status": "measured",
                "peak_bytes": peak,
                "peak_ratio": round(peak / case.resident_bytes, 4),
            }
    else:
        clock = clock_for(device, graph=row.graph)
        ready = {name: each for name, each in ready.items() if _runs_once(each, clock, records[name])}
        for name, samples_us in measure(ready, clock, budget).items():
            records[name] |= {"status": "measured", "timed": clock.how(ready[name])} | summary(samples_us)
        _count_launches(ready, records, device)
    contenders = list(records.values())
    floor = None
    if case.floor is not None:
        rate = probed["flops_per_second"].get(row.dtype, probed["flops_per_second"]["float32"])
        floor = floor_record(case.floor, bytes_per_second=probed["bytes_per_second"], flops_per_second=rate)
    return {
        "status": "measured",
        "implementation": implementation(device),
        "shape": dict(case.shape),
        "contenders": contenders,
        "floor": floor,
        "goals": [evaluate(goal, contenders, floor, probed) for goal in row.goals],
    }


def implementation(device: torch.device) -> str:
    """Which kernels our ops run on `device`."""
    tensor = torch.empty(0, device=device)
    return "triton" if runs_triton(tensor) else "native" if runs_native(tensor) else "aten"


def _make(name: str, make: Any) -> tuple[dict[str, Any], Contender | None]:
    """Build and check one contender; what goes wrong is its own record's business."""
    record = {"name": name, "role": "peer", "settings": ""}
    try:
        contender: Contender = make()
        record |= {"role": contender.role, "settings": contender.settings}
        contender.check()
    except WrongResultError as error:
        print(f"{name}: {error}; it is not timed", file=sys.stderr)
        return record | {"status": "wrong", "reason": str(error)}, None
    except UnavailableError as error:
        return record | {"status": "unavailable", "reason": str(error)}, None
    except Exception as error:  # whatever a contender raises costs that contender alone
        return record | _failure(error), None
    return record, contender


def _runs_once(contender: Contender, clock: Clock, record: dict[str, Any]) -> bool:
    """Does the clock take it? If not, the record says why."""
    try:
        clock.burst(contender, 1)
    except Exception as error:  # see above
        record |= _failure(error)
        return False
    return True


def _failure(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def _count_launches(ready: dict[str, Contender], records: dict[str, dict[str, Any]], device: torch.device) -> None:
    if device.type == "cuda":
        for name, contender in ready.items():
            records[name]["launches"] = count_launches(contender)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects", default="benchmarks.subjects", help="module with rows(suite) and build(row, device)"
    )
    parser.add_argument("--suite", required=True)
    parser.add_argument("--row", required=True, help=f"a row's name, or {PROBE!r}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probe", type=Path, help="the record of the probe; measured here if not given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, on the CPU, kernels in the interpreter")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if options.suite == "gpu" and not options.rehearse else "cpu")
    if options.row == PROBE:
        options.out.write_text(json.dumps(probe(device, rehearse=options.rehearse)))
        return
    probed = json.loads(options.probe.read_text()) if options.probe else probe(device, rehearse=options.rehearse)
    subjects = importlib.import_module(options.subjects)
    (row,) = (row for row in subjects.rows(options.suite, rehearse=options.rehearse) if row.name == options.row)
    kind = "rehearse" if options.rehearse else "quick" if options.quick else device.type
    budget = {"rehearse": REHEARSAL, "quick": QUICK, "cuda": GPU, "cpu": FULL}[kind]
    with subjects.setting(rehearse=options.rehearse):
        record = measure_row(row, subjects.build(row, device), device, probed, budget)
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
