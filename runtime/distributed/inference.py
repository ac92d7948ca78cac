"""Ranks that run a trained model together: all have the same tokens and dense weights, each a part of every table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from ultramem.config import ModelConfig, ParallelConfig
from ultramem.graph.table_shard import Placement, TableShard
from ultramem.runtime.distributed.ranks import Ranks, join_ranks

PLACEMENTS = ("rows", "columns", "auto")
MODEL_ENGINES = ("eager", "compile")
"""What runs a model of which each rank has a part."""


@contextmanager
def inference_ranks(model: ModelConfig, table_placement: str | None) -> Iterator[tuple[Ranks, TableShard | None, str]]:
    """The ranks that `torchrun` started, this one's part of the tables, and why they are cut so; or this process alone.

    Args:
        model: to be run.
        table_placement: "rows", "columns" or "auto"; None: "auto" where there are several ranks.

    Raises:
        ValueError: there are several ranks for a model without tables, or one rank for a placement.
        LostRankError: as `join_ranks`.
    """
    with join_ranks(ParallelConfig()) as ranks:
        if ranks.size == 1:
            if table_placement is not None:
                raise ValueError(
                    f"table_placement needs several ranks (torchrun --nproc-per-node N -m ultramem ...), got "
                    f"{table_placement!r} in one process"
                )
            yield ranks, None, ""
            return
        placement, reason = _choose(model, ranks.size, table_placement or "auto")
        parallel = replace(ranks.parallel, table_placement=placement, pool="home")
        ranks = replace(ranks, parallel=parallel)
        shard = ranks.table_shard()
        assert shard is not None
        yield ranks, replace(shard, tokens="same"), reason


def require_model_engine(ranks: Ranks, engine: str, *, exports: bool = True) -> None:
    """Raise unless an engine can run a model of which each rank has a part; `exports`: or an export of parts.

    Raises:
        ValueError: it can't.
    """
    accepted = (*MODEL_ENGINES, "aoti") if exports else MODEL_ENGINES
    if ranks.size > 1 and engine not in accepted:
        raise ValueError(f"engine must be one of {', '.join(accepted)} where {ranks.size} ranks share, got {engine!r}")


def _choose(model: ModelConfig, size: int, placement: str) -> tuple[Placement, str]:
    """By what a rank sends for a token; and the reason in words."""
    memory = model.memory
    if memory is None:
        raise ValueError(f"a model that {size} ranks share must have value tables, this one has no memory layers")
    if placement not in PLACEMENTS:
        raise ValueError(f"table_placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    width = memory.expansion * memory.value_dim
    by_rows, by_columns = 2 * width * (size - 1) / size, width * (size - 1) / size
    sent = f"a rank sends {by_rows:,.0f} numbers a token and layer by rows, {by_columns:,.0f} by columns"
    if placement != "auto":
        return cast(Placement, placement), f"tables in {size} parts by {placement}: as asked for; {sent}"
    odd = [f"{name} {wide}" for name, wide in _widths(model) if wide % size]
    if odd:
        return "rows", f"tables in {size} parts by rows: {odd[0]} can't be cut into {size} equal parts"
    return "columns", f"tables in {size} parts by columns: {sent}"


def _widths(model: ModelConfig) -> list[tuple[str, int]]:
    assert model.memory is not None
    return [("value_dim", model.memory.value_dim), ("expert_dim", model.memory.expert_dim)]
