"""Dense weights cut by FSDP2, around a loss that is compiled as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from ultramem.graph.sharded_module import parts_of
from ultramem.graph.value_table import ValueTable
from ultramem.runtime.distributed.ranks import Ranks

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cut_dimension(shape: Sequence[int], ranks: int) -> int:
    """Along which FSDP cuts a weight: the first that divides by the ranks, and the very first where none does.

    FSDP pads an uneven first dimension to as many as there are ranks, and so keys of two heads to the keys of many.
    """
    return next((dim for dim, length in enumerate(shape) if length % ranks == 0), 0)


def _cut(ranks: int, weight: nn.Parameter) -> Shard:
    return Shard(cut_dimension(weight.shape, ranks))


class ShardedLoss(nn.Module):
    """`loss` of `model`, whose weights are cut over all ranks between two calls; not value tables and spread experts.

    They are one unit: gathered before the loss, kept for its backward, and cut again. A compiler then sees one graph
    of plain tensors. Gradients add up over ranks, as elsewhere, and are reduced after the last micro-batch.
    """

    def __init__(self, model: nn.Module, loss: Loss, ranks: Ranks) -> None:
        super().__init__()
        assert ranks.mesh is not None
        self.model = model
        self.loss = loss
        tables = {
            parameter
            for module in model.modules()
            if isinstance(module, ValueTable)
            for parameter in module.parameters()
        }
        tables |= {part.parameter for part in parts_of(model).values()}
        fully_shard(
            self, mesh=ranks.mesh._flatten("ranks"), ignored_params=tables, shard_placement_fn=partial(_cut, ranks.size)
        )
        unit = self._unit()
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """As `loss`."""
        return self.loss(inputs_BS, targets_BS)

    def is_last(self, last: bool) -> None:
        """Whether gradients are reduced after the next backward."""
        self._unit().set_requires_gradient_sync(last)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights are whole and plain tensors in here, on every rank."""
        self._unit().unshard()
        try:
            yield
        finally:
            self._unit().reshard()

    def _unit(self) -> FSDPModule:
        assert isinstance(self, FSDPModule)
        return self
