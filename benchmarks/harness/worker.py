"""One row in a process of its own: build it, check every contender, time those that are right, write a record.

    python -m benchmarks.harness.worker --suite cpu --row NAME --out FILE

`--out` gets a JSON object. Started by `benchmarks.harness.scheduler`; useful by itself under a profiler or debugger.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from benchmarks.harness.source import without_paths
from benchmarks.harness.turns import Turns
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
    record = _machine_record(machine) | {"bytes_per_second": machine.bytes_per_second, "flops_per_second": flops}
    if device.type == "cuda":
        record["device_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return record


def _machine_record(machine: Machine) -> dict[str, Any]:
    record = asdict(machine)
    del record["gemm_flops_per_second"]  # of float32, beside those of other dtypes
    return record


def measure_row(
    row: Row,
    build: Callable[[Row, torch.device], Case],
    device: torch.device,
    probed: dict[str, Any],
    budget: Budget,
    turns: Turns,
) -> dict[str, Any]:
    """The record of a row: every contender with its times, or with the reason why it has none.

    `spent_s` says where the seconds went: `build`, `prepare` (make, check, compile and first call; `prepare_s` of each
    contender), `wait` for turns, which is part of no other, `timed`, `launches`. `timed_at_s` are the beginning and
    the end of what was timed, by `time.monotonic`; `device_gb` is what the process held at most on a GPU.
    """
    spent = Spent(turns)
    with spent.on("build"), turns.shared():
        case = build(row, device)
        clock = clock_for(device, graph=row.graph, wall=row.wall) if case.measures == "time" else None
    records: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, make in case.contenders.items():
        before = spent.seconds["prepare"]
        with spent.on("prepare"), turns.shared():
            records[name], contender = _make(name, make)
            if contender is not None and (clock is None or _runs_once(contender, clock, records[name])):
                ready[name] = contender
            _return_unused(device)
        records[name]["prepare_s"] = round(spent.seconds["prepare"] - before, 2)
    timed_at_s = None
    if clock is not None:
        with turns.alone():
            began = time.monotonic()
            with spent.on("timed"):
                samples = measure(ready, clock, budget)
            timed_at_s = [round(began, 3), round(time.monotonic(), 3)]
        for name, samples_us in samples.items():
            records[name] |= {"status": "measured", "timed": clock.how(ready[name])} | summary(samples_us)
        if device.type == "cuda":
            with spent.on("launches"):
                for name in _worth_counting(records):
                    records[name]["launches"] = count_launches(ready[name], turns)
    else:
        for name, contender in ready.items():
            with spent.on("timed"), turns.shared():
                peak = memory.peak_bytes(contender, device)
            records[name] |= {
                "status": "measured",
                "peak_bytes": peak,
                "peak_ratio": round(peak / case.resident_bytes, 4),
            }
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
        "spent_s": spent.record(),
        "timed_at_s": timed_at_s,
        "device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if device.type == "cuda" else None,
    }


class Spent:
    """Seconds by what they were spent on; those of waiting for a turn are kept apart."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        began, waited_s = time.monotonic(), self._turns.waited_s
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - began - (self._turns.waited_s - waited_s)

    def record(self) -> dict[str, float]:
        whole = {**self.seconds, "wait": self._turns.waited_s}
        return {what: round(seconds, 2) for what, seconds in whole.items()}


def _return_unused(device: torch.device) -> None:
    """What a check took is free for other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _worth_counting(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ours and the quickest peer: the profiler takes time for each."""
    measured = {name: record for name, record in records.items() if record["status"] == "measured"}
    peers = [name for name in measured if measured[name]["role"] == "peer"]
    quickest = sorted(peers, key=lambda name: measured[name]["median_us"])[:1]
    return [name for name in measured if measured[name]["role"] == "ours"] + quickest


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
    return {"status": "failed", "reason": without_paths(f"{type(error).__name__}: {error}")[:500]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects", default="benchmarks.subjects", help="module with rows(suite) and build(row, device)"
    )
    parser.add_argument("--suite", required=True)
    parser.add_argument("--row", required=True, help=f"a row's name, or {PROBE!r}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--probe", type=Path, help="the record of the probe; measured here if not given")
    parser.add_argument("--turns", type=Path, help="folder of the files by which processes take turns on the device")
    parser.add_argument("--waits", type=Path, help="gets the times at which waiting for a turn begins and ends")
    parser.add_argument("--began", type=float, default=time.monotonic(), help="when the process was started")
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
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    turns = Turns(options.turns, waits=options.waits, synchronize=synchronize)
    if options.turns:
        turns.let_others_while_compiling()
    start_s = time.monotonic() - options.began
    with subjects.setting(rehearse=options.rehearse):
        record = measure_row(row, subjects.build, device, probed, budget, turns)
    record["spent_s"] = {"start": round(start_s, 2)} | record["spent_s"]
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
