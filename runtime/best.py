"""The weights of the lowest held-out loss during training, kept beside the checkpoints and loadable like a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from ultramem.graph.weights import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from ultramem.runtime.distributed import Ranks
from ultramem.runtime.tokenizer import TOKENIZER_FILE
from ultramem.runtime.weights import load_weights, save_weights

RECORD_FILE = "best.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """Which step did best."""

    step: int
    eval_loss: float
    """Nats per token on the sample of held-out text that is evaluated during training."""


def read_best(folder: Path) -> Best | None:
    """The record in `folder`, or None if there is none yet."""
    path = folder / RECORD_FILE
    return Best(**json.loads(path.read_text())) if path.is_file() else None


def save_best(folder: Path, best: Best, model: nn.Module, run: Path, ranks: Ranks) -> None:
    """Write the weights of `model`, what `run` holds to read them with, and then the record.

    A run killed before the record comes back to this step, and writes all again.
    """

    def prepare() -> None:
        folder.mkdir(exist_ok=True)
        for name in (CONFIG_FILE, TOKENIZER_FILE):
            write_atomically(folder / name, (run / name).read_bytes())

    ranks.on_main(prepare)
    save_weights(model, folder, ranks)
    ranks.on_main(lambda: write_atomically(folder / RECORD_FILE, json.dumps(asdict(best)).encode() + b"\n"))


def load_best(folder: Path, model: nn.Module) -> None:
    """Put the weights back into `model`."""
    load_weights(model, folder / WEIGHTS_FILE)
