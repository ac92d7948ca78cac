"""Tokens in memory or in shards on disk, as documents and as one stream."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream(Protocol):
    """All documents of a part after one another, an end-of-text token before each."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """The tokens at int64 positions of any shape."""
        ...


class Documents(Sequence[Tensor]):
    """Documents of one part, each as its tokens without the end-of-text token that goes before it."""

    end_of_text: int

    @abstractmethod
    def stream(self) -> Tensor | Stream:
        """All documents after one another."""


class LoadedDocuments(Documents):
    """Documents in memory, of any integer dtype."""

    def __init__(self, documents: Iterable[Tensor], *, end_of_text: int, vocab_size: int) -> None:
        self.documents = tuple(documents)
        self.end_of_text = end_of_text
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> LoadedDocuments: ...
    def __getitem__(self, index: int | slice) -> Tensor | LoadedDocuments:
        if isinstance(index, int):
            return self.documents[index]
        return LoadedDocuments(self.documents[index], end_of_text=self.end_of_text, vocab_size=self.vocab_size)

    def stream(self) -> Tensor:
        """In the narrowest signed dtype that indexing on every device knows."""
        dtype = torch.int16 if self.vocab_size <= torch.iinfo(torch.int16).max else torch.int32
        mark = torch.tensor([self.end_of_text], dtype=dtype)
        return torch.cat([part for document in self.documents for part in (mark, document.to(dtype))] or [mark[:0]])


class ShardedTokens:
    """A stream of tokens in memory-mapped shards; what is indexed is read, and nothing else.

    Args:
        shards: unsigned integers, one array a shard.
    """

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        self.shards = tuple(shards)
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, positions: Tensor) -> Tensor:
        wanted = positions.numpy()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"positions must be in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}")
        tokens = np.empty(wanted.shape, dtype=np.int64)
        shard_of = np.searchsorted(self.ends, wanted, side="right")
        for index in np.unique(shard_of):
            here = shard_of == index
            start = self.ends[index] - len(self.shards[index])
            tokens[here] = self.shards[index][wanted[here] - start]
        return torch.from_numpy(tokens)

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start..stop; a view of the file where they lie in one shard."""
        parts = []
        while start < stop:
            index = bisect_right(self.ends, start)
            offset = start - (self.ends[index] - len(self.shards[index]))
            parts.append(self.shards[index][offset : offset + stop - start])
            start += len(parts[-1])
        if not parts:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


class ShardedDocuments(Documents):
    """Documents in shards, found by their end-of-text tokens when the first of them is asked for."""

    def __init__(self, tokens: ShardedTokens, *, documents: int, end_of_text: int) -> None:
        self.tokens, self.documents, self.end_of_text = tokens, documents, end_of_text

    def __len__(self) -> int:
        return self.documents

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        if not -self.documents <= index < self.documents:
            raise IndexError(f"document must be in 0..{self.documents - 1}, got {index}")
        index %= self.documents
        return self.tokens.read(int(self._bounds[index]) + 1, int(self._bounds[index + 1]))

    def stream(self) -> ShardedTokens:
        return self.tokens

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Where the documents begin, and where the last one ends."""
        found, start = [], 0
        for shard in self.tokens.shards:
            for offset in range(0, len(shard), 1 << 22):  # in pieces: a comparison needs memory of its own
                found.append(np.flatnonzero(shard[offset : offset + (1 << 22)] == self.end_of_text) + start + offset)
            start += len(shard)
        return np.concatenate([*found, [start]]).astype(np.int64)
