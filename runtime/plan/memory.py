"""Memory of one rank in training, by arithmetic.

Symbols: P ranks, D dense parameters (embedding and head among them), N rows of w columns (input rows of experts among
them) in each table, b bytes of a table's number.

| part | bytes |
| --- | --- |
| dense weights, gradients, AdamW | 4 D, 4 D, 8 D; with FSDP a P-th of each, and padding (`dense_share.py`) |
| dense copies | FSDP: whole weights and gradients from forward to backward, 4 D each; either way 2 D in bf16, for products |
| table weights | b N w, a P-th of it where P ranks share a copy |
| table gradients | as the weights with AdamW; else `b w + 8` a row that the step touched, of a rank's share |
| table optimiser | AdamW: 2 b a number; LazyAdamW: 8 a number and 4 a row; RowAdagrad: 8 a row |
| activations | `activations.py` |
| exchange | `exchange_memory.py` |

A rank's share of N rows is ceil(N / P); input rows of experts have numbers and states of their own. Columns have all N
rows, so they keep N numbers where an optimiser has one a row.
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

from typing import NamedTuple

from ultramem.config import MemoryConfig, ModelConfig
from ultramem.counts import count
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.plan.activations import activation_bytes
from ultramem.runtime.plan.dense_share import dense_share
from ultramem.runtime.plan.exchange import Placement, Pooling
from ultramem.runtime.plan.exchange_memory import kept_bytes, passing_bytes
from ultramem.runtime.plan.options import TABLE_BYTES, PlanOptions


class MemoryPart(NamedTuple):
    """What one thing takes on a rank."""

    name: str
    bytes: int


def rank_memory(
    config: ModelConfig, options: PlanOptions, placement: Placement, pooling: Pooling | None = None
) -> tuple[MemoryPart, ...]:
    """Every part of a rank's memory in training, none left out.

    Raises:
        ValueError: the model has no memory layers, or mixtures of experts.
    """
    memory = require_memory(config)
    exchange = len(config.parsed_insertions) * kept_bytes(memory, options, placement, pooling)
    parts = [
        *_dense_parts(config, options),
        *table_parts(config, options, placement),
        MemoryPart(
            "activations",
            activation_bytes(
                config,
                tokens=options.tokens_per_rank,
                sequence_length=options.sequence_length,
                element_bytes=options.element_bytes,
                checkpointing=options.activation_checkpointing,
            ),
        ),
        MemoryPart("exchange", exchange + passing_bytes(memory, options, placement, pooling)),
    ]
    return tuple(parts)


def total_bytes(parts: tuple[MemoryPart, ...]) -> int:
    """Of all parts."""
    return sum(part.bytes for part in parts)


class TableShare(NamedTuple):
    """What one rank has of all tables."""

    numbers: int
    """Of rows, those of experts' input rows among them."""
    numbered_rows: int
    """Rows that an optimiser keeps something of, once a row."""
    touched_numbers: float
    """Of rows that a step of all ranks touches."""
    touched_rows: float


def table_share(config: ModelConfig, options: PlanOptions, placement: Placement) -> TableShare:
    """A rank's share of the tables, and of what a step touches by chance."""
    memory = require_memory(config)
    tables, width = num_tables(config), memory.value_dim + memory.expert_dim
    ranks = 1 if placement == "replicate" else options.table_ranks
    rows = memory.table_rows if placement == "columns" else -(-memory.table_rows // ranks)
    columns = -(-width // ranks) if placement == "columns" else width
    arrays = 2 if memory.expert_dim else 1  # input rows are a table of their own
    draws = options.ranks * options.tokens_per_rank * options.accumulate * memory.num_slots
    draws *= len(config.parsed_insertions) // tables
    touched = tables * expected_distinct(draws, memory.table_rows) / (ranks if placement == "rows" else 1)
    return TableShare(
        numbers=tables * rows * columns,
        numbered_rows=tables * rows * arrays,
        touched_numbers=touched * columns,
        touched_rows=touched * arrays,
    )


def table_parts(config: ModelConfig, options: PlanOptions, placement: Placement) -> list[MemoryPart]:
    """Weights, gradients and optimiser state of all tables on a rank."""
    share, size = table_share(config, options, placement), TABLE_BYTES[options.table_dtype]
    gradient = share.numbers * size
    if options.table_optimizer != "adamw":
        gradient = round(share.touched_numbers * size + 8 * share.touched_rows)
    state = {
        "adamw": 2 * size * share.numbers,
        "lazy_adamw": 8 * share.numbers + 4 * share.numbered_rows,
        "row_adagrad": 8 * share.numbered_rows,
    }[options.table_optimizer]
    return [
        MemoryPart("table weights", share.numbers * size),
        MemoryPart("table gradients", gradient),
        MemoryPart("table optimiser", state),
    ]


def num_tables(config: ModelConfig) -> int:
    """Tables of the model: one a memory layer, or one for all."""
    return len(config.parsed_insertions) if require_memory(config).table == "own" else 1


def dense_parameters(config: ModelConfig) -> int:
    """All that is no table."""
    memory = require_memory(config)
    width = memory.value_dim + memory.expert_dim
    return count(config).total_with_embeddings - num_tables(config) * memory.table_rows * width


def require_memory(config: ModelConfig) -> MemoryConfig:
    """The memory layers of a model that has them.

    Raises:
        ValueError: it has none.
    """
    if config.memory is None:
        raise ValueError("memory must not be None: a model without memory layers has no table to place")
    return config.memory


def _dense_parts(config: ModelConfig, options: PlanOptions) -> list[MemoryPart]:
    dense = dense_parameters(config)
    is_cut = options.dense == "fsdp" and options.ranks > 1
    shard = dense_share(config, options.ranks) if is_cut else dense
    copies = (8 * dense if is_cut else 0) + (2 * dense if options.dtype == "bf16" else 0)
    return [
        MemoryPart("dense weights", 4 * shard),
        MemoryPart("dense gradients", 4 * shard),
        MemoryPart("dense optimiser", 8 * shard),
        MemoryPart("dense copies", copies),
    ]
