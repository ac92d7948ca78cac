"""Write the README's tables from committed results: no figure there is typed by hand.

The demo's comes from docs/demo/summary.json, that of a GPU from its file in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- demo table: python docs/update_readme.py writes it from docs/demo/summary.json -->\n"
END = "<!-- end of demo table -->\n"
GPU_RESULTS = ROOT / "benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json"
GPU_BEGIN = "<!-- GPU table: python docs/update_readme.py writes it from benchmarks/results -->\n"
GPU_END = "<!-- end of GPU table -->\n"
GPU_ROWS = {
    "lookup, 1 token": "lookup/1.6b/T=1/uniform/bfloat16",
    "lookup, 64 tokens": "lookup/1.6b/T=64/uniform/bfloat16",
    "lookup, 4096 tokens": "lookup/1.6b/T=4096/uniform/bfloat16",
    "its backward with values, 4096 tokens": "backward/1.6b/T=4096/uniform/bfloat16",
    "selection, 4096 tokens": "select/1.6b/T=4096/bfloat16",
    "the whole layer, 64 tokens": "layer/1.6b/T=64/bfloat16",
}


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
        f"of one step at batch 1; training includes compiling. Made by {_command(summary['engines'])}."
        + (f" {summary['note']}" if "note" in summary else ""),
    ]
    return "\n".join(lines) + "\n"


def _command(engines: list[str]) -> str:
    if "compile" not in engines:
        return "`make demo`"
    return f"`examples/demo.py --engines {','.join(engines)}`; `make demo` leaves `compile` out to be quicker"


def _milliseconds(time_us: float | None) -> str:
    return "" if time_us is None else f"{time_us / 1e3:.2f} ms"


def gpu_table(results: dict[str, Any]) -> str:
    """Microseconds of ours, of the floor and of the best rival, and the device under it."""
    rows = {row["row"]: row for row in results["rows"]}
    lines = ["| | ours | floor | best rival |", "| --- | ---: | ---: | ---: |"]
    for label, name in GPU_ROWS.items():
        measured = [c for c in rows[name]["contenders"] if "median_us" in c]
        ours = next(c for c in measured if c["role"] == "ours")
        rival = min((c for c in measured if c["role"] == "peer"), key=lambda c: c["median_us"])
        cells = [label, _microseconds(ours["median_us"]), _microseconds(rows[name]["floor"]["us"])]
        lines.append(f"| {' | '.join(cells)} | {_microseconds(rival['median_us'])}, {rival['name']} |")
    machine = rows[name]["machine"]
    versions = f"PyTorch {machine['versions']['torch']}, Triton {machine['versions']['triton']}"
    commit = rows[name]["commit"][:12]
    where = f"Medians in microseconds on one {machine['device']}, bfloat16; {versions}; commit `{commit}`."
    return "\n".join(lines) + f"\n\n{where}\n"


def _microseconds(time_us: float) -> str:
    return f"{time_us:.1f}" if time_us < 100 else f"{time_us:.0f}"


def updated(readme: str, summary: dict[str, Any], gpu_results: dict[str, Any]) -> str:
    """`readme` with both tables between their markers."""
    readme = _between(readme, BEGIN, demo_table(summary), END)
    return _between(readme, GPU_BEGIN, gpu_table(gpu_results), GPU_END)


def _between(readme: str, begin: str, table: str, end: str) -> str:
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"README.md has lost {begin.strip()} or {end.strip()}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    summary = json.loads((ROOT / "docs/demo/summary.json").read_text())
    path.write_text(updated(path.read_text(), summary, json.loads(GPU_RESULTS.read_text())))
