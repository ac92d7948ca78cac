"""What a run adds to its model: how text becomes tokens, and the figures of the model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """Read from a run folder by `ultramem.runtime.run_facts`.

    Attributes:
        name: of the run.
        tokenizer: a Hugging Face tokenizer.json, or None for bytes as tokens.
        end_of_text: id of the token before each document.
        vocab_size: token ids are below this.
        config: sections of config.json: "train", "data", "environment".
        evaluations: the last row of metrics.jsonl for each split that was evaluated, by its name.
    """

    name: str
    tokenizer: dict[str, Any] | None
    end_of_text: int
    vocab_size: int
    config: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
