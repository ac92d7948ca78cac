"""The k largest along the last axis with a fixed answer for ties: the lower address wins."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ADDRESS = 2**32


def pack(scores: Tensor, addresses: Tensor) -> Tensor:
    """One int64 per (float32 score, address below 2^32), ordered as (score, then lower address first)."""
    scores = torch.where(scores == 0, 0.0, scores)  # -0.0 and 0.0 are a tie
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return ordered * MAX_ADDRESS + (MAX_ADDRESS - 1 - addresses)


def unpack_addresses(packed: Tensor) -> Tensor:
    return MAX_ADDRESS - 1 - (packed & (MAX_ADDRESS - 1))


def top_addresses(scores: Tensor, addresses: Tensor, k: int) -> Tensor:
    """Addresses [..., k] of the k largest scores, best first; equal scores: the lower address first.

    `addresses` broadcasts against `scores`. float64 scores need ascending addresses along the last axis.
    """
    if scores.dtype == torch.float64:
        _, position = scores.sort(dim=-1, descending=True, stable=True)
        return addresses.expand(scores.shape).gather(-1, position[..., :k])
    return unpack_addresses(pack(scores, addresses).topk(k, dim=-1).values)
