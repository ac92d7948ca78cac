"""Is a result right: compared with float64, by the error that plain PyTorch makes in the same dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.harness.contender import WrongResultError

FACTOR = 4.0


def require_as_exact_as_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor, *, lost_bits: int = 0) -> None:
    """Every element is as near to `exact` (float64) as FACTOR times the worst of `eager`, or one rounding.

    A kernel whose method costs bits of the mantissa says how many: `lost_bits`.

    Raises:
        WrongResultError: it is not.
    """
    if actual.shape != exact.shape:
        raise WrongResultError(f"{name} has shape {tuple(actual.shape)}, the oracle {tuple(exact.shape)}")
    error = _largest(actual.double() - exact)
    rounding = torch.finfo(actual.dtype).eps * _largest(exact)
    allowed = (FACTOR * _largest(eager.double() - exact) + rounding) * 2**lost_bits
    if not error <= allowed:  # a NaN is not
        raise WrongResultError(f"{name} differs from float64 by {error:.3g}, accepted {allowed:.3g}")


def require_tokens_as_exact_as_eager(name: str, results: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Nine tokens in ten are as exact as FACTOR times those of eager; for results that hang on a selection.

    Two slots of nearly equal scores may change places between two correct implementations, which shows in that token
    and in no other.

    Args:
        name: of the result, for the message.
        results: (actual, eager, exact) [T,...] of several draws.

    Raises:
        WrongResultError: they are not.
    """
    errors, references, rounding = [], [], 0.0
    for actual, eager, exact in results:
        if actual.shape != exact.shape:
            raise WrongResultError(f"{name} has shape {tuple(actual.shape)}, the oracle {tuple(exact.shape)}")
        errors.append((actual.double() - exact).flatten(1).abs().amax(1))
        references.append((eager.double() - exact).flatten(1).abs().amax(1))
        rounding = max(rounding, torch.finfo(actual.dtype).eps * _largest(exact))
    error, reference = (torch.cat(each).quantile(0.9).item() for each in (errors, references))
    allowed = FACTOR * reference + rounding
    if not error <= allowed:
        raise WrongResultError(
            f"{name} differs from float64 by {error:.3g} in a tenth of tokens, accepted {allowed:.3g}"
        )


def _largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
