"""Parameters and FLOPs of a configuration, by arithmetic: nothing is built."""

from __future__ import annotations

from typing import NamedTuple

from ultramem.config import MemoryConfig, ModelConfig


class Counts(NamedTuple):
    """Parameters as the paper counts them (no embedding, no head) unless the name says otherwise."""

    total: int
    """dense + sparse."""
    dense: int
    """Parameters that every token uses."""
    sparse: int
    """Parameters of the value tables."""
    active: int
    """Parameters that one token uses: dense, and the rows that it reads."""
    flops_per_token: int
    """2 * active, the paper's convention."""
    embedding: int
    """Parameters of embedding and head."""
    total_with_embeddings: int
    """Every parameter: the numel of the built model."""


class MemoryCounts(NamedTuple):
    """Parameters of one memory layer, stage by stage."""

    query: int
    score: int
    select: int
    lookup: int
    expand: int

    @property
    def dense(self) -> int:
        return self.query + self.score + self.select + self.expand


def count_memory(memory: MemoryConfig) -> MemoryCounts:
    """Parameters of one memory layer."""
    d, h, r = memory.hidden_size, memory.num_heads, memory.rank
    norm = memory.rank_key_dim if memory.qk_norm else 0
    queries = 1 if memory.shared_query else h
    conv = d * memory.conv_width if memory.conv_width > 1 else 0
    return MemoryCounts(
        query=conv + queries * d * 2 * memory.key_dim + norm,
        score=h * 2 * r * memory.grid_side * memory.rank_key_dim + norm,
        select=h * memory.num_cores * r * r if r > 1 else 0,
        lookup=memory.num_values * memory.value_dim,
        expand=memory.expansion * memory.value_dim * d,
    )


def count(config: ModelConfig) -> Counts:
    """Parameters and FLOPs of `config`, instantly and in bounded memory.

    Raises:
        TypeError: config is not a ModelConfig.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig (see ultramem.preset), got {type(config).__name__}")
    d = config.hidden_size
    block = 4 * d * d + 2 * d * config.inner_size + 2 * d
    dense = config.num_layers * block + d
    sparse = rows = 0
    if config.memory is not None:
        layers = len(config.parsed_insertions)
        memory = count_memory(config.memory)
        dense += layers * memory.dense
        sparse = layers * memory.lookup
        rows = layers * config.memory.num_slots * config.memory.value_dim
    embedding = 2 * config.vocab_size * d
    return Counts(
        total=dense + sparse,
        dense=dense,
        sparse=sparse,
        active=dense + rows,
        flops_per_token=2 * (dense + rows),
        embedding=embedding,
        total_with_embeddings=dense + sparse + embedding,
    )
