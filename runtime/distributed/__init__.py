"""Runs over several ranks, on PyTorch's own stack: torchrun, DeviceMesh, DTensor, FSDP2, Distributed Checkpoint."""

from ultramem.runtime.distributed.agreement import require_agreement
from ultramem.runtime.distributed.gradients import reduce_gradients
from ultramem.runtime.distributed.lost_rank import LostRankError
from ultramem.runtime.distributed.meeting import Meeting, meet
from ultramem.runtime.distributed.ranks import ALONE, Ranks, balance_together, join_ranks
from ultramem.runtime.distributed.sharded_loss import ShardedLoss

__all__ = [
    "ALONE",
    "LostRankError",
    "Meeting",
    "Ranks",
    "ShardedLoss",
    "balance_together",
    "join_ranks",
    "meet",
    "reduce_gradients",
    "require_agreement",
]
