"""Where the tables of a run go, if that was left open."""

from __future__ import annotations

from dataclasses import replace

from ultramem.config import ModelConfig, TrainConfig
from ultramem.runtime.distributed.ranks import Ranks


def choose(ranks: Ranks, model: ModelConfig, train: TrainConfig) -> tuple[Ranks, list[str]]:
    """The ranks with a placement that is not "auto" any more, and the reasons in words."""
    parallel = ranks.parallel
    if ranks.size == 1 or model.memory is None:
        return replace(ranks, parallel=replace(parallel, table_placement="replicate")), []
    if parallel.table_placement == "auto":
        parallel = replace(parallel, table_placement="rows")
    if parallel.pool == "auto":
        parallel = replace(parallel, pool="home")
    return replace(ranks, parallel=parallel), []
