"""Everything that needs a GPU, in one command of at most nine minutes: tests, then benchmarks, then a table.

    python -m benchmarks.gpu             (or: make gpu)
    python -m benchmarks.gpu --dry-run   the same script on a CPU: small shapes, kernels in Triton's interpreter

Needs torch, triton and pytest, and nothing else: no installation, no network. (Engines are tested and timed where rich
and safetensors are there too.) Tests run side by side, a long file in
several processes; then benchmark rows, the most important first, each in a process with its own time limit, so that a
crash loses one row. Some rows are prepared beside each other; what is timed has the device to itself. What has not
ended by the deadline is recorded as not run. The results are one JSON file, named after the device, in $OUT or else in
benchmarks/results; it is complete after every row. What tests that failed printed is in a .log file beside it.

Ends 1 if a test failed, a result was refused or a row was lost.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.results import Results
from benchmarks.harness.row import selected
from benchmarks.harness.scheduler import LostError, Plan, probe_machine, run_rows, run_within
from benchmarks.harness.source import ROOT, Source, source, without_paths
from benchmarks.harness.table import goals_table

MINUTES = 9.0
WORKERS = 4
RESERVE_S = 15.0  # for the table, and for what a stopped row takes to end
TESTS_LIMIT_S = 150.0
TEST_FILES = ("tests/ops", "tests/optim")
ENGINE_TESTS = {
    "tests/graph/test_pinned_tables.py": 2,
    "tests/graph/test_side_stream.py": 1,
    "tests/runtime/test_decode_replay.py": 2,
    "tests/runtime/test_profile_device.py": 1,  # all of a GPU's look at one profile
}
"""And how many processes run each."""
NEEDED_BY_ENGINES = ("rich", "safetensors")
"""Beyond torch, Triton and pytest; where one is missing, the tests of engines are left out."""
REHEARSED_TESTS = ("tests/ops/test_permute_addresses.py",)  # CI runs all of them anyway
SHARD_BYTES = 6000  # of a test file: a longer one is run by several processes
NOTHING_SELECTED = 5  # pytest's exit status
RESULTS = Path(__file__).parent / "results"


class Shard(NamedTuple):
    """Part `number`, from 1, of `parts` of a file of tests."""

    file: str
    number: int = 1
    parts: int = 1


def shards_of_tests(wanted: Sequence[str] = (), *, dry_run: bool) -> list[Shard]:
    """One process each, of the files whose path has a part that is `wanted` (all, without); the longest files first."""
    if dry_run:
        return [Shard(file) for file in REHEARSED_TESTS]
    parts = {
        path: math.ceil(path.stat().st_size / SHARD_BYTES)
        for folder in TEST_FILES
        for path in (ROOT / folder).glob("test_*.py")
    }
    if all(importlib.util.find_spec(name) for name in NEEDED_BY_ENGINES):
        parts |= {ROOT / file: number for file, number in ENGINE_TESTS.items()}
    files = [path for path in parts if not wanted or any(part in str(path) for part in wanted)]
    return [
        Shard(str(path.relative_to(ROOT)), number, parts[path])
        for path in sorted(files, key=lambda path: -path.stat().st_size)
        for number in range(1, parts[path] + 1)
    ]


def run_tests(shards: Sequence[Shard], logs: Path, *, limit_s: float, dry_run: bool) -> list[dict[str, Any]]:
    """Counts of each, run side by side; what those that did not pass printed is appended to `logs`."""
    workers = max(1, min(len(shards), os.cpu_count() or 1))
    deadline = time.monotonic() + limit_s
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda shard: _run_shard(shard, logs, deadline, dry_run=dry_run), shards))


def _run_shard(shard: Shard, logs: Path, deadline: float, *, dry_run: bool) -> dict[str, Any]:
    about = {"file": shard.file} | ({"shard": f"{shard.number}/{shard.parts}"} if shard.parts > 1 else {})
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        return about | {"status": "not run"}
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", shard.file]
        command += [f"--shard={shard.number}/{shard.parts}"] if shard.parts > 1 else []
        command += ["-x", "-k", "not inductor"] if dry_run else ["-m", "gpu and not slow"]
        environment = dict(os.environ)
        if not dry_run:
            environment.pop("TRITON_INTERPRET", None)
        began = time.monotonic()
        with log.open("w") as stdout:
            status = run_within(command, left_s, environment, stdout=stdout)
        seconds = round(time.monotonic() - began, 1)
        if report.exists():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
            failed = [
                {
                    "test": f"{case.get('classname')}::{case.get('name')}",
                    "message": without_paths(why.get("message", "")),
                }
                for case in suite.iter("testcase")
                for why in (*case.iter("failure"), *case.iter("error"))
            ]
            found = about | {"status": "failed" if failed else "passed", "seconds": seconds, **counts, "failed": failed}
        elif status == NOTHING_SELECTED:
            return about | {"status": "nothing to run"}
        else:
            how = "stopped at its limit" if status is None else f"exit status {status}"
            found = about | {"status": how, "seconds": seconds}
        if found["status"] != "passed":
            with logs.open("a") as kept:  # at once, since others do so too
                kept.write(log.read_text(errors="replace"))
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU; times are no figures")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it (default: {MINUTES:g})")
    parser.add_argument(
        "--workers", type=int, help=f"rows prepared at a time (default: {WORKERS}; 1 in a rehearsal, on a CPU)"
    )
    parser.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--tests", default="", help="parts of test files' names, with commas between (default: all)")
    parser.add_argument("--rows", default="", help="names, their beginnings or globs, with commas between")
    parser.add_argument("--commit", help="to record where the checkout has no git")
    parser.add_argument("--subjects", default="benchmarks.subjects", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = Plan(
        suite="gpu",
        subjects=options.subjects,
        rehearse=options.dry_run,
        again=True,
        workers=options.workers or (1 if options.dry_run else WORKERS),
        deadline=began + 60 * options.minutes - RESERVE_S,
    )
    found = importlib.import_module(options.subjects).rows("gpu", rehearse=options.dry_run)
    rows = selected(found, [pattern for pattern in options.rows.split(",") if pattern])
    wanted = [part for part in options.tests.split(",") if part]
    shards = [] if options.no_tests else shards_of_tests(wanted, dry_run=options.dry_run)
    if wanted and not shards:
        parser.error(f"--tests must name files of {', '.join((*TEST_FILES, *ENGINE_TESTS))}, got {options.tests!r}")
    try:
        probed = probe_machine(plan)
    except LostError as error:
        print(f"benchmarks.gpu: the device cannot be measured: {error}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or RESULTS) / f"{file_name(probed['device'], dry_run=options.dry_run)}.json"
    logs = out.with_suffix(".log")
    for earlier in (out, logs):  # this run is whole by itself
        earlier.unlink(missing_ok=True)
    results = Results(out, "gpu", [row.name for row in rows])
    if shards:
        limit_s = min(TESTS_LIMIT_S, plan.deadline - time.monotonic())
        results.tests = run_tests(shards, logs, limit_s=limit_s, dry_run=options.dry_run)
        results.write()
    interrupted = False
    try:
        known = Source(options.commit, False) if options.commit else None
        run_rows(rows, results, plan, probed=probed, find_source=lambda: known or source())
    except KeyboardInterrupt:
        interrupted = True
    document = results.document()
    print(goals_table(document))
    print(f"{out}, {time.monotonic() - began:.0f} s")
    print(json.dumps({"benchmark": "gpu", "file": str(out), "ok": is_good(document)}))
    return 130 if interrupted else 0 if is_good(document) else 1


def file_name(device: str, *, dry_run: bool) -> str:
    kind = "rehearsal" if dry_run else "gpu"
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"


def is_good(document: dict[str, Any]) -> bool:
    """Did every test pass and every row that began give a result?"""
    tests = all(test["status"] in ("passed", "nothing to run") for test in document.get("tests", ()))
    rows = all(
        row["status"] == "not run"
        or (row["status"] == "measured" and all(c["status"] in ("measured", "unavailable") for c in row["contenders"]))
        for row in document["rows"]
    )
    return tests and rows


if __name__ == "__main__":
    sys.exit(main())
