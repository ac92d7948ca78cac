"""Runs rows one after the other, each in a process with its own time limit, so that a crash loses one row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Record, Results
from benchmarks.harness.row import Row, Suite
from benchmarks.harness.source import ROOT, Source, source

PROBE_LIMIT_S = 240.0
STDERR_TAIL = 600  # characters kept of what a lost row said last


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How the rows of a suite are run."""

    suite: Suite
    subjects: str = "benchmarks.subjects"
    quick: bool = False
    rehearse: bool = False
    again: bool = False
    deadline: float = float("inf")
    """By `time.monotonic`; rows that have not begun by then are recorded as not run."""


class LostError(RuntimeError):
    """A process gave no result: it crashed, or its time was up."""


def run_rows(
    rows: Sequence[Row],
    results: Results,
    plan: Plan,
    *,
    probed: Record | None = None,
    find_source: Callable[[], Source] = source,
) -> None:
    """Measure what `results` does not have yet; each record is in the file before the next row begins.

    The machine is measured before the first row, unless `probed` says what it can do.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        probe_file = Path(folder) / "probe.json"
        for number, row in enumerate(rows, start=1):
            now = find_source()
            if not plan.again and results.is_done(row.name, now, _setting(plan)):
                _say(f"[{number}/{len(rows)}] {row.name}: measured before")
                continue
            if time.monotonic() >= plan.deadline:
                results.add(_record(row, plan, now, probed) | {"status": "not run", "reason": "the time was up"})
                continue
            if probed is None:
                probed = probe_machine(plan)
            probe_file.write_text(json.dumps(probed))
            began = time.monotonic()
            record = _record(row, plan, now, probed)
            try:
                limit_s = min(row.limit_s, plan.deadline - began)
                record |= _child(["--row", row.name, "--probe", str(probe_file)], plan, limit_s)
            except LostError as error:
                record |= {"status": "lost", "reason": str(error)}
            record["seconds"] = round(time.monotonic() - began, 1)
            results.add(record)
            _say(f"[{number}/{len(rows)}] {row.name}: {outcome(record)} ({record['seconds']:.0f} s)")


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
    probed = _child(["--row", "probe"], plan, PROBE_LIMIT_S)
    _say(f"{probed['device']}, {probed['threads']} threads, {probed['bytes_per_second'] / 1e9:.1f} GB/s")
    return probed


def _setting(plan: Plan) -> Record:
    return {"quick": plan.quick, "rehearsal": plan.rehearse}


def _record(row: Row, plan: Plan, now: Source, probed: Record | None) -> Record:
    names = ("subject", "variant", "size", "tokens", "indices", "dtype")
    fields = {name: value for name, value in asdict(row).items() if name in names}
    return {"row": row.name} | fields | now._asdict() | _setting(plan) | {"machine": probed}


def _child(arguments: Sequence[str], plan: Plan, limit_s: float) -> Record:
    """What a worker wrote.

    Raises:
        LostError: it wrote nothing in time.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        out = Path(folder) / "record.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.harness.worker",
            "--suite",
            plan.suite,
            "--subjects",
            plan.subjects,
        ]
        command += ["--out", str(out), *arguments, *(["--quick"] if plan.quick else [])]
        command += ["--rehearse"] if plan.rehearse else []
        errors = Path(folder) / "stderr"
        with errors.open("w") as stderr:
            status = run_within(command, limit_s, _environment(plan), stdout=stderr)
        if out.exists() and status == 0:
            record: Record = json.loads(out.read_text())
            return record
        tail = errors.read_text(errors="replace")[-STDERR_TAIL:].strip()
        how = f"stopped after {limit_s:.0f} s" if status is None else _describe(status)
        raise LostError(f"{tail}\n{how}".strip())


def run_within(command: Sequence[str], limit_s: float, environment: dict[str, str], *, stdout: Any) -> int | None:
    """Exit status of a process group, or None if it was killed at its limit. Killed too if this process is stopped."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
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
    return environment


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
