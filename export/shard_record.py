"""Which part of a model's tables an export has, and where it can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.table_shard import TableShard
from ultramem.graph.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePart:
    """Of one table: from the first row or column to the one after the last."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    of: tuple[int, int]
    """Rows and columns of the whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """The part of one rank."""

    rank: int
    ranks: int
    placement: str
    group: str
    """Name of the process group that the graph talks to: that of all ranks, as PyTorch calls the first it makes."""
    tables: dict[str, TablePart]
    """By the name of the weight."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks}, by {self.placement}"


def record_of(model: Transformer, shard: TableShard) -> ShardRecord:
    """What a model in parts has of each table."""
    tables = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedValueTable):
            for name, (height, width) in module.whole_shapes.items():
                rows, columns = shard.slices(height, width)
                part = TablePart(
                    rows=(rows.start, rows.stop), columns=(columns.start, columns.stop), of=(height, width)
                )
                tables[f"{prefix}.{name}"] = part
    return ShardRecord(rank=shard.rank, ranks=shard.ranks, placement=shard.placement, group=shard.group, tables=tables)


def read_record(document: dict[str, Any] | None) -> ShardRecord | None:
    """The record in a manifest."""
    if document is None:
        return None
    tables = {
        name: TablePart(**{field: (int(first), int(end)) for field, (first, end) in part.items()})
        for name, part in document["tables"].items()
    }
    return ShardRecord(**{**document, "tables": tables})


def part_folder(folder: Path, rank: int, ranks: int) -> Path:
    """Where the part of a rank stands in an export of parts."""
    return folder / f"rank-{rank}-of-{ranks}"


def require_rank(folder: Path, record: ShardRecord | None) -> None:
    """Raise unless this process can run an export: one of a part needs its rank in a group of as many.

    Raises:
        ValueError: it can't.
    """
    if record is None:
        return
    here = "none"
    if dist.is_initialized():
        here = f"rank {dist.get_rank()} of {dist.get_world_size()}"
        name = dist.group.WORLD.group_name if dist.group.WORLD is not None else None
        if (dist.get_rank(), dist.get_world_size(), name) == (record.rank, record.ranks, record.group):
            return
        here += f", named {name!r}"
    raise ValueError(
        f"{folder} is the part of rank {record.rank} of {record.ranks}: it runs in that rank of a process group named "
        f"{record.group!r} (torch.distributed.init_process_group), got {here}"
    )
