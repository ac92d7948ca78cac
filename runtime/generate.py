"""Token by token from any engine: greedy or sampled, outside the engine so that all of them agree."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ultramem.runtime.engine import Engine
from ultramem.runtime.tokenizer import END_OF_TEXT


def generate(
    engine: Engine,
    prompt: list[int],
    *,
    max_new_tokens: int,
    max_positions: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_of_text: int = END_OF_TEXT,
) -> Iterator[int]:
    """New tokens one by one; ends before an end-of-text token.

    Args:
        engine: eager, compiled, ONNX Runtime or AOTInductor.
        prompt: at least one token.
        max_new_tokens: how many at most, at least 1.
        max_positions: context that the model accepts; prompt and new tokens must fit.
        temperature: 0 takes the likeliest token (of equal ones the lowest); above, the distribution is sampled.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        seed: of the sampling.
        end_of_text: the tokenizer's; the default is that of bytes.

    Raises:
        ValueError: an argument is out of range, or the context would be too long.
    """
    if not prompt:
        raise ValueError("prompt must hold at least one token, got none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if len(prompt) + max_new_tokens > max_positions:
        raise ValueError(
            f"prompt and max_new_tokens must fit {max_positions} positions, got {len(prompt)} + {max_new_tokens}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    return _generate(engine, prompt, max_new_tokens, temperature, top_p, seed, end_of_text)


def _generate(
    engine: Engine,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end_of_text: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    logits_BSV, cache = engine.prefill(torch.tensor([prompt]))
    for index in range(max_new_tokens):
        token = _pick(logits_BSV[0, -1], temperature, top_p, generator)
        if token == end_of_text:
            return
        yield token
        if index + 1 < max_new_tokens:
            logits_BSV, cache = engine.decode(torch.tensor([[token]]), cache)


def _pick(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = (logits_V.double() / temperature).softmax(-1)
    probabilities_V, order_V = probabilities_V.sort(descending=True, stable=True)
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    kept_V = probabilities_V.where(before_V < top_p, 0.0)
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])
