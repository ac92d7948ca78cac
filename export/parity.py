"""How far an exported model is from eager, and how far rounded weights are from the original ones.

Two questions, kept apart. Does the engine compute what eager does? Its logits are held against eager float32 of the
very weights that it has, after their rounding. What is allowed is measured, not guessed: FACTOR times the error that
eager itself makes in the type of the export, against float64 of those weights. And what did the rounding cost? That is
the distance of eager float32 before and after, and bits per byte of held-out text where there is some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.backend import Run
from ultramem.export.feeding import Case, cases, eager_run, greedy_tokens, logits_of
from ultramem.export.options import ExportOptions
from ultramem.graph.gathered_table import in_precision
from ultramem.graph.transformer import Transformer

# An engine adds in another order than eager, which costs about what the type itself costs; 4 leaves room for the luck
# of one draw.
FACTOR = 4
SEED = 0

BitsPerByte = Callable[[Transformer], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseError:
    """Logit errors of one prompt and the tokens after it."""

    batch: int
    prompt: int
    steps: int
    """Calls after the prompt, of one token each (or of the fixed number that the graph takes)."""
    max_error: float
    mean_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What the rounding of weights changed, in eager PyTorch."""

    max_difference: float
    """Of logits."""
    mean_difference: float
    bits_per_byte: float | None
    """Of the original weights on held-out text; None where there is none."""
    bits_per_byte_rounded: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Logit errors of the engine over prompts, one row left-padded, and decoding; and agreement of greedy tokens."""

    seed: int
    max_error: float
    """Largest difference from eager float32 of the same rounded weights."""
    mean_error: float
    eager_error: float
    """Largest error of eager in the type of the export, against eager float64 of the same rounded weights."""
    eager_mean_error: float
    allowed: float
    """FACTOR times `eager_error`. Below float32 that is much: a slot that is kept or not makes a leap. Hence also:"""
    allowed_mean: float
    """FACTOR times `eager_mean_error`."""
    cases: tuple[CaseError, ...]
    greedy_tokens: int
    """Tokens decoded greedily on both sides; 0 where the graph does not take single tokens."""
    greedy_equal: int
    """How many of them agree."""
    rounding: Rounding | None
    """None where the weights are as they were."""

    def __str__(self) -> str:
        text = (
            f"largest logit error {self.max_error:.2g} ({self.allowed:.2g} allowed), "
            f"mean {self.mean_error:.2g} ({self.allowed_mean:.2g} allowed), "
            f"{self.greedy_equal} of {self.greedy_tokens} greedy tokens equal"
        )
        if self.rounding is not None:
            text += f", rounding moved logits by up to {self.rounding.max_difference:.2g}"
            if self.rounding.bits_per_byte is not None and self.rounding.bits_per_byte_rounded is not None:
                text += f" and bits per byte from {self.rounding.bits_per_byte:.4f} to "
                text += f"{self.rounding.bits_per_byte_rounded:.4f}"
        return text


def measure_parity(
    model: Transformer,
    rounded: Transformer,
    options: ExportOptions,
    run: Run,
    *,
    seq: int | None = None,
    bits_per_byte: BitsPerByte | None = None,
) -> Parity:
    """Run the same tokens through the engine and through eager in float64, in float32 and in the type of the export.

    Args:
        model: as it was trained, float32.
        rounded: with the weights that were exported.
        options: of the export.
        run: the engine.
        seq: the only number of new tokens that the engine takes; None: any.
        bits_per_byte: of a model on held-out text.

    Raises:
        ValueError: the engine's largest or mean error is not within what is allowed.
    """
    engines = _Engines(
        run=run,
        eager=eager_run(rounded if options.dtype == "fp32" else in_precision(rounded, torch.float32)),
        exact=eager_run(in_precision(rounded, torch.float64)),
        own=None if options.dtype == "fp32" else eager_run(rounded),
        before=None if rounded is model else eager_run(model),
    )
    config = model.config
    wanted = cases(config, batch=options.batch, seq=seq)
    found = [_compare(engines, config, case, options.torch_dtype) for case in wanted]
    pairs: list[tuple[int, int]] = []
    for case in wanted:
        if case.steps and seq in (None, 1):
            ours = greedy_tokens(run, config, case, options.torch_dtype, seed=SEED)
            pairs += zip(ours, greedy_tokens(engines.eager, config, case, torch.float32, seed=SEED), strict=True)
    eager_error, eager_mean_error = max(each.own.max for each in found), _mean(each.own for each in found)
    parity = Parity(
        seed=SEED,
        max_error=max(each.ours.max for each in found),
        mean_error=_mean(each.ours for each in found),
        eager_error=eager_error,
        eager_mean_error=eager_mean_error,
        allowed=FACTOR * eager_error,
        allowed_mean=FACTOR * eager_mean_error,
        cases=tuple(
            CaseError(
                batch=case.batch,
                prompt=case.prompt,
                steps=case.steps,
                max_error=each.ours.max,
                mean_error=_mean([each.ours]),
            )
            for case, each in zip(wanted, found, strict=True)
        ),
        greedy_tokens=len(pairs),
        greedy_equal=sum(ours == theirs for ours, theirs in pairs),
        rounding=_rounding([each.moved for each in found if each.moved], model, rounded, bits_per_byte),
    )
    if not (parity.max_error <= parity.allowed and parity.mean_error <= parity.allowed_mean):  # NaN must not pass
        raise ValueError(f"the exported model does not compute what eager does: {parity}")
    return parity


class _Engines(NamedTuple):
    run: Run
    eager: Run
    exact: Run
    own: Run | None
    """Eager in the type of the export; None: that is `eager`."""
    before: Run | None
    """Eager float32 of the original weights; None: they are the same."""


class _Difference(NamedTuple):
    max: float
    total: float
    entries: int


class _Found(NamedTuple):
    ours: _Difference
    own: _Difference
    moved: _Difference | None


def _compare(engines: _Engines, config: ModelConfig, case: Case, dtype: torch.dtype) -> _Found:
    def logits(run: Run, of: torch.dtype) -> Tensor:
        return logits_of(run, config, case, of, seed=SEED)

    expected = logits(engines.eager, torch.float32)
    own = expected if engines.own is None else logits(engines.own, dtype)
    return _Found(
        ours=_difference(logits(engines.run, dtype), expected),
        own=_difference(own, logits(engines.exact, torch.float64)),
        moved=None if engines.before is None else _difference(logits(engines.before, torch.float32), expected),
    )


def _difference(ours: Tensor, theirs: Tensor) -> _Difference:
    error = (ours.to(theirs.dtype) - theirs).abs()
    return _Difference(error.max().item(), error.sum(dtype=torch.float64).item(), error.numel())


def _mean(differences: Iterable[_Difference]) -> float:
    _, totals, entries = zip(*differences, strict=True)
    return float(sum(totals) / sum(entries))


def _rounding(
    moved: list[_Difference], model: Transformer, rounded: Transformer, bits_per_byte: BitsPerByte | None
) -> Rounding | None:
    if not moved:
        return None
    return Rounding(
        max_difference=max(each.max for each in moved),
        mean_difference=_mean(moved),
        bits_per_byte=None if bits_per_byte is None else bits_per_byte(model),
        bits_per_byte_rounded=None if bits_per_byte is None else bits_per_byte(rounded),
    )
