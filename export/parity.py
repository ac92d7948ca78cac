"""How far an exported model is from eager, measured against how far eager float32 is from float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.program import FlatModel, empty_state, flat_inputs
from ultramem.graph.transformer import Transformer

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]

# An engine adds in another order than eager, which costs about what float32 itself costs; 4 leaves room for the luck
# of one draw.
FACTOR = 4
SEED = 0
PROMPT = 17
PADDING = 5
STEPS = 4
GREEDY_PROMPTS = (1, 7)
GREEDY_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Logit errors over a left-padded prompt and decoding steps, and agreement of greedy tokens."""

    seed: int
    max_error: float
    """Largest difference from eager float32."""
    mean_error: float
    eager_error: float
    """Largest difference of eager float32 from eager float64 on the same inputs."""
    allowed: float
    """FACTOR times `eager_error`."""
    greedy_tokens: int
    """Tokens decoded greedily on both sides."""
    greedy_equal: int
    """How many of them agree."""

    def __str__(self) -> str:
        return (
            f"largest logit error {self.max_error:.2g} ({self.allowed:.2g} allowed), "
            f"{self.greedy_equal} of {self.greedy_tokens} greedy tokens equal"
        )


def measure_parity(model: Transformer, run: Run) -> Parity:
    """Run the same tokens through the engine, eager float32 and eager float64.

    Raises:
        ValueError: the engine's largest error is not within what is allowed.
    """
    config = model.config
    exact = FlatModel(copy.deepcopy(model).double().eval())
    eager = FlatModel(model)
    expected = _logits(_eager(eager), config, torch.float32)
    eager_error = (expected - _logits(_eager(exact), config, torch.float64)).abs().max().item()
    errors = (_logits(run, config, torch.float32) - expected).abs()
    pairs = [
        pair
        for length in GREEDY_PROMPTS
        for pair in zip(_greedy(run, config, length), _greedy(_eager(eager), config, length), strict=True)
    ]
    parity = Parity(
        seed=SEED,
        max_error=errors.max().item(),
        mean_error=errors.mean().item(),
        eager_error=eager_error,
        allowed=FACTOR * eager_error,
        greedy_tokens=len(pairs),
        greedy_equal=sum(ours == theirs for ours, theirs in pairs),
    )
    if not parity.max_error <= parity.allowed:  # NaN must not pass
        raise ValueError(f"the exported model does not compute what eager does: {parity}")
    return parity


def _eager(model: FlatModel) -> Run:
    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return model(*inputs)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    return run


def _logits(run: Run, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Logits of a prompt, one row left-padded, and of the single tokens after it; padding left out."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.vocab_size, (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    state, pieces = empty_state(config, 2, dtype), []
    start = 0
    for end in range(PROMPT, PROMPT + STEPS + 1):
        logits, *new_state = run(flat_inputs(tokens[:, start:end].contiguous(), mask[:, :end].contiguous(), state))
        state, start = tuple(new_state), end
        pieces.append(logits)
    return torch.cat(pieces, 1)[mask.bool()]


def _greedy(run: Run, config: ModelConfig, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(SEED + length)
    tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
    state, new, total = empty_state(config, 1), [], length
    for _ in range(GREEDY_TOKENS):
        logits, *new_state = run(flat_inputs(tokens, torch.ones(1, total, dtype=torch.int64), state))
        tokens, state, total = logits[:, -1:].argmax(-1), tuple(new_state), total + 1
        new.append(int(tokens))
    return new
