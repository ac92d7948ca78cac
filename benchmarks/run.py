"""Benchmarks against what a user would pick instead, side by side, each at its best settings.

    python -m benchmarks.run --suite cpu [--rows lookup/151m,select] [--quick] [--out FILE]
    python -m benchmarks.run --suite cpu --publish

Every contender is compared with the float64 oracle first; one that is wrong is not timed and the record says so. The
others are timed in turn, inputs drawn anew for each call. A row runs in a process of its own with a time limit; its
record is in the results file before the next begins. Rows that the file already has of the same commit are skipped, so
an interrupted run goes on where it was. Progress is on stderr; the last line of stdout is one JSON object.

Ends 1 if a result was refused or a row was lost, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.results import Results
from benchmarks.harness.row import SUITES, selected
from benchmarks.harness.scheduler import Plan, run_rows
from benchmarks.harness.source import ROOT, source

PUBLISHED = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--rows", default="", help="names, their beginnings or globs, with commas between")
    parser.add_argument("--out", type=Path, help="default: runs/benchmarks/SUITE.json (SUITE-quick.json)")
    parser.add_argument(
        "--publish", action="store_true", help="write benchmarks/results/SUITE.json; refuses a dirty tree"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, few samples")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has of this commit, too")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--subjects", default="benchmarks.subjects", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        rows = selected(importlib.import_module(options.subjects).rows(options.suite), _patterns(options.rows))
        if options.publish and (options.quick or options.out):
            raise ValueError("publish takes neither --quick nor --out")
        if options.publish and source().dirty:
            raise ValueError("publish needs a clean tree: the result would name a commit that did not make it")
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    if options.quick and not options.rows:
        rows = [row for row in rows if row.quick]
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    name = f"{options.suite}-quick.json" if options.quick else f"{options.suite}.json"
    out = options.out or (PUBLISHED if options.publish else SCRATCH) / name
    results = Results(out, options.suite, [row.name for row in rows])
    plan = Plan(suite=options.suite, subjects=options.subjects, quick=options.quick, again=options.again)
    try:
        run_rows(rows, results, plan)
    except KeyboardInterrupt:
        print(f"benchmarks.run: interrupted; {out} has the rows so far", file=sys.stderr)
        return 130
    records = [results.rows[row.name] for row in rows]
    print(json.dumps(_last_line(out, records)))
    return 1 if any(map(_is_bad, records)) else 0


def _patterns(rows: str) -> list[str]:
    return [pattern.strip() for pattern in rows.split(",") if pattern.strip()]


def _is_bad(record: dict) -> bool:
    refused = [c for c in record.get("contenders", ()) if c["status"] in ("wrong", "failed")]
    return record["status"] != "measured" or bool(refused)


def _last_line(out: Path, records: Sequence[dict]) -> dict:
    goals = [goal for record in records for goal in record.get("goals", ())]
    return {
        "benchmark": "ultramem",
        "file": str(out),
        "rows": len(records),
        "measured": sum(record["status"] == "measured" for record in records),
        "bad": [record["row"] for record in records if _is_bad(record)],
        "goals": len(goals),
        "reached": sum(goal["reached"] is True for goal in goals),
    }


if __name__ == "__main__":
    sys.exit(main())
