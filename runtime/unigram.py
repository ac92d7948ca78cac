"""The loss of a model that knows how often each token comes, and nothing else: what training has to beat."""

from __future__ import annotations

import torch
from torch import Tensor


def unigram_loss(tokens_T: Tensor, vocab_size: int) -> float:
    """Entropy of the shares of `tokens_T`, in nats per token: the lowest loss on them without any context.

    Args:
        tokens_T: at least one token, of any integer dtype.
        vocab_size: tokens are in [0, vocab_size).

    Raises:
        ValueError: there are no tokens, or one is out of range.
    """
    if tokens_T.numel() == 0:
        raise ValueError("tokens must hold at least one token, got none")
    low, high = int(tokens_T.min()), int(tokens_T.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens must be in 0..{vocab_size - 1}, got {low if low < 0 else high}")
    share_V = torch.bincount(tokens_T.flatten().long(), minlength=vocab_size).double() / tokens_T.numel()
    return float(torch.special.entr(share_V).sum())
