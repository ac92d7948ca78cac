"""The numbers of the page: results.json, from the raw files alone."""

from __future__ import annotations

import json
import statistics
from itertools import combinations
from typing import Any

from experiment_page.paper import SWITCHES, TABLE_1
from experiment_page.raw import BASELINE, SPLITS, Experiment, Run
from experiment_page.spread import NOISE, as_json, chance_beyond, difference, spread
from ultramem.config import to_dict
from ultramem.counts import count

KIND = "ultramem-experiment"
FORMAT_VERSION = 1
LAST_STEPS = 30
"""Steps whose mean training loss is the loss at the end: that of one batch is mostly chance."""


def make_results(experiment: Experiment) -> dict[str, Any]:
    """All that the page says in numbers, ready for JSON."""
    record = experiment.record
    reference = next(iter(experiment.families.values()))[0]
    train = to_dict(reference.train)
    train.pop("seed")
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "commits": record["commits"],
        "environments": _distinct(run.environment for runs in experiment.runs.values() for run in runs),
        "data": reference.data,
        "training_options": record["training"],
        "train": train,
        "dropout": reference.model.dropout,
        "evaluated_tokens": {split: reference.evaluations(split)[0]["tokens"] for split in SPLITS},
        "sampled_tokens": reference.evaluations("held_out_sample")[-1]["tokens"],
        "seeds_planned": record["seeds"],
        "runs_planned": record["seeds"] * (len(record["families"]) + len(record["ablations"])),
        "runs_finished": sum(len(runs) for runs in experiment.runs.values()),
        "runs_missing": experiment.missing,
        "families": {name: _model(runs) for name, runs in experiment.families.items()},
        "family_differences": [_pair(experiment, *pair) for pair in combinations(experiment.families, 2)],
        "ablations": {name: _ablation(experiment, name) for name in experiment.ablations},
        "memory_health": _memory_health(experiment.runs.get(BASELINE, [])),
        "noise": {"standard_errors": NOISE, "chance_per_comparison": _chance(record["seeds"])},
        "paper": {"table_1": TABLE_1, "switches": {name: switch._asdict() for name, switch in SWITCHES.items()}},
    }


def as_text(results: dict[str, Any]) -> str:
    """The contents of results.json."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def bits(runs: list[Run], split: str) -> dict[str, float]:
    """Bits per byte of the final evaluation, by seed."""
    return {str(run.seed): run.evaluations(split)[0]["bits_per_byte"] for run in runs}


def _chance(seeds: int) -> float | None:
    return round(chance_beyond(NOISE, seeds - 1), 6) if seeds > 1 else None


def _model(runs: list[Run]) -> dict[str, Any]:
    counts = count(runs[0].model)
    train = runs[0].train
    return {
        "parameters": {
            "total": counts.total,
            "sparse": counts.sparse,
            "with_embeddings": counts.total_with_embeddings,
        },
        "flops_per_token": counts.flops_per_token,
        "tokens_seen": train.steps * train.batch_size * train.sequence_length,
        "seeds_finished": len(runs),
        **{f"{split}_bits_per_byte": as_json(spread(bits(runs, split))) for split in SPLITS},
        "train_loss_at_end": as_json(spread({str(run.seed): _loss_at_end(run) for run in runs})),
        "seconds_with_compilation": as_json(
            spread({str(run.seed): max(row["seconds"] for row in run.rows) for run in runs})
        ),
    }


def _loss_at_end(run: Run) -> float:
    return statistics.fmean(row["loss"] for row in run.steps[-LAST_STEPS:])


def _pair(experiment: Experiment, name: str, other: str) -> dict[str, Any]:
    ours, theirs = experiment.runs[name], experiment.runs[other]
    return {
        "model": name,
        "minus": other,
        **{split: as_json(difference(bits(ours, split), bits(theirs, split))) for split in SPLITS},
    }


def _ablation(experiment: Experiment, name: str) -> dict[str, Any]:
    runs, baseline = experiment.runs[name], experiment.runs[BASELINE]
    return {
        "options": experiment.record["ablations"][name],
        **_model(runs),
        "difference_to_baseline": {
            split: as_json(difference(bits(runs, split), bits(baseline, split))) for split in SPLITS
        },
        "baseline_std": {split: spread(bits(baseline, split)).std for split in SPLITS},
    }


def _memory_health(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Figures of the baseline at its last step, by table and by layer."""
    figures: dict[str, dict[str, Any]] = {}
    for kind, names in (
        ("value_table", ("used_lately", "used_ever", "kl_from_uniform_nats")),
        ("memory_layer", ("score_mean", "output_rms")),
    ):
        last = [row for run in runs for row in run.health(kind) if row["step"] == run.train.steps]
        for name in dict.fromkeys(row["name"] for row in last):
            rows = [row for row in last if row["name"] == name]
            figures[name] = {each: statistics.fmean(row[each] for row in rows) for each in names}
    return figures


def _distinct(environments: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for environment in environments:
        if environment not in found:
            found.append(environment)
    return found
