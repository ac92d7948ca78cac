"""What an engine keeps between calls, and how rows of a batch come together and part.

Shapes: B sequences, P columns of the cache (tokens and padding), A attention heads, X head dim, D hidden size,
W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.config import ModelConfig

MIN_COLUMNS = 2
"""The compiled engine's graph takes no shorter cache: the compiler makes a constant of a length of 0 or 1."""


class Room:
    """Buffers [B,A,C,X] of keys and values that the caches of successive steps share, each the first columns of it.

    Attributes:
        buffers: key and value of every layer.
        writers: for each column in use, the step that wrote it.
    """

    def __init__(self, buffers: tuple[Tensor, ...], num_columns: int) -> None:
        self.buffers = buffers
        self.writers: list[object] = [None] * num_columns

    @property
    def capacity(self) -> int:
        return self.buffers[0].shape[2]


def make_buffers(keys_and_values: Sequence[Tensor], capacity: int) -> tuple[Tensor, ...]:
    """Buffers for a `Room`, like these but of `capacity` columns, with nothing in them."""
    return tuple(each.new_empty(*each.shape[:2], capacity, each.shape[3]) for each in keys_and_values)


def fill(buffers: Sequence[Tensor], keys_and_values: Sequence[Tensor], num_columns: int) -> None:
    """Put the first `num_columns` of keys and values into the buffers."""
    for buffer, each in zip(buffers, keys_and_values, strict=True):
        buffer[:, :, :num_columns] = each[:, :, :num_columns]


class EngineCache(NamedTuple):
    """Keys and values of earlier tokens; nothing outside engines and this file looks inside."""

    mask_BP: Tensor
    """1 for tokens, 0 for padding."""
    state: tuple[Tensor, ...]
    """Key and value [B,A,P,X] of every layer, then the convolutions' last inputs [B,D,W-1]. Keys and values may have
    more columns than are in use."""
    hidden: int
    """Padding that the engine itself put in front of the caller's tokens."""
    room: Room | None = None
    """What the keys and values are views of, where later steps write behind them."""
    writer: object = None
    """The step that wrote the last column of the room."""

    @property
    def num_rows(self) -> int:
        return self.mask_BP.shape[0]

    @property
    def num_columns(self) -> int:
        return self.mask_BP.shape[1]


def join_caches(config: ModelConfig, caches: Sequence[EngineCache]) -> EngineCache:
    """One cache of all rows in order, shorter ones padded on the left.

    Positions count the tokens of the mask, so a row's logits stay what they were, but for the order of additions.
    """
    columns = max(cache.num_columns for cache in caches)
    masks = [F.pad(cache.mask_BP, (columns - cache.num_columns, 0)) for cache in caches]
    states = [
        [
            F.pad(tensor[:, :, : cache.num_columns], (0, 0, columns - cache.num_columns, 0))
            if index < 2 * config.num_layers
            else tensor
            for index, tensor in enumerate(cache.state)
        ]
        for cache in caches
    ]
    return EngineCache(torch.cat(masks), tuple(torch.cat(tensors) for tensors in zip(*states, strict=True)), 0)


def take_rows(config: ModelConfig, cache: EngineCache, rows: Sequence[int]) -> EngineCache:
    """The cache of some rows, without columns that are padding in all of them."""
    index = torch.tensor(rows)
    mask_BP = cache.mask_BP[index]
    first = int((mask_BP.cumsum(1) == 0).sum(1).min())
    first = max(0, min(first, cache.num_columns - MIN_COLUMNS))
    state = []
    for number, tensor in enumerate(cache.state):
        if number < 2 * config.num_layers:
            tensor = tensor[:, :, first : cache.num_columns]
        state.append(tensor[index.to(tensor.device)])
    return EngineCache(mask_BP[:, first:].contiguous(), tuple(state), 0)


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one column of one row takes: keys and values of all layers."""
    return 2 * config.num_layers * config.hidden_size * dtype.itemsize
