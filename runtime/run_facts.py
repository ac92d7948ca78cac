"""A run folder as the Hugging Face export wants it: its tokenizer, and the figures of its model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ultramem.export.run_facts import RunFacts
from ultramem.graph.weights import read_config
from ultramem.runtime.best import read_best
from ultramem.runtime.hugging_face_tokenizer import HuggingFaceTokenizer
from ultramem.runtime.run import RunFolder
from ultramem.runtime.tokenizer import load_tokenizer

_FINAL_SPLITS = ("held_out", "out_of_domain")
_SECTIONS = ("train", "data", "environment")


def run_facts(run_folder: str | os.PathLike[str]) -> RunFacts:
    """Read a run folder, or the folder of its best weights, whose figures are those of their step.

    Raises:
        FileNotFoundError: it has no config.json.
        ValueError: its config or its tokenizer is damaged.
        ImportError: its tokenizer needs the library `tokenizers`, which is not installed.
    """
    folder = Path(run_folder)
    document = read_config(folder)
    tokenizer = load_tokenizer(folder)
    name, rows = folder.resolve().name, RunFolder(folder).read_metrics()
    if (best := read_best(folder)) is not None:
        run = folder.resolve().parent
        name = f"{run.name}, best weights"
        rows = [row for row in RunFolder(run).read_metrics() if row["step"] == best.step]
    return RunFacts(
        name=name,
        tokenizer=tokenizer.to_dict()["tokenizer"] if isinstance(tokenizer, HuggingFaceTokenizer) else None,
        end_of_text=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        config={section: document[section] for section in _SECTIONS if section in document},
        evaluations=_evaluations(rows),
    )


def _evaluations(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last row of each final evaluation; of the last one during training where there was no final one."""
    last = {row["split"]: row for row in rows if "split" in row}
    final = {split: last[split] for split in _FINAL_SPLITS if split in last}
    return final or last
