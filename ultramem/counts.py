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
    """Parameters of which a token uses few: value tables and experts."""
    active: int
    """Parameters that one token uses: dense, and the rows or experts that it is sent to."""
    flops_per_token: int
    """2 * active, the paper's convention."""
    embedding: int
    """Parameters of embedding and head."""
    total_with_embeddings: int
    """Every parameter: the numel of the built model."""


class MemoryCounts(NamedTuple):
    """Parameters of one memory layer, stage by stage, and of the table that it reads."""

    query: int
    score: int
    select: int
    lookup: int
    expand: int
    table: int

    @property
    def dense(self) -> int:
        return self.query + self.score + self.select + self.lookup + self.expand


def count_memory(memory: MemoryConfig) -> MemoryCounts:
    """Parameters of one memory layer and of its table."""
    d, h, r = memory.hidden_size, memory.num_heads, memory.rank
    norm = memory.rank_key_dim if memory.qk_norm != "none" else 0
    queries = 1 if memory.shared_query else h
    conv = d * memory.conv_width if memory.conv_width > 1 else 0
    pooled = memory.expansion * memory.value_dim
    project = pooled * d + (memory.expansion * d if memory.project_bias else 0)
    gated = d * pooled + pooled + pooled * d + d
    return MemoryCounts(
        query=conv + queries * d * 2 * memory.key_dim + norm,
        score=h * 2 * r * memory.grid_side * memory.rank_key_dim + norm,
        select=h * memory.num_cores * r * r if r > 1 else 0,
        lookup=d * memory.expert_dim if memory.expert_project else 0,
        expand={"project": project, "gated": gated, "none": 0}[memory.output],
        table=memory.table_rows * (memory.value_dim + memory.expert_dim),
    )


def count(config: ModelConfig) -> Counts:
    """Parameters and FLOPs of `config`, instantly and in bounded memory.

    Raises:
        TypeError: config is not a ModelConfig.
    """
    if not isinstance(config, ModelConfig):
        raise TypeError(f"config must be a ModelConfig (see ultramem.preset), got {type(config).__name__}")
    d = config.hidden_size
    mlp_layers = config.num_layers - len(config.layers_without_mlp)
    mlp = 2 * d * config.inner_size
    dense = config.num_layers * (4 * d * d + 2 * d) + d
    sparse = active = 0
    if config.moe is None:
        dense += mlp_layers * mlp
    else:
        dense += mlp_layers * d * config.moe.num_experts
        sparse += mlp_layers * config.moe.num_experts * mlp
        active += mlp_layers * config.moe.experts_per_token * mlp
    if config.memory is not None:
        memory, layers = count_memory(config.memory), len(config.parsed_insertions)
        dense += layers * memory.dense
        sparse += memory.table * (layers if config.memory.table == "own" else 1)
        active += layers * config.memory.num_slots * (config.memory.value_dim + config.memory.expert_dim)
    embedding = 2 * config.vocab_size * d
    return Counts(
        total=dense + sparse,
        dense=dense,
        sparse=sparse,
        active=dense + active,
        flops_per_token=2 * (dense + active),
        embedding=embedding,
        total_with_embeddings=dense + sparse + embedding,
    )
