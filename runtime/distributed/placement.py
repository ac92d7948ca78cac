"""Where the tables of a run go, if that was left open."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from ultramem.config import ModelConfig, TrainConfig
from ultramem.runtime.distributed.ranks import Ranks
from ultramem.runtime.plan.for_run import settle_placement
from ultramem.runtime.train_step import autocast_dtype


def choose(ranks: Ranks, model: ModelConfig, train: TrainConfig) -> tuple[Ranks, list[str]]:
    """The ranks with a placement that is not "auto" any more, and the reasons in words."""
    parallel = ranks.parallel
    if ranks.size == 1 or model.memory is None:
        return replace(ranks, parallel=replace(parallel, table_placement="replicate")), []
    assert ranks.device is not None
    parallel, reasons = settle_placement(
        model,
        train,
        parallel,
        ranks=ranks.size,
        memory_bytes=_least_memory(ranks),
        half=autocast_dtype(train, ranks.device.type) is not None,
    )
    return replace(ranks, parallel=parallel), reasons


def _least_memory(ranks: Ranks) -> int:
    """Bytes that the rank with the least has for itself: all of its GPU, or its share of the node's memory."""
    assert ranks.device is not None
    if ranks.device.type == "cuda":
        own = torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        own = total // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    least = torch.tensor(own, dtype=torch.int64, device=ranks.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)
