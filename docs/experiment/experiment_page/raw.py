"""The raw files: config.json and metrics.jsonl of every finished run, and experiment.json, which says what they are.

Nothing is read that does not fit the rest: runs differ in their seed, their preset and their ablation's own options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ultramem.config import ModelConfig, TrainConfig, to_dict
from ultramem.runtime.recipe import make_recipe

BASELINE = "ultramem-tiny"
"""What the ablations are of."""
SPLITS = ("held_out", "out_of_domain")


class Run(NamedTuple):
    """One finished run."""

    name: str
    seed: int
    model: ModelConfig
    train: TrainConfig
    data: dict[str, str]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    """metrics.jsonl."""

    @property
    def folder(self) -> str:
        return f"{self.name}-seed{self.seed}"

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    def evaluations(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("split") == split]

    def health(self, kind: str) -> list[dict[str, Any]]:
        """Rows of "value_table" or "memory_layer"."""
        return [row for row in self.rows if row.get("kind") == kind]


class Experiment(NamedTuple):
    """What was planned, and the runs of it that are finished."""

    record: dict[str, Any]
    runs: dict[str, list[Run]]
    """By name, families first, seeds in order; names without a finished run are left out."""
    missing: list[str]
    """Folders of the runs that are planned and not there."""

    @property
    def families(self) -> dict[str, list[Run]]:
        return {name: runs for name, runs in self.runs.items() if name in self.record["families"]}

    @property
    def ablations(self) -> dict[str, list[Run]]:
        return {name: runs for name, runs in self.runs.items() if name in self.record["ablations"]}


def read_experiment(folder: Path) -> Experiment:
    """Read and check all of `folder`.

    Raises:
        FileNotFoundError: there is no experiment.json.
        ValueError: a file is damaged, a run is unfinished or not planned, or runs differ where they must not; the
            message names the file, or the run and the field.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: python examples/experiment.py --publish {folder} writes it")
    record = _json(path.read_text(), path)
    for key in ("commits", "seeds", "families", "training", "ablations"):
        if key not in record:
            raise ValueError(f"{path} has no {key!r}")
    planned = {
        f"{name}-seed{seed}": (name, seed)
        for name in (*record["families"], *record["ablations"])
        for seed in range(record["seeds"])
    }
    there = {each.name for each in folder.iterdir() if each.is_dir()}
    if unknown := sorted(there - planned.keys()):
        raise ValueError(f"{folder / unknown[0]} is not a run of {path}, which has {', '.join(planned)}")
    runs: dict[str, list[Run]] = {}
    for run_folder, (name, seed) in planned.items():
        if run_folder in there:
            runs.setdefault(name, []).append(_read_run(folder / run_folder, name, seed))
    experiment = Experiment(record, runs, [each for each in planned if each not in there])
    if not experiment.families:
        raise ValueError(f"{folder} has no finished run of {', '.join(record['families'])}")
    if experiment.ablations and BASELINE not in runs:
        raise ValueError(f"{folder} has ablations, but no run of {BASELINE} to compare them with")
    _check_runs_belong_together(folder, experiment)
    return experiment


def settings(options: Sequence[str]) -> list[str]:
    """Options of `ultramem train` as settings of a recipe: "--lr 2e-3" is "train.lr=2e-3"; `--data` is left out."""
    found = []
    words = [*options, "--end"]
    for option, value in pairwise(words):
        if not option.startswith("--"):
            continue
        name = option.removeprefix("--").replace("-", "_")
        if value.startswith("--"):
            found.append(f"train.{name.removeprefix('no_')}={'false' if name.startswith('no_') else 'true'}")
        elif name == "set":
            found.append(value)
        elif name != "data":
            found.append(f"train.{name}={value}")
    return found


def _read_run(folder: Path, name: str, seed: int) -> Run:
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    for path in (config, metrics):
        if not path.is_file():
            raise ValueError(f"{path} is missing")
    document = _json(config.read_text(), config)
    recipe = make_recipe(file=config)
    text = metrics.read_text()
    if not text.endswith("\n"):
        raise ValueError(f"{metrics} ends within a line")
    rows = [_json(line, f"{metrics}:{number}") for number, line in enumerate(text.splitlines(), 1)]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"step", "seconds"} <= row.keys():
            raise ValueError(f"{metrics}:{number} must be a row with step and seconds")
    run = Run(name, seed, recipe.model, recipe.train, document["data"], document["environment"], rows)
    if [row["step"] for row in run.steps] != list(range(1, run.train.steps + 1)):
        raise ValueError(f"{metrics} must hold the steps 1 to {run.train.steps}, each once, got {len(run.steps)} steps")
    for split in SPLITS:
        finals = run.evaluations(split)
        if len(finals) != 1 or finals[0]["step"] != run.train.steps:
            raise ValueError(f"{metrics} must hold one final evaluation of {split}, got {len(finals)}")
    for row in rows:
        if "eval_loss" in row:
            bits = row["eval_loss"] / math.log(2) * row["tokens"] / row["text_bytes"]
            if not math.isclose(bits, row["bits_per_byte"], rel_tol=1e-6):
                raise ValueError(
                    f"{metrics}: step {row['step']} of {row['split']}: bits_per_byte must be {bits:.6f}, as eval_loss "
                    f"says, got {row['bits_per_byte']}"
                )
    return run


def _json(text: str, where: object) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{where} holds {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _check_runs_belong_together(folder: Path, experiment: Experiment) -> None:
    """All runs on the same text and budget; models of a name the same; ablations the baseline with their options."""
    record = experiment.record
    reference = next(iter(experiment.families.values()))[0]
    for name, runs in experiment.runs.items():
        own = settings(record["ablations"].get(name, ()))
        base = experiment.runs[BASELINE if name in record["ablations"] else name][0]
        for run in runs:
            changes = [*settings(record["training"]), *own, f"train.seed={run.seed}"]
            of_train = [change for change in changes if change.startswith("train.")]
            train = make_recipe(file=folder / reference.folder / "config.json", settings=of_train).train
            model = make_recipe(file=folder / base.folder / "config.json", settings=changes).model
            expected = {"train": to_dict(train), "model": to_dict(model), "data": reference.data}
            got = {"train": to_dict(run.train), "model": to_dict(run.model), "data": run.data}
            for section in SPLITS:
                row, other = run.evaluations(section)[0], reference.evaluations(section)[0]
                expected[section] = {key: other[key] for key in ("tokens", "text_bytes")}
                got[section] = {key: row[key] for key in ("tokens", "text_bytes")}
            _check_equal(folder / run.folder, expected, got)


def _check_equal(where: Path, expected: dict[str, Any], got: dict[str, Any]) -> None:
    should, does = _flatten(expected), _flatten(got)
    for name in dict.fromkeys([*should, *does]):
        if should.get(name) != does.get(name):
            raise ValueError(
                f"{where}: {name} must be {should.get(name)!r}, as the other runs and experiment.json have it, "
                f"got {does.get(name)!r}"
            )


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
