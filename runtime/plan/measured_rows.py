"""How many different rows a trained model's lookups read in its own text, which is what deduplication is worth.

Symbols: T tokens of a rank in one forward, K slots, T*K reads of a lookup.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.config import TrainConfig, from_dict
from ultramem.graph import Transformer
from ultramem.graph.weights import load, read_config
from ultramem.runtime.data import Stream, training_batch
from ultramem.runtime.row_reads import noted_reads
from ultramem.runtime.run import corpus_of_run

_FORWARD_TOKENS = 8192
"""Of one forward: a rank's batch may need more memory than a plan should."""
_SEED = 1


class LookupRows(NamedTuple):
    """Different rows that one memory layer's lookup read, in each batch."""

    lookup: str
    rows: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.rows) / len(self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRows:
    """Counted in batches of a text."""

    text: str
    tokens: int
    """T, of each batch."""
    reads: int
    """T*K, of each lookup of a batch."""
    lookups: tuple[LookupRows, ...]

    @property
    def distinct_rows(self) -> int:
        """Of a lookup, the mean over layers and batches."""
        return round(sum(each.mean for each in self.lookups) / len(self.lookups))

    @property
    def batches(self) -> int:
        return len(self.lookups[0].rows)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-ready document."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "batches": self.batches,
            "reads": self.reads,
            "distinct_rows": self.distinct_rows,
            "lookups": {each.lookup: list(each.rows) for each in self.lookups},
        }


class TrainedRun(NamedTuple):
    """A run and the text that it was trained on."""

    model: Transformer
    train: TrainConfig
    text: str
    stream: Tensor | Stream

    def measure(self, tokens: int, *, batches: int = 4) -> MeasuredRows:
        """Count in batches of `tokens` tokens, drawn as training draws them; the means are of so many batches.

        Raises:
            ValueError: tokens is no multiple of the length of the run's sequences, or the model has no table.
        """
        length = self.train.sequence_length
        if tokens < 1 or tokens % length:
            raise ValueError(
                f"tokens_per_rank must be a multiple of the {length} tokens that the run's sequences have, got {tokens}"
            )
        counts: dict[str, list[int]] = defaultdict(list)
        reads = 0
        for number in range(batches):
            rows: dict[str, list[Tensor]] = defaultdict(list)
            inputs_BS = training_batch(
                self.stream, step=number, seed=_SEED, batch_size=tokens // length, sequence_length=length
            ).inputs_BS
            with torch.no_grad(), noted_reads(self.model) as noted:
                for piece_BS in inputs_BS.split(max(1, _FORWARD_TOKENS // length)):
                    self.model(piece_BS)
                    for each in noted:
                        rows[each.lookup].append(each.rows_R)
                    noted.clear()
            for lookup, pieces in rows.items():
                every_R = torch.cat(pieces)
                reads = every_R.numel()
                counts[lookup].append(every_R.unique().numel())
        if not counts:
            raise ValueError("run must have a model with memory layers, got one without")
        lookups = tuple(LookupRows(lookup, tuple(rows)) for lookup, rows in counts.items())
        return MeasuredRows(text=self.text, tokens=tokens, reads=reads, lookups=lookups)


def open_run(folder: str | os.PathLike[str]) -> TrainedRun:
    """Load a run's model and its text.

    Raises:
        FileNotFoundError: there is no run, or its text is gone.
        ValueError: the run is damaged, or the text is not what it was trained on.
    """
    model, corpus = load(folder), corpus_of_run(folder)
    train = from_dict(TrainConfig, read_config(Path(folder))["train"])
    return TrainedRun(model, train, corpus.name, corpus.train_stream())
