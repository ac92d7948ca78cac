"""Collectives that are started in one place and awaited in another, in eager mode and in compiled graphs.

PyTorch's functional collectives wait at once where a compiler traces, so what stands between start and arrival could
not run beside the exchange. Here the wait is an operator of its own, and the gradient travels the same way back: it is
started where the rows arrived and awaited where they were sent.

The operators are PyTorch's, registered by `torch.distributed._functional_collectives`. It takes a tenth of a second to
import, so whoever has a group to exchange with imports it: `ultramem.graph.TableShard` does.

Shapes: P ranks of the group, R elements of the first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all_to_all", "all_gather", "reduce_scatter", "all_reduce"
_REVERSE = {ALL_TO_ALL: ALL_TO_ALL, ALL_GATHER: REDUCE_SCATTER, REDUCE_SCATTER: ALL_GATHER, ALL_REDUCE: ALL_REDUCE}


class Way(NamedTuple):
    """Which collective, and between whom."""

    kind: str
    group: str
    """Name of the process group."""
    size: int
    """Its ranks P."""
    receive: Sequence[int] | None = None
    """Of an all-to-all: rows that each rank sends here; None: as many of each."""
    send: Sequence[int] | None = None
    """Rows that go from here to each rank."""

    def back(self) -> Way:
        """The way of the gradient."""
        return Way(_REVERSE[self.kind], self.group, self.size, self.send, self.receive)


class Flight(NamedTuple):
    """A tensor on its way."""

    coming: Tensor
    """Nobody may look at it before `arrive`."""
    sent: Tensor
    """What left, for the gradient to come back to."""
    way: Way


def start(tensor: Tensor, way: Way) -> Flight:
    """Start the exchange of `tensor` along its first dimension; its gradient comes back in `arrive`'s backward.

    An all-gather [R,...] gives [P*R,...] in the order of ranks. A reduce-scatter [P*R,...] gives the sum of every
    rank's part [R,...]; an all-reduce that of [R,...]. An all-to-all sends `send[p]` rows to rank p and receives
    `receive[p]` from it.
    """
    sent = tensor.contiguous()
    if _has_gradient(sent, way):
        sent = _Depart.apply(sent)
    return Flight(_launch(sent.detach(), way), sent, way)


def arrive(flight: Flight) -> Tensor:
    """Wait for the exchange and return what came."""
    if not _has_gradient(flight.sent, flight.way):
        return _wait(flight.coming)
    arrived: Tensor = _Arrive.apply(flight.coming, flight.sent, *flight.way)
    return arrived


def exchange(tensor: Tensor, way: Way) -> Tensor:
    """Start and wait at once."""
    return arrive(start(tensor, way))


def _has_gradient(tensor: Tensor, way: Way) -> bool:
    return tensor.is_floating_point() and way.kind != ALL_REDUCE


def _launch(tensor: Tensor, way: Way) -> Tensor:
    collectives: Any = torch.ops._c10d_functional
    if way.kind == ALL_GATHER:
        launched: Tensor = collectives.all_gather_into_tensor(tensor, way.size, way.group)
    elif way.kind == REDUCE_SCATTER:
        launched = collectives.reduce_scatter_tensor(tensor, "sum", way.size, way.group)
    elif way.kind == ALL_REDUCE:
        launched = collectives.all_reduce(tensor, "sum", way.group)
    else:
        equal = [tensor.shape[0] // way.size] * way.size
        launched = collectives.all_to_all_single(tensor, way.receive or equal, way.send or equal, way.group)
    return launched


def _wait(tensor: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return waited


class _Depart(torch.autograd.Function):
    """Nothing, where a gradient is awaited that `_Arrive` sent back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _wait(grad)


class _Arrive(torch.autograd.Function):
    """Wait; the gradient of what came is sent back, and not awaited."""

    @staticmethod
    def forward(ctx: Any, coming: Tensor, sent: Tensor, *way: Any) -> Tensor:
        ctx.way = Way(*way).back()
        return _wait(coming)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _launch(grad.contiguous(), ctx.way), *(None,) * len(Way._fields)


__all__ = ["ALL_GATHER", "ALL_REDUCE", "ALL_TO_ALL", "REDUCE_SCATTER", "Flight", "Way", "arrive", "exchange", "start"]
