"""Runs rows, each in a process with its own time limit, so that a crash loses one row.

Several processes may prepare rows at a time; what is timed has the device to itself (`benchmarks.harness.turns`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Record, Results
from benchmarks.harness.row import Row, Suite
from benchmarks.harness.source import ROOT, Source, source, without_paths
from benchmarks.harness.turns import waited_seconds

PROBE_LIMIT_S = 240.0
STDERR_TAIL = 600  # characters kept of what a lost row said last
POLL_S = 0.05
DEVICE_SHARE = 0.93  # of its memory that rows may claim together; the rest is the driver's and the allocator's


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the rows of a suite are run."""

    suite: Suite
    subjects: str = "benchmarks.subjects"
    quick: bool = False
    rehearse: bool = False
    again: bool = False
    deadline: float = float("inf")
    """By `time.monotonic`; rows that have not ended by then are recorded as not run."""
    workers: int = 1
    """Rows that are prepared or timed at a time. On a CPU, one: whatever else runs there disturbs what is timed."""


class LostError(RuntimeError):
    """A process gave no result: it crashed, or its time was up."""


@dataclass(kw_only=True, slots=True)
class _Running:
    """A row under way, with what its record has so far."""

    number: int
    row: Row
    record: Record
    worker: Worker


def run_rows(
    rows: Sequence[Row],
    results: Results,
    plan: Plan,
    *,
    probed: Record | None = None,
    find_source: Callable[[], Source] = source,
) -> None:
    """Measure what `results` does not have yet, in order; each record is in the file as soon as its row ends.

    The machine is measured before the first row, unless `probed` says what it can do.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        run = _Run(rows, results, plan, probed, find_source, Path(folder))
        try:
            while run.waiting or run.running:
                run.start()
                run.collect()
                time.sleep(POLL_S if run.running else 0)
        finally:
            run.stop()


class _Run:
    """Rows that wait, and those under way."""

    def __init__(
        self,
        rows: Sequence[Row],
        results: Results,
        plan: Plan,
        probed: Record | None,
        find_source: Callable[[], Source],
        folder: Path,
    ) -> None:
        self.waiting = deque(enumerate(rows, start=1))
        self.running: list[_Running] = []
        self._count = len(rows)
        self._results, self._plan, self._probed, self._find_source = results, plan, probed, find_source
        self._folder = folder

    def start(self) -> None:
        """Rows in order, until there is no worker or no memory for the next."""
        while self.waiting and len(self.running) < self._plan.workers and self._start_or_pass(*self.waiting[0]):
            self.waiting.popleft()

    def _start_or_pass(self, number: int, row: Row) -> bool:
        """Is the row done with, or under way?"""
        plan, now = self._plan, self._find_source()
        if not plan.again and self._results.is_done(row.name, now, _setting(plan)):
            _say(f"[{number}/{self._count}] {row.name}: measured before")
            return True
        if time.monotonic() >= plan.deadline:
            record = _record(row, plan, now, self._probed)
            self._results.add(record | {"status": "not run", "reason": "the time was up"})
            return True
        if self._probed is None:
            self._probed = probe_machine(plan)
        if not _has_room(row, [each.row for each in self.running], self._probed):
            return False
        probe_file = self._folder / "probe.json"
        if not probe_file.exists():
            probe_file.write_text(json.dumps(self._probed))
        arguments = ["--row", row.name, "--probe", str(probe_file)]
        arguments += ["--turns", str(self._folder)] if plan.workers > 1 else []
        worker = Worker(arguments, plan, row.limit_s)
        record = _record(row, plan, now, self._probed)
        self.running.append(_Running(number=number, row=row, record=record, worker=worker))
        return True

    def collect(self) -> None:
        """Records of rows that have ended, or that the deadline ends."""
        for each in list(self.running):
            try:
                found = each.worker.poll()
            except LostError as error:
                found = {"status": "lost", "reason": str(error)}
            if found is None and time.monotonic() >= self._plan.deadline:
                found = {
                    "status": "not run",
                    "reason": f"the time was up after {each.worker.own_seconds():.0f} s of it",
                }
            if found is not None:
                self._end(each, found)

    def _end(self, each: _Running, found: Record) -> None:
        record = each.record | found | {"seconds": round(each.worker.own_seconds(), 1)}
        each.worker.stop()
        self.running.remove(each)
        self._results.add(record)
        _say(f"[{each.number}/{self._count}] {each.row.name}: {outcome(record)} ({record['seconds']:.0f} s)")

    def stop(self) -> None:
        for each in self.running:
            each.worker.stop()


def _has_room(row: Row, others: Sequence[Row], probed: Record) -> bool:
    """Does the device's memory take the row beside others? Alone, any row may try."""
    room_gb = DEVICE_SHARE * probed.get("device_gb", float("inf"))
    return not others or row.device_gb + sum(other.device_gb for other in others) <= room_gb


def outcome(record: Record) -> str:
    """A record in a few words."""
    if record["status"] != "measured":
        return f"{record['status']}: {record['reason'].splitlines()[-1] if record['reason'] else ''}"
    ours = next((c for c in record["contenders"] if c["role"] == "ours"), None)
    wrong = [c["name"] for c in record["contenders"] if c["status"] in ("wrong", "failed")]
    parts = [f"{c['median_us']:.1f} us" for c in [ours] if c and "median_us" in c]
    parts += [
        f"{goal['quantity']} {goal['value']:g} ({'reached' if goal['reached'] else 'missed'}: {goal['bound']:g})"
        for goal in record["goals"]
        if goal["value"] is not None
    ]
    return ", ".join(parts + [f"{name} REFUSED" for name in wrong]) or "measured"


def probe_machine(plan: Plan) -> Record:
    """What the device can do, measured in a process of its own.

    Raises:
        LostError: it cannot be measured.
    """
    worker = Worker(["--row", "probe"], plan, PROBE_LIMIT_S)
    try:
        while (probed := worker.poll()) is None:
            time.sleep(POLL_S)
    finally:
        worker.stop()
    _say(f"{probed['device']}, {probed['threads']} threads, {probed['bytes_per_second'] / 1e9:.1f} GB/s")
    return probed


def _setting(plan: Plan) -> Record:
    return {"quick": plan.quick, "rehearsal": plan.rehearse}


def _record(row: Row, plan: Plan, now: Source, probed: Record | None) -> Record:
    names = ("subject", "variant", "size", "tokens", "indices", "dtype")
    fields = {name: value for name, value in asdict(row).items() if name in names}
    return {"row": row.name} | fields | now._asdict() | _setting(plan) | {"machine": probed}


class Worker:
    """A process that measures one row or the machine, and what has become of it."""

    def __init__(self, arguments: Sequence[str], plan: Plan, limit_s: float) -> None:
        self._limit_s = limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="benchmarks-")
        folder = Path(self._folder.name)
        self._out, self._errors, self._waits = (folder / name for name in ("record.json", "stderr", "waits"))
        self._began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.harness.worker", "--suite", plan.suite]
        command += ["--subjects", plan.subjects, "--out", str(self._out), "--waits", str(self._waits)]
        command += ["--began", str(self._began), *arguments]
        command += (["--quick"] if plan.quick else []) + (["--rehearse"] if plan.rehearse else [])
        with self._errors.open("w") as stderr:
            self._process = _start(command, _environment(plan), stdout=stderr)

    def own_seconds(self) -> float:
        """Since it was started, but for the time in which it waited for its turn on the device."""
        now = time.monotonic()
        return now - self._began - waited_seconds(self._waits, now)

    def poll(self) -> Record | None:
        """What it wrote, or None while it runs.

        Raises:
            LostError: it ended without, or its time is up.
        """
        status = self._process.poll()
        if status is None:
            if self.own_seconds() < self._limit_s:
                return None
            how = f"stopped after {self._limit_s:.0f} s"
        elif self._out.exists() and status == 0:
            record: Record = json.loads(self._out.read_text())
            return record
        else:
            how = _describe(status)
        tail = without_paths(self._errors.read_text(errors="replace"))[-STDERR_TAIL:].strip()
        raise LostError(f"{tail}\n{how}".strip())

    def stop(self) -> None:
        """Whatever it is doing."""
        _kill(self._process)
        self._folder.cleanup()


def run_within(command: Sequence[str], limit_s: float, environment: dict[str, str], *, stdout: Any) -> int | None:
    """Exit status of a process group, or None if it was killed at its limit. Killed too if this process is stopped."""
    process = _start(command, environment, stdout=stdout)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)


def _start(command: Sequence[str], environment: dict[str, str], *, stdout: Any) -> subprocess.Popen[bytes]:
    """In a process group of its own."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _environment(plan: Plan) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    if plan.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment.pop("TRITON_INTERPRET", None)
    if plan.workers > 1:
        share = str(max(1, (os.cpu_count() or 1) // plan.workers))
        for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            environment.setdefault(threads, share)
    return environment


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
