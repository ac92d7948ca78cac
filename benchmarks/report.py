"""Writes docs/benchmarks.md from the result files in benchmarks/results.

    python -m benchmarks.report [--check]

`--check` writes nothing and ends 1 if the page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.source import ROOT
from benchmarks.harness.table import SYMBOLS, markdown_table, value_text
from benchmarks.reasons import REASONS

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

TITLES = {
    "lookup": "Lookup, forward",
    "backward": "Lookup, backward with values",
    "quantised": "Lookup in int8 and int4 rows",
    "onnx_lookup": "Lookup node in ONNX Runtime",
    "select": "Selection",
    "update": "Update of the table",
    "layer": "A whole layer, forward",
    "model_step": "A decode step of whole models",
    "train_step": "A training step",
    "engines": "A decode step on every engine",
}
HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results`; `python -m benchmarks.run` says how they are made.

Every contender's result was compared with float64 before it was timed. Times are medians in microseconds, quartiles in
brackets, of calls in turn with the others, each on inputs of its own. The floor is what must be moved and computed over
the bandwidth and the rate of matrix products that were measured in the same run. *Ours* is in bold; in italics is what
computes something else and is no rival. Speedups in goals are over the best rival, even where part of a rival's work
was left out of its time.
"""

Record = Mapping[str, Any]


def page(documents: Mapping[str, Record]) -> str:
    parts = [HEAD]
    if not documents:
        parts.append("No results are committed yet.\n")
    for name, document in documents.items():
        parts += [f"## {name}\n", *_document(document)]
    return "\n".join(parts)


def _document(document: Record) -> list[str]:
    rows = document["rows"]
    measured = [row for row in rows if row["status"] == "measured"]
    parts = [_setting(measured), _goals(measured)]
    for subject, title in TITLES.items():
        of_subject = [row for row in measured if row["subject"] == subject]
        if of_subject:
            parts += [f"### {title}\n", *(_subject(group) for group in _by_contenders(of_subject))]
    lost = [row for row in rows if row["status"] != "measured"]
    if lost:
        lines = [f"- `{row['row']}`: {row['status']}, {(row['reason'].splitlines() or [''])[-1]}" for row in lost]
        parts.append("Rows without a result:\n\n" + "\n".join(lines) + "\n")
    parts.append(_notes(measured))
    return [part for part in parts if part]


def _setting(rows: Sequence[Record]) -> str:
    """Each machine and commit that rows were measured on, said once."""
    said = dict.fromkeys(map(_setting_of, rows))
    return "\n".join(said) + "\n"


def _setting_of(row: Record) -> str:
    machine = row["machine"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "triton") if name in machine["versions"]
    )
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in machine["flops_per_second"].items())
    return (
        f"{machine['device']}, {machine['threads']} threads; Python {machine['python']}, {versions}; "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s, {rates}; commit `{row['commit'][:12]}`"
        f"{' with uncommitted changes' if row['dirty'] else ''}; our ops run {row['implementation']} kernels."
    )


def _goals(rows: Sequence[Record]) -> str:
    cells = [
        [f"`{row['row']}`", goal["goal"], value_text(goal), SYMBOLS[goal["reached"]]]
        for row in rows
        for goal in row["goals"]
    ]
    missed = dict.fromkeys(goal["goal"] for row in rows for goal in row["goals"] if goal["reached"] is False)
    reasons = [f"- {text}: {REASONS[text]}" for text in missed]
    why = ["Why goals are missed:\n\n" + "\n".join(reasons) + "\n"] if reasons else []
    table = markdown_table(["row", "goal", "value", ""], cells, text_columns=2) + "\n"
    return "\n".join([table, *why]) if cells else ""


def _by_contenders(rows: Sequence[Record]) -> list[list[Record]]:
    """Rows that compare the same contenders share a table."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(c["name"] for c in row["contenders"]), []).append(row)
    return list(groups.values())


def _subject(rows: Sequence[Record]) -> str:
    contenders = rows[0]["contenders"]
    header = ["", "floor", *(_styled(c, c["name"]) for c in contenders)]
    cells = []
    for row in rows:
        name = row["row"].partition("/")[2]
        floor = f"{row['floor']['us']:,.1f}" if row["floor"] else ""
        cells.append([f"`{name}`", floor, *map(_cell, row["contenders"])])
    return markdown_table(header, cells) + "\n"


def _styled(contender: Record, text: str) -> str:
    return {"ours": f"**{text}**", "yardstick": f"*{text}*"}.get(contender["role"], text)


def _cell(contender: Record) -> str:
    if "peak_bytes" in contender:
        return f"{contender['peak_bytes'] / 1e6:,.0f} MB"
    if contender["status"] != "measured":
        return contender["status"]
    low, high = contender["quartiles_us"]
    launches = f", {contender['launches']} launches" if "launches" in contender else ""
    return f"{contender['median_us']:,.1f} ({low:,.1f}-{high:,.1f}){launches}"


def _notes(rows: Sequence[Record]) -> str:
    """How each contender was run, and why one was not."""
    said: dict[str, None] = {}
    for row in rows:
        for contender in row["contenders"]:
            if contender["settings"]:
                said[f"- {TITLES[row['subject']].lower()}, {contender['name']}: {contender['settings']}"] = None
            if contender["status"] != "measured":
                reason = contender["reason"].splitlines()[0]
                said[f"- `{row['row']}`, {contender['name']}: {contender['status']}, {reason}"] = None
    return "How each was run:\n\n" + "\n".join(said) + "\n" if said else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    documents = {}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        if document.get("benchmark") == "ultramem":
            documents[path.stem] = document
    text = page(documents)
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE} is not what the results say: run python -m benchmarks.report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
