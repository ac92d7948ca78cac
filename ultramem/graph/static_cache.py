"""A cache with room for tokens to come, which one decode step writes into instead of making a longer one.

Shapes: B batch, A attention heads, C columns of room, P columns in use, X head dim, D hidden size, W convolution width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StaticCache(NamedTuple):
    """What `Cache` holds, in buffers whose shape does not follow the tokens; for one new token at a time.

    Attributes:
        keys, values: per layer [B,A,C,X]; a step writes its token's column in place.
        convs: per memory layer the last inputs [B,D,W-1].
        column_1: int64 [1], where the new token goes.
        num_columns: P <= C, how many are looked at.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    convs: tuple[Tensor, ...]
    column_1: Tensor
    num_columns: int

    def append(self, layer: int, key_BA1X: Tensor, value_BA1X: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new token's key and value; returns the layer's keys and values [B,A,P,X]."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.column_1] = key_BA1X
        values[:, :, self.column_1] = value_BA1X
        return keys[:, :, : self.num_columns], values[:, :, : self.num_columns]

    def mask(self, attention_mask_BP: Tensor) -> Tensor:
        """[B,1,1,P], True where the new token may look: at tokens, and at itself even if it is padding."""
        column_P = torch.arange(attention_mask_BP.shape[1], device=attention_mask_BP.device)
        return (attention_mask_BP.bool() | (column_P == self.column_1))[:, None, None]
