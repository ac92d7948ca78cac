"""Collectives that have no answer, because a rank is gone or hangs."""

from __future__ import annotations

import torch.distributed as dist

_SIGNS = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "timeout")


class LostRankError(RuntimeError):
    """Another rank is gone, or does not answer."""


def is_loss(error: BaseException) -> bool:
    """Whether a collective says that it has no answer."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)


def reason(error: BaseException) -> str:
    """What a collective says, in a few words."""
    text = str(error)
    return next((sign.lower() for sign in _SIGNS if sign in text), text.splitlines()[0] if text else "no answer")
