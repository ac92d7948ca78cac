"""The processes of a run: who this one is, and what all of them do together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ultramem.config import ParallelConfig
from ultramem.graph.moe import MoE
from ultramem.graph.table_shard import TableShard
from ultramem.ops.exchange import ALL_REDUCE, Way
from ultramem.runtime.distributed.lost_rank import LostRankError, is_loss, reason
from ultramem.runtime.distributed.meeting import Meeting, meet

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a run. One process alone is `ALONE`, where every method does nothing or its own part."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    mesh: DeviceMesh | None = None
    """(table copies, ranks that share a table); None where there is one process."""
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(table_placement="replicate"))

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.rank == 0

    @property
    def shares(self) -> bool:
        """Whether tables are cut."""
        return self.mesh is not None and self.parallel.table_placement in ("rows", "columns")

    def table_shard(self) -> TableShard | None:
        """This rank's part of the tables; None: all of them.

        Raises:
            ValueError: the placement is still "auto".
        """
        placement, pool = self.parallel.table_placement, self.parallel.pool
        if self.mesh is None or placement == "replicate":
            return None
        if placement == "auto" or pool == "auto":
            raise ValueError(f"table_placement and pool must be chosen before tables are made, got {placement}, {pool}")
        return TableShard(
            placement=placement,
            mesh=self.mesh,
            deduplicate=self.parallel.deduplicate,
            pool=pool,
            exchange_dtype=torch.bfloat16 if self.parallel.exchange_dtype == "bfloat16" else None,
        )

    def expert_shard(self) -> TableShard | None:
        """The ranks over which experts are spread; None: all have all."""
        if self.mesh is None or not self.parallel.expert_parallel:
            return None
        return TableShard(placement="rows", mesh=self.mesh)

    def part_of(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch that all ranks have."""
        return batch.chunk(self.size)[self.rank] if self.size > 1 else batch

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any rank has, of each of as many numbers as all ranks have."""
        if self.size == 1 or not numbers:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)  # on the CPU: gloo is there whatever devices talk by
        held = sys.getrefcount(found)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        # The collective's thread takes Python's lock to let go of the tensor. An AOTInductor package keeps that lock
        # while it runs, and would wait forever for a collective of its own on a thread that waits for the lock.
        end = time.monotonic() + _LET_GO_S
        while time.monotonic() < end:
            if found._use_count() == 1 and sys.getrefcount(found) <= held:  # type: ignore[attr-defined]  # no stub
                break
            time.sleep(0)
        return [int(each) for each in found.tolist()]

    def as_main_has(self, numbers: Sequence[int]) -> list[int]:
        """What the main rank has, of as many numbers of at least 0 as all ranks have."""
        return self.largest(numbers if self.is_main else [-1] * len(numbers))

    def on_main(self, work: Callable[[], T]) -> T | None:
        """What the main rank's `work` returns, there; None elsewhere, once it has ended. Its error is everybody's.

        Raises:
            Exception: what `work` raised, where it was raised; elsewhere the same type, if it is a built-in one.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as raised:  # everybody must hear of it
                if is_loss(raised):
                    raise
                error = raised
        heard = [None if error is None else (type(error).__name__, str(error))]
        dist.broadcast_object_list(heard)
        if error is not None:
            raise error
        if heard[0] is not None:
            name, text = heard[0]
            raise _ERRORS.get(name, RuntimeError)(text)
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def balance_together(model: nn.Module, ranks: Ranks) -> None:
    """Have mixtures of experts balance the choices of all ranks' tokens."""
    if ranks.size > 1:
        assert dist.group.WORLD is not None
        for module in model.modules():
            if isinstance(module, MoE):
                module.batch_ranks = Way(ALL_REDUCE, dist.group.WORLD.group_name, ranks.size)


_LET_GO_S = 10.0


_ERRORS: dict[str, type[Exception]] = {
    each.__name__: each
    for each in (
        ValueError,
        OSError,
        FileExistsError,
        FileNotFoundError,
        IsADirectoryError,
        PermissionError,
        ImportError,
    )
}

ALONE = Ranks()


@contextmanager
def join_ranks(
    parallel: ParallelConfig, device: torch.device | str = "cpu", meeting: Meeting | None = None
) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or this process alone.

    Args:
        parallel: how a run is spread over them.
        device: "cuda" becomes the device of this rank on its node.
        meeting: where the ranks have met; None: they meet now.

    Raises:
        ValueError: table_copies does not divide the ranks, or there is no device for this rank.
        LostRankError: in here, a collective failed or took longer than `parallel.timeout_s`.
    """
    meeting = meeting or meet(parallel.timeout_s)
    if meeting is None:
        yield Ranks(device=torch.device(device))
        return
    size, rank = meeting.size, meeting.rank
    if size % parallel.table_copies:
        raise ValueError(f"table_copies must divide the {size} ranks, got {parallel.table_copies}")
    device = torch.device(device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"device: rank {local} of this node needs a GPU, there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    copies = parallel.table_copies
    try:
        dist.init_process_group(
            backend, store=meeting.store, rank=rank, world_size=size, timeout=timedelta(seconds=parallel.timeout_s)
        )
        mesh = init_device_mesh(device.type, (copies, size // copies), mesh_dim_names=("copies", "shards"))
        yield Ranks(rank=rank, size=size, device=device, mesh=mesh, parallel=parallel)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise LostRankError(f"rank {rank} of {size}: {reason(error)}") from error
    dist.destroy_process_group()
