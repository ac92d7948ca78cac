"""Count how often rows repeat in real text, and write docs/deduplication.json, from which docs/scaling.md is made.

python docs/measure_deduplication.py RUN [RUN ...]

Each RUN is a trained model with value tables; what the committed file was made with stands in it.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ultramem.graph.weights import read_config, write_atomically
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.plan.measured_rows import open_run
from ultramem.runtime.run import RunFolder

FILE = Path(__file__).resolve().with_name("deduplication.json")
TOKENS = (256, 1024, 4096, 16384)
"""Of a rank in one forward."""
BATCHES = 4


def measure(folder: Path) -> dict[str, Any]:
    """The counts of one run."""
    run = open_run(folder)
    memory = run.model.config.memory
    if memory is None:
        raise ValueError(f"run must have value tables, got {folder}")
    counts = []
    for tokens in TOKENS:
        measured = run.measure(tokens, batches=BATCHES)
        by_chance = round(expected_distinct(measured.reads, memory.num_values))
        counts.append(measured.to_json() | {"by_chance": by_chance})
        print(f"{folder.name}: {tokens:,} tokens read {measured.reads:,} rows, {measured.distinct_rows:,} different")
    document = read_config(folder)
    losses = [row["bits_per_byte"] for row in RunFolder(folder).read_metrics() if row.get("split") == "held_out"]
    return {
        "run": folder.resolve().name,
        "model": document["model"],
        "steps": run.train.steps,
        "bits_per_byte": losses[-1] if losses else None,
        "table_rows": memory.table_rows,
        "value_dim": memory.value_dim,
        "slots": memory.num_slots,
        "counts": counts,
    }


def main(folders: list[str]) -> None:
    """Measure the runs and write the file."""
    if not folders:
        raise SystemExit("give at least one run folder")
    found = {
        "made_by": "python docs/measure_deduplication.py",
        "environment": {"python": platform.python_version(), "torch": torch.__version__},
        "runs": [measure(Path(each)) for each in folders],
    }
    write_atomically(FILE, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
