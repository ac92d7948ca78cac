"""Gradients of a step, added up over the ranks whose tokens they come from, and clipped by their global norm.

Every rank's loss is its share of the mean, so gradients add up. Those of a cut table, or of experts on one rank, have
been added up on the way back of the exchange; copies, and all that is whole on every rank, are added up here.

Shapes: N rows, D columns, U touched rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultramem.graph.sharded_module import parts_of
from ultramem.ops.exchange import ALL_GATHER, Way, exchange
from ultramem.optim import clip_grad_norm_
from ultramem.optim.sparse_gradient import coalesced
from ultramem.runtime.distributed.ranks import Ranks

BUCKET_BYTES = 32 * 2**20


@torch.no_grad()
def reduce_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Add up over ranks what each of them found for the same weights."""
    if ranks.size == 1:
        return
    assert ranks.mesh is not None
    cut = _cut_parameters(model)
    everywhere = dist.group.WORLD
    assert everywhere is not None
    dense: list[Tensor] = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(parameter, DTensor):  # FSDP has done it
            continue
        group = ranks.mesh.get_group("copies") if id(parameter) in cut else everywhere
        if group.size() == 1:
            continue
        if gradient is None:
            raise ValueError("a weight without a gradient on this rank may have one on others; every rank must use all")
        if gradient.layout == torch.sparse_coo:
            parameter.grad = _added_up(gradient, group)
        elif id(parameter) in cut:
            dist.all_reduce(gradient, group=group)
        else:
            dense.append(gradient)
    for bucket in _buckets(dense):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def clip_gradients(model: nn.Module, ranks: Ranks, max_norm: float, sums: Tensor) -> Tensor:
    """Scale all gradients by the global norm, as `clip_grad_norm_`; returns that norm.

    Args:
        model: whose gradients were reduced.
        ranks: of the run.
        max_norm: the largest 2-norm; infinity only measures.
        sums: figures [F] of this rank, which become those of all ranks, in place, in the same message.
    """
    cut = _cut_parameters(model)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]

    def combine(norms: Sequence[Tensor]) -> Tensor:
        whole = torch.zeros((), dtype=torch.float64, device=sums.device)
        parts = torch.zeros_like(whole)
        for parameter, norm in zip(parameters, norms, strict=True):
            square = norm.to(sums.device, torch.float64).square()
            if id(parameter) in cut:
                parts += square / ranks.parallel.table_copies
            elif isinstance(parameter, DTensor):
                parts += square
            else:
                whole += square
        message = ranks.add_up(torch.cat([sums.double(), parts.unsqueeze(0)]))
        sums.copy_(message[:-1])
        return (whole + message[-1]).sqrt()

    return clip_grad_norm_(parameters, max_norm, combine=combine if ranks.size > 1 else None)


def _cut_parameters(model: nn.Module) -> set[int]:
    return {id(part.parameter) for part in parts_of(model).values()}


def _buckets(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one type, up to a few megabytes at a time."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if bucket and (held + size > BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += size
    if bucket:
        yield bucket


def _added_up(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of sparse gradients [N,D], each of its own touched rows."""
    gradient = coalesced(gradient)
    rows_U, values_UD = gradient._indices()[0], gradient._values()
    gather = Way(ALL_GATHER, group.group_name, group.size())
    sizes = exchange(torch.tensor([len(rows_U)], device=rows_U.device), gather).tolist()
    most = max(sizes)
    all_rows, all_values = (exchange(_padded(tensor, most), gather) for tensor in (rows_U, values_UD))
    kept = torch.cat([torch.arange(size, device=rows_U.device) + most * i for i, size in enumerate(sizes)])
    added = torch.sparse_coo_tensor(
        all_rows[kept].unsqueeze(0), all_values[kept], gradient.shape, check_invariants=False
    )
    return added.coalesce()


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
