"""The tokens that an exported model is compared on, and how they are fed to a graph of free or of fixed sizes.

Shapes: B batch, S new tokens, P cached tokens and new ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.backend import Run
from ultramem.export.program import FlatModel, empty_state, flat_inputs
from ultramem.graph.transformer import Transformer

BATCHES = (1, 3)
PROMPTS = (1, 7, 128)
STEPS = 32
STEPS_AFTER = 7  # the prompt that decoding goes on from
PADDING = 3  # in front of the last row of a batch, of prompts that are longer


class Case(NamedTuple):
    """A prompt of `prompt` tokens for each of `batch` rows, and `steps` calls after it of `seq` tokens each."""

    batch: int
    prompt: int
    steps: int
    seq: int | None
    """Fixed number of tokens of every call; None: the prompt is one call."""


def cases(config: ModelConfig, *, batch: int | None, seq: int | None) -> tuple[Case, ...]:
    """Prefill of 1, 7 and 128 tokens and 32 decode steps at batch 1 and 3, as far as sizes and positions allow.

    Prompts that a graph of a fixed size would take in more than 32 calls are left out.
    """
    size = seq or 1
    found = []
    for rows in (batch,) if batch else BATCHES:
        for prompt in PROMPTS:
            if prompt > STEPS * (seq or prompt):
                continue
            length = -(-min(prompt, config.max_positions) // size) * size  # in whole calls
            room = max(0, config.max_positions - length) // size
            steps = min(STEPS if size == 1 else max(1, STEPS // size), room) if prompt == STEPS_AFTER else 0
            case = Case(rows, length, steps, seq)
            if case not in found:
                found.append(case)
    return tuple(found)


def eager_run(model: Transformer) -> Run:
    """The model itself, called as an engine is."""
    flat = FlatModel(model)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return flat(*inputs)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    return run


def logits_of(run: Run, config: ModelConfig, case: Case, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Logits [N,V] of all tokens of a case that are not padding; tokens are drawn from the seed."""
    step = case.seq or 1
    tokens_BP, mask_BP = _draw(config, case, case.prompt + case.steps * step, seed)
    state, pieces, start = empty_state(config, case.batch, dtype), [], 0
    for size in (*_calls(case), *(step,) * case.steps):
        end = start + size
        logits_BSV, *new = run(flat_inputs(tokens_BP[:, start:end].contiguous(), mask_BP[:, :end].contiguous(), state))
        state, start = tuple(new), end
        pieces.append(logits_BSV)
    return torch.cat(pieces, 1)[mask_BP.bool()]


def greedy_tokens(run: Run, config: ModelConfig, case: Case, dtype: torch.dtype, *, seed: int) -> list[int]:
    """The likeliest tokens after the prompt of each row, each fed back."""
    tokens_BP, mask_BP = _draw(config, case, case.prompt, seed)
    state, start, new_tokens = empty_state(config, case.batch, dtype), 0, []
    for size in _calls(case):
        end = start + size
        logits_BSV, *new = run(flat_inputs(tokens_BP[:, start:end].contiguous(), mask_BP[:, :end].contiguous(), state))
        state, start = tuple(new), end
    for _ in range(case.steps):
        best_B1 = logits_BSV[:, -1:].float().argmax(-1)
        new_tokens.append(best_B1.flatten())
        mask_BP = torch.cat([mask_BP, mask_BP.new_ones(case.batch, 1)], 1)
        logits_BSV, *new = run(flat_inputs(best_B1, mask_BP, state))
        state = tuple(new)
    return torch.cat(new_tokens).tolist() if new_tokens else []


def _calls(case: Case) -> tuple[int, ...]:
    """How many tokens of the prompt each call takes."""
    return (case.prompt,) if case.seq is None else (case.seq,) * (case.prompt // case.seq)


def _draw(config: ModelConfig, case: Case, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + case.prompt)
    tokens_BP = torch.randint(config.vocab_size, (case.batch, length), generator=generator)
    mask_BP = torch.ones_like(tokens_BP)
    if case.batch > 1 and case.prompt > PADDING:
        mask_BP[-1, :PADDING] = 0
    return tokens_BP, mask_BP
