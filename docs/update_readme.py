"""Write the demo's table in README.md from docs/demo/summary.json: no figure in the README is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- demo table: python docs/update_readme.py writes it from docs/demo/summary.json -->\n"
END = "<!-- end of demo table -->\n"


def demo_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, models as rows, and the machine under it."""
    headings = ["model", "parameters", "MFLOP per token", "bits per byte, held-out", "same, Alice", "steps", "training"]
    headings += [f"decode, {engine}" for engine in summary["engines"]]
    lines = [
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    for row in summary["models"]:
        cells = [
            f"`{row['model']}`",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['flops_per_token'] / 1e6:.2f}",
            *(f"{bits:.3f}" for bits in row["bits_per_byte"].values()),
            str(row["steps"]),
            f"{row['train_seconds']:.0f} s",
            *(_milliseconds(row["decode_p50_us"].get(engine)) for engine in summary["engines"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine, row = summary["machine"], summary["models"][0]
    lines += [
        "",
        f"One run, seed {row['seed']}, on {machine['device']} with {machine['threads']} threads. Decode is the median "
        "of one step at batch 1; training includes compiling. Made with `examples/demo.py --engines "
        f"{','.join(summary['engines'])}`; `make demo` leaves `compile` out to be quicker. " + summary.get("note", ""),
    ]
    return "\n".join(lines) + "\n"


def _milliseconds(time_us: float | None) -> str:
    return "" if time_us is None else f"{time_us / 1e3:.2f} ms"


def updated(readme: str, summary: dict[str, Any]) -> str:
    """`readme` with the table of `summary` between its markers."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError("README.md has lost the markers of the demo table")
    return pattern.sub(lambda _: BEGIN + "\n" + demo_table(summary) + "\n" + END, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(), json.loads((ROOT / "docs/demo/summary.json").read_text())))
