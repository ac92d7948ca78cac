"""Two-phase top-k over a grid of Tucker scores: UltraMem's TDQKR with multi-core scoring.

Shapes: T tokens, H heads, R ranks, N the side of the grid, C cores, K kept slots.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ultramem.ops import _checks as checks
from ultramem.ops._registration import accumulation_dtype, opaque_op, traceable_op
from ultramem.ops._top_k import pack, top_addresses, unpack_addresses
from ultramem.ops.implementation import runs_native, runs_triton
from ultramem.ops.product_topk import TopK, require_k

Candidates = Literal["one_tailed", "two_tailed"]
CANDIDATES: tuple[Candidates, ...] = ("one_tailed", "two_tailed")

# Rows and columns of each tail, as a share of k: two grids of 0.71k x 0.71k hold as many cells as one of k x k.
TAIL_SHARE = 0.71


def tail_length(k: int) -> int:
    """Rows (and columns) that two-tailed selection takes from each end."""
    return math.ceil(TAIL_SHARE * k)


def tucker_topk_reference(
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    u_HR: Tensor,
    t_HR: Tensor,
    k: int,
    *,
    candidates: Candidates = "one_tailed",
) -> TopK:
    """The oracle: the whole grid of scores, masked to the candidates, sorted."""
    t, h, _, n = row_scores_THRN.shape
    with torch.no_grad():
        a_THN = torch.einsum("hr,thrn->thn", u_HR, row_scores_THRN)
        b_THN = torch.einsum("hr,thrn->thn", t_HR, col_scores_THRN)
        if candidates == "one_tailed":
            candidate_THNN = _largest(a_THN, k).unsqueeze(-1) & _largest(b_THN, k).unsqueeze(-2)
        else:
            s = tail_length(k)
            high_THNN = _largest(a_THN, s).unsqueeze(-1) & _largest(b_THN, s).unsqueeze(-2)
            low_THNN = _largest(-a_THN, s).unsqueeze(-1) & _largest(-b_THN, s).unsqueeze(-2)
            candidate_THNN = high_THNN | low_THNN
        grid_THNN = torch.einsum("thri,hrs,thsj->thij", row_scores_THRN, cores_HCRR.sum(1), col_scores_THRN)
        grid_THNN = grid_THNN.masked_fill(~candidate_THNN, -torch.inf)
        addresses_THK = grid_THNN.reshape(t, h, n * n).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return TopK(_kept_scores(row_scores_THRN, col_scores_THRN, cores_HCRR, addresses_THK), addresses_THK)


def _largest(scores_THN: Tensor, k: int) -> Tensor:
    """Mask [T,H,N] of the k largest; of equal scores the lower position."""
    position = scores_THN.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores_THN, dtype=torch.bool).scatter(-1, position, True)


def _kept_scores(row_THRN: Tensor, col_THRN: Tensor, cores_HCRR: Tensor, addresses_THK: Tensor) -> Tensor:
    """Scores [T,H,K,C] of the kept slots under each core."""
    row_THRK, col_THRK = _gather_sides(row_THRN, col_THRN, addresses_THK)
    return torch.einsum("thrk,hcrs,thsk->thkc", row_THRK, cores_HCRR, col_THRK)


def _gather_sides(row_THRN: Tensor, col_THRN: Tensor, addresses_THK: Tensor) -> tuple[Tensor, Tensor]:
    t, h, r, n = row_THRN.shape
    shape = (t, h, r, addresses_THK.shape[-1])
    row = (addresses_THK // n).unsqueeze(2).expand(shape)
    col = (addresses_THK % n).unsqueeze(2).expand(shape)
    return row_THRN.gather(-1, row), col_THRN.gather(-1, col)


@traceable_op("ultramem::tucker_topk")
def _tucker_topk(
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    u_HR: Tensor,
    t_HR: Tensor,
    k: int,
    candidates: str,
) -> tuple[Tensor, Tensor]:
    if runs_triton(row_scores_THRN):
        from ultramem.ops.triton import select

        return select.tucker_topk(row_scores_THRN, col_scores_THRN, cores_HCRR, u_HR, t_HR, k, candidates)
    if runs_native(row_scores_THRN):
        weights = [x.to(accumulation_dtype(row_scores_THRN.dtype)) for x in (cores_HCRR, u_HR, t_HR)]
        two_tails = candidates == "two_tailed"
        top: tuple[Tensor, Tensor] = torch.ops.ultramem_native.tucker_topk(
            row_scores_THRN, col_scores_THRN, *weights, k, tail_length(k) if two_tails else k, two_tails
        )
        return top
    return _tucker_topk_aten(row_scores_THRN, col_scores_THRN, cores_HCRR, u_HR, t_HR, k, candidates)


def _tucker_topk_aten(
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    u_HR: Tensor,
    t_HR: Tensor,
    k: int,
    candidates: str,
) -> tuple[Tensor, Tensor]:
    n = row_scores_THRN.shape[-1]
    dtype = accumulation_dtype(row_scores_THRN.dtype)
    row_THRN, col_THRN, cores_HCRR = row_scores_THRN.to(dtype), col_scores_THRN.to(dtype), cores_HCRR.to(dtype)
    core_HRR = cores_HCRR.sum(1)
    a_THN = (row_THRN * u_HR.to(dtype).unsqueeze(-1)).sum(2)
    b_THN = (col_THRN * t_HR.to(dtype).unsqueeze(-1)).sum(2)
    position = torch.arange(n, device=a_THN.device)

    def grid(row_THS: Tensor, col_THS: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and addresses [T,H,S,S] of the cells where the given rows and columns cross."""
        t, h, s = row_THS.shape
        shape = (t, h, row_THRN.shape[2], s)
        row_THRS = row_THRN.gather(-1, row_THS.unsqueeze(2).expand(shape))
        col_THRS = col_THRN.gather(-1, col_THS.unsqueeze(2).expand(shape))
        left_THRS = (core_HRR.unsqueeze(-1) * row_THRS.unsqueeze(3)).sum(2)
        cell_THSS = (left_THRS.unsqueeze(-1) * col_THRS.unsqueeze(-2)).sum(2)
        return cell_THSS, row_THS.unsqueeze(-1) * n + col_THS.unsqueeze(-2)

    if candidates == "one_tailed":
        row_THS = top_addresses(a_THN, position, k).sort(-1).values
        col_THS = top_addresses(b_THN, position, k).sort(-1).values
        cell_THSS, address_THSS = grid(row_THS, col_THS)
        addresses_THK = top_addresses(cell_THSS.flatten(2), address_THSS.flatten(2), k)
    else:
        addresses_THK = _two_tailed(a_THN, b_THN, position, k, grid)
    scores_THKC = _kept_scores(row_THRN, col_THRN, cores_HCRR, addresses_THK)
    return scores_THKC.to(row_scores_THRN.dtype), addresses_THK


def _two_tailed(a_THN: Tensor, b_THN: Tensor, position: Tensor, k: int, grid: Any) -> Tensor:
    """Both ends of each side: high rows with high columns, low rows with low columns."""
    s = tail_length(k)
    row_high = top_addresses(a_THN, position, s).sort(-1).values
    col_high = top_addresses(b_THN, position, s).sort(-1).values
    row_low = top_addresses(-a_THN, position, s).sort(-1).values
    col_low = top_addresses(-b_THN, position, s).sort(-1).values
    cell_high, address_high = grid(row_high, col_high)
    cell_low, address_low = grid(row_low, col_low)
    # With few rows the two ends overlap; a cell that both grids hold counts once.
    row_twice = (row_low.unsqueeze(-1) == row_high.unsqueeze(-2)).any(-1)
    col_twice = (col_low.unsqueeze(-1) == col_high.unsqueeze(-2)).any(-1)
    cell_low = cell_low.masked_fill(row_twice.unsqueeze(-1) & col_twice.unsqueeze(-2), -torch.inf)
    cell = torch.cat([cell_high.flatten(2), cell_low.flatten(2)], -1)
    address = torch.cat([address_high.flatten(2), address_low.flatten(2)], -1)
    if cell.dtype == torch.float64:  # the stable sort wants ascending addresses
        address, order = address.sort(-1)
        cell = cell.gather(-1, order)
        return top_addresses(cell, address, k)
    return unpack_addresses(pack(cell, address).topk(k, dim=-1).values)


@opaque_op("ultramem::tucker_topk_backward")
def _tucker_topk_backward(
    grad_scores_THKC: Tensor,
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    addresses_THK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(row_scores_THRN):
        from ultramem.ops.triton import select_backward

        return select_backward.tucker_topk_backward(
            grad_scores_THKC, row_scores_THRN, col_scores_THRN, cores_HCRR, addresses_THK
        )
    if runs_native(row_scores_THRN):
        cores = cores_HCRR.to(accumulation_dtype(row_scores_THRN.dtype))
        grad_row, grad_col, grad_cores = torch.ops.ultramem_native.tucker_topk_backward(
            grad_scores_THKC, row_scores_THRN, col_scores_THRN, cores, addresses_THK
        )
        return grad_row, grad_col, grad_cores.to(cores_HCRR.dtype)
    t, h, r, n = row_scores_THRN.shape
    k = addresses_THK.shape[-1]
    dtype = accumulation_dtype(row_scores_THRN.dtype)
    grad_THKC, cores = grad_scores_THKC.to(dtype), cores_HCRR.to(dtype)
    row_THRK, col_THRK = _gather_sides(row_scores_THRN, col_scores_THRN, addresses_THK)
    row_THRK, col_THRK = row_THRK.to(dtype), col_THRK.to(dtype)
    # One core per kept slot: the cores weighted by the gradients of their scores.
    core_THKRR = torch.einsum("thkc,hcrs->thkrs", grad_THKC, cores)
    grad_row_THRK = torch.einsum("thkrs,thsk->thrk", core_THKRR, col_THRK)
    grad_col_THRK = torch.einsum("thkrs,thrk->thsk", core_THKRR, row_THRK)
    grad_cores = torch.einsum("thkc,thrk,thsk->hcrs", grad_THKC, row_THRK, col_THRK)
    row_index = (addresses_THK // n).unsqueeze(2).expand(t, h, r, k)
    col_index = (addresses_THK % n).unsqueeze(2).expand(t, h, r, k)
    zeros = grad_row_THRK.new_zeros(t, h, r, n)
    return (
        zeros.scatter_add(-1, row_index, grad_row_THRK).to(row_scores_THRN.dtype),
        zeros.scatter_add(-1, col_index, grad_col_THRK).to(col_scores_THRN.dtype),
        grad_cores.to(cores_HCRR.dtype),
    )


@_tucker_topk_backward.register_fake
def _(
    grad_scores_THKC: Tensor,
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    addresses_THK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        row_scores_THRN.new_empty(row_scores_THRN.shape),
        col_scores_THRN.new_empty(col_scores_THRN.shape),
        cores_HCRR.new_empty(cores_HCRR.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    row, col, cores, *_ = inputs
    ctx.save_for_backward(row, col, cores, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_scores_THKC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    row, col, cores, addresses_THK = ctx.saved_tensors
    grads = _tucker_topk_backward(grad_scores_THKC.contiguous(), row, col, cores, addresses_THK)
    return (*grads, None, None, None, None)


_tucker_topk.register_autograd(_backward, setup_context=_setup_context)


def tucker_topk(
    row_scores_THRN: Tensor,
    col_scores_THRN: Tensor,
    cores_HCRR: Tensor,
    u_HR: Tensor,
    t_HR: Tensor,
    k: int,
    *,
    candidates: Candidates = "one_tailed",
) -> TopK:
    """Keep k cells of the grid `row[:,i]^T core col[:,j]`, per token and head (UltraMem paper, eq 4-10 and 16-17).

    With (u, t) the leading singular pair of the summed core, `a = u^T row` and `b = t^T col` choose the candidates;
    these are scored by the summed core exactly, and the k best are kept. Selection carries no gradient; the kept
    scores do, into both sides and into the cores.

    Args:
        row_scores_THRN: [T,H,R,N], float32, bfloat16, float16 or float64; N at most 65536.
        col_scores_THRN: the same shape, dtype and device.
        cores_HCRR: [H,C,R,R], any of these dtypes; selection uses their sum over C.
        u_HR: [H,R], left singular vectors; no gradient.
        t_HR: [H,R], right singular vectors; no gradient.
        k: slots to keep, 1 to N.
        candidates: "one_tailed": the k largest of a and of b, crossed (the paper's rule). "two_tailed": the
            ceil(0.71 k) largest of each crossed, and the ceil(0.71 k) smallest of each crossed; the same under
            (u, t) -> (-u, -t).

    Returns:
        TopK: scores [T,H,K,C] in the dtype of the row scores (added in float32), one per core, best sum first;
        addresses [T,H,K] int64, row * N + col. Of equal scores the lower position is kept and comes first.

    Raises:
        TypeError: a dtype that is not accepted, or a k that is not an int.
        ValueError: rank, shape or device differ, k is not in 1..N, or candidates is unknown.
    """
    checks.require_tensor("row_scores_THRN", row_scores_THRN, ndim=4, shape="[T,H,R,N]")
    checks.require_tensor("col_scores_THRN", col_scores_THRN, ndim=4, shape="[T,H,R,N]")
    checks.require_tensor("cores_HCRR", cores_HCRR, ndim=4, shape="[H,C,R,R]")
    for name, tensor in (("row_scores_THRN", row_scores_THRN), ("cores_HCRR", cores_HCRR)):
        checks.require_floating(name, tensor)
    checks.require_shape("col_scores_THRN", col_scores_THRN, tuple(row_scores_THRN.shape), "that of row_scores_THRN")
    checks.require_same_dtype(row_scores_THRN=row_scores_THRN, col_scores_THRN=col_scores_THRN)
    _, h, r, n = row_scores_THRN.shape
    checks.require_positive("the number of cores", cores_HCRR.shape[1])
    checks.require_shape("cores_HCRR", cores_HCRR, (h, cores_HCRR.shape[1], r, r), "[H,C,R,R]")
    for name, vector in (("u_HR", u_HR), ("t_HR", t_HR)):
        checks.require_tensor(name, vector, ndim=2, shape="[H,R]")
        checks.require_floating(name, vector)
        checks.require_shape(name, vector, (h, r), "[H,R]")
    checks.require_same_device(
        row_scores_THRN=row_scores_THRN, col_scores_THRN=col_scores_THRN, cores_HCRR=cores_HCRR, u_HR=u_HR, t_HR=t_HR
    )
    require_k(k, n=n)
    if candidates not in CANDIDATES:
        raise ValueError(f"candidates must be one of {', '.join(CANDIDATES)}, got {candidates!r}")
    # The kernels read contiguous memory; u and t are detached so that no graph is kept for them.
    return TopK(
        *_tucker_topk(
            row_scores_THRN.contiguous(),
            col_scores_THRN.contiguous(),
            cores_HCRR.contiguous(),
            u_HR.detach().contiguous(),
            t_HR.detach().contiguous(),
            k,
            candidates,
        )
    )
