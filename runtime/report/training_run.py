"""What the training page shows of a run: its metrics, thinned to what a plot can hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem.config import ModelConfig, TrainConfig, from_dict
from ultramem.counts import count
from ultramem.graph.weights import read_config
from ultramem.runtime.report.charts import binned
from ultramem.runtime.run import RunFolder

TRAINING_FIGURES = ("loss", "grad_norm", "lr", "value_lr", "tokens_per_second", "mfu")

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """One run, finished or not."""

    name: str
    parameters: int
    """All of them, embedding and head included."""
    flops_per_token: int
    step: int
    """Steps that are done."""
    steps: int
    """Steps in all."""
    seed: int
    seconds: float
    """So far, compiling and evaluating included."""
    training: dict[str, Points]
    """(step, value) by figure: loss, grad_norm, lr, value_lr, tokens_per_second, mfu."""
    evaluations: list[dict[str, Any]]
    """Rows with "split" and "eval_loss"."""
    tables: dict[str, list[dict[str, Any]]]
    """Health of each value table over training."""
    layers: dict[str, list[dict[str, Any]]]
    """Health of each memory layer over training."""

    def last_evaluation(self, split: str) -> int | None:
        """Place in `evaluations` of the newest one of `split`."""
        places = [place for place, row in enumerate(self.evaluations) if row["split"] == split]
        return places[-1] if places else None


def read_training_run(folder: Path, *, name: str | None = None) -> TrainingRun:
    """Read a run folder, also while the run goes on.

    Raises:
        FileNotFoundError: it is not a run folder.
        ValueError: it is damaged, or no step is done yet.
    """
    document = read_config(folder)
    counts = count(from_dict(ModelConfig, document["model"]))
    config = from_dict(TrainConfig, document["train"])
    rows = RunFolder(folder).read_metrics()
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ValueError(f"run: {folder} has no training step in metrics.jsonl yet")
    return TrainingRun(
        name=name or folder.resolve().name,
        parameters=counts.total_with_embeddings,
        flops_per_token=counts.flops_per_token,
        step=steps[-1]["step"],
        steps=config.steps,
        seed=config.seed,
        seconds=max(row["seconds"] for row in rows),
        training={
            figure: binned([(float(row["step"]), float(row[figure])) for row in steps if figure in row])
            for figure in TRAINING_FIGURES
        },
        evaluations=[row for row in rows if "eval_loss" in row],
        tables=_by_name(rows, "value_table"),
        layers=_by_name(rows, "memory_layer"),
    )


def _by_name(rows: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == kind:
            found.setdefault(row["name"], []).append(row)
    return found
