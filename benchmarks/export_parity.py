"""Writes benchmarks/results/export_parity.json and docs/export_parity.md: how far every export is from eager.

    pytest tests/export/test_every_family.py -m "" --parity-file runs/export_parity.jsonl
    python -m benchmarks.export_parity runs/export_parity.jsonl
    python -m benchmarks.export_parity [--check]

The tests export every family in every type, with every kind of rows, to every engine that runs here, and put each
parity record into the file; what it has is skipped, so that a run that was stopped goes on. `--check` writes nothing
and ends 1 if the page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.source import ROOT
from benchmarks.harness.table import markdown_table

RESULTS = Path(__file__).parent / "results" / "export_parity.json"
PAGE = ROOT / "docs" / "export_parity.md"
KEYS = ("engine", "family", "dtype", "table")
ENGINES = {"onnx": "ONNX Runtime, standard operators", "aoti": "AOTInductor", "huggingface": "transformers"}
HEAD = """# How far exports are from eager

Written by `python -m benchmarks.export_parity`, which says how the results are made.

Each row is a small model of a family, exported, loaded again and run: prompts of 1, 7 and 128 tokens and 32 decode
steps after them, at batch 1 and 3, one row of a batch padded. *Error* is the largest difference of a logit from eager
float32 of the same rounded weights; *allowed* is four times what eager itself makes, in the type of the export, against
float64. *Mean* are the means of both: below float32 the largest is a leap, of a slot that is kept or not, so the mean
is what binds. *Greedy* is how many greedily decoded tokens are eager's. *Rounding* is how far the rounded weights alone
move a logit.
"""

Record = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "lines", nargs="?", type=Path, help="what the tests wrote; without it the page alone is written"
    )
    parser.add_argument("--check", action="store_true", help="compare the page with the results, and write nothing")
    options = parser.parse_args(arguments)
    if options.lines is not None:
        records = [json.loads(line) for line in options.lines.read_text().splitlines()]
        document = {"benchmark": "export_parity", "exports": sorted(records, key=_key)}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    text = page(json.loads(RESULTS.read_text())["exports"])
    if options.check:
        if PAGE.read_text() != text:
            print(f"{PAGE.name} is not what {RESULTS.name} says: python -m benchmarks.export_parity", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


def page(records: Sequence[Record]) -> str:
    """The page of all records."""
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["versions"]
    commits = sorted({record["commit"][:12] for record in records})
    setting = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "transformers"))
    parts = [HEAD, f"{len(records)} exports; {setting}; commit {', '.join(f'`{each}`' for each in commits)}.\n"]
    for engine, title in ENGINES.items():
        of_engine = [record for record in records if record["engine"] == engine]
        rows = [_row(record) for record in of_engine]
        headings = ("family", "weights", "rows", "error", "allowed", "mean", "allowed", "greedy", "rounding")
        parts.append(f"## {title}\n\n{markdown_table(headings, rows, text_columns=3)}\n")
    return "\n".join(parts)


def _key(record: Record) -> tuple[str, ...]:
    return tuple(str(record[key]) for key in KEYS)


def _row(record: Record) -> list[str]:
    parity = record["parity"]
    errors = (f"{parity[name]:.1e}" for name in ("max_error", "allowed", "mean_error", "allowed_mean"))
    rounding = parity["rounding"]
    return [
        record["family"],
        record["dtype"],
        record["table"] or "as weights",
        *errors,
        f"{parity['greedy_equal']} of {parity['greedy_tokens']}",
        "-" if rounding is None else f"{rounding['max_difference']:.1e}",
    ]


if __name__ == "__main__":
    sys.exit(main())
