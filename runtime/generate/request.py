"""What is asked of a generator, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ultramem.config import ModelConfig

FinishReason = Literal["length", "end_of_text", "stop", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and how it is continued. What comes out does not depend on the other requests of its batch.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    prompt: tuple[int, ...]
    """Tokens, at least one."""
    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token (of equal ones the lowest); above, the distribution is sampled."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities add up to this."""
    seed: int = 0
    """Of the sampling of this request."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; they are not part of it."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must hold at least one token, got none")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if not isinstance(self.stop, tuple) or "" in self.stop:
            raise ValueError(f"stop must be texts of at least one character, got {self.stop!r}")

    @property
    def num_positions(self) -> int:
        """Of prompt and continuation, at most."""
        return len(self.prompt) + self.max_new_tokens


def check_request(request: Request, config: ModelConfig) -> None:
    """Raise if a model cannot take the request.

    Raises:
        ValueError: it does not fit the model's positions or vocabulary.
    """
    if request.num_positions > config.max_positions:
        raise ValueError(
            f"prompt and max_new_tokens must fit {config.max_positions} positions, got "
            f"{len(request.prompt)} + {request.max_new_tokens}"
        )
    wrong = next((token for token in request.prompt if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"prompt must be of tokens in 0..{config.vocab_size - 1}, got {wrong}")


class Event(NamedTuple):
    """One step of one request, as it happens."""

    request_id: int
    token: int | None
    """New token; None where there is none (an end-of-text token, a cancelled request)."""
    text: str
    """New text: never a part of a character, nor what may turn out to be the beginning of a stop text."""
    finish_reason: FinishReason | None
    """None: more is to come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole continuation."""

    tokens: tuple[int, ...]
    """New ones, in order; those of a stop text included."""
    text: str
    """Without the stop text; empty where the generator has no tokenizer."""
    finish_reason: FinishReason
