"""A run folder: config.json, tokenizer.json, metrics.jsonl, checkpoints/, best/, model.safetensors, exports/."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ultramem
from ultramem.config import ModelConfig, TrainConfig, to_dict
from ultramem.graph.weights import CONFIG_FILE, WEIGHTS_FILE, read_config, write_atomically, write_config
from ultramem.runtime.data import Corpus, load_corpus
from ultramem.runtime.distributed.agreement import flatten
from ultramem.runtime.tokenizer import TOKENIZER_FILE, load_tokenizer


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run, and what may be done to it."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Like a run folder: config.json and the weights of the lowest held-out loss during training."""
        return self.path / "best"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    def create(self, model: ModelConfig, train: TrainConfig, corpus: Corpus, *, resume: bool) -> None:
        """Make the folder, or check that an existing one is this very run's.

        Raises:
            FileExistsError: the folder holds something and `resume` is off, or it is something else than a run.
            ValueError: resuming under another model, training configuration or text; the first difference is named.
                Or the model's vocabulary is not the tokenizer's, or nothing of the text is trained on or held out.
        """
        for part, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            if not documents:
                raise ValueError(f"data: {corpus.name} has too little text for a {part} part, got no document of it")
        if model.vocab_size != corpus.tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size must be {corpus.tokenizer.vocab_size}, as the tokenizer of {corpus.name} has, "
                f"got {model.vocab_size}"
            )
        description = describe(model, train, corpus)
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"out: {self.path} exists and is not a folder")
        # A process killed in its first moments may leave only the temporary file of config.json.
        names = [p.name for p in self.path.iterdir() if p.suffix != ".tmp"] if self.path.exists() else []
        if names and not resume:
            raise FileExistsError(
                f"out: the folder {self.path} exists already; continue it with --resume, or name another"
            )
        if CONFIG_FILE in names:
            found = read_config(self.path)
            for section, fields in description.items():
                for name, value in flatten(fields).items():
                    was = flatten(found.get(section, {})).get(name)
                    if was != value:
                        raise ValueError(
                            f"resume: {section}.{name} must be {was!r} as in {self.path / CONFIG_FILE}, got {value!r}"
                        )
            if not (self.path / TOKENIZER_FILE).exists():  # killed between the two files, or a run of an older version
                corpus.tokenizer.save(self.path)
            return
        if names:
            raise FileExistsError(f"out: the folder {self.path} exists already and is not a run (no {CONFIG_FILE})")
        self.path.mkdir(parents=True, exist_ok=True)
        sections = {name: fields for name, fields in description.items() if name != "model"}
        write_config(self.path, model, **sections, parallel=to_dict(train.parallel), environment=environment())
        corpus.tokenizer.save(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a last line cut off by a kill is left out."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            rows.append(json.loads(line))
        return rows

    def keep_metrics_until(self, step: int) -> list[dict[str, Any]]:
        """Drop what came after `step`, and final evaluations: they will be done again. Returns the rest."""
        rows = [
            row
            for row in self.read_metrics()
            if row["step"] <= step and row.get("split") not in ("held_out", "out_of_domain")
        ]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows


def corpus_of_run(folder: str | os.PathLike[str]) -> Corpus:
    """The text that a run was trained on, in its tokens.

    Raises:
        FileNotFoundError: the run or its text is not there.
        ValueError: the text has changed since.
    """
    data = read_config(Path(folder))["data"]
    corpus = load_corpus(data["name"], tokenizer=load_tokenizer(Path(folder)))
    if corpus.sha256 != data["sha256"]:
        raise ValueError(f"data: {corpus.name} is not the text that {folder} was trained on (sha256 differs)")
    return corpus


def describe(model: ModelConfig, train: TrainConfig, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """What a run is a function of."""
    fields = to_dict(train)
    fields.pop("parallel")  # a run goes on under any number of ranks
    return {
        "model": to_dict(model),
        "train": fields,
        "data": {"name": corpus.name, "sha256": corpus.sha256},
    }


def environment() -> dict[str, Any]:
    """Versions and device that the run began with."""
    return {
        "ultramem": ultramem.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }
