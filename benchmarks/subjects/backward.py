"""Backward of the lookup: gradients of scores and of value rows.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, X = D / C columns of a core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role, UnavailableError, WrongResultError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.lookup import Inputs, Problem, gather_einsum, pool_bags, require_gathered
from benchmarks.subjects.shapes import BASE_GB, compiled, gathered_gb, table_gb
from ultramem.ops import lookup_reduce

CHECKED = 48  # rows of the table, and tokens

GPU_PEERS = Goal(text=">= 2x the best peer; bitwise repeatable (checked)", quantity="speedup", bound=2.0)
GPU_SHARE = Goal(text=">= 70 % of measured peak bandwidth", quantity="bandwidth_share", bound=0.7)


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        shapes = [("151m", t, "uniform") for t in (16, 1024, 4096)] + [
            ("151m", 1024, "zipf"),
            ("1.6b", 1024, "uniform"),
        ]
        return [
            Row(
                subject="backward",
                size=size,
                tokens=t,
                indices=indices,
                dtype="float32",
                limit_s=400,
                quick=(size, t, indices) == ("151m", 1024, "uniform"),
            )
            for size, t, indices in shapes
        ]
    shapes = [
        ("1.6b", 4096, "uniform", 1),
        ("1.6b", 16384, "zipf", 1),
        ("151m", 65536, "zipf", 6),
        ("1.6b", 1024, "uniform", 6),
    ]
    return [
        Row(
            subject="backward",
            size=size,
            tokens=t,
            indices=indices,
            dtype="bfloat16",
            limit_s=120,
            priority=priority,
            device_gb=BASE_GB + 3 * table_gb(size) + 5 * gathered_gb(size, t),  # dense gradients; several of rows
            goals=(GPU_PEERS, GPU_SHARE) if t >= 4096 and indices == "uniform" else (GPU_PEERS,),
        )
        for size, t, indices, priority in shapes
    ]


class Ready(NamedTuple):
    """After the forward: what was pooled, from which leaves, and the gradient of it."""

    pooled_TED: Tensor
    table: Tensor
    scores_TKC: Tensor
    grad_TED: Tensor
    inputs: Inputs


Forward = Callable[[Tensor, Inputs], Tensor]


def build(row: Row, device: torch.device) -> Case:
    problem = Problem(row, device)
    e, core_shape = problem.size.blocks, problem.core_table.shape

    def contender(
        role: Role, settings: str, forward: Forward, *, coalesce: bool = False, by_core: bool = False
    ) -> Contender:
        """`forward` takes the table, seen by core if `by_core`, and inputs whose scores require a gradient."""
        table = problem.core_table if by_core else problem.values_ND

        def draw() -> Ready:
            inputs, grad_TED = problem.draw(), _draw_gradient(problem)
            inputs = inputs._replace(scores_TKC=inputs.scores_TKC.requires_grad_())
            leaf = table.detach().requires_grad_()
            return Ready(forward(leaf, inputs), leaf, inputs.scores_TKC, grad_TED, inputs)

        def run(ready: Ready) -> tuple[Tensor, Tensor]:
            grad_table, grad_scores = torch.autograd.grad(
                ready.pooled_TED, (ready.table, ready.scores_TKC), ready.grad_TED
            )
            return grad_table.coalesce() if coalesce else grad_table, grad_scores

        return Contender(
            role=role, settings=settings, draw=draw, run=run, check=lambda: check(problem, forward, role, draw, run)
        )

    def ours(*, sparse: bool) -> Contender:
        settings = f"ops.lookup_reduce, AUTO; {'touched rows, each once, ascending' if sparse else 'a dense gradient'}"
        forward = partial(_ours, problem, sparse=sparse)
        return contender("ours" if sparse else "yardstick", settings, forward)

    def bag(table: Tensor, inputs: Inputs, *, sparse: bool) -> Tensor:
        if table.is_cuda and table.dtype == torch.bfloat16:
            raise UnavailableError("embedding_bag has no gradient of bfloat16 weights on CUDA")
        core_table = table if table.shape == core_shape else table.view(core_shape)  # a sparse gradient has no views
        return problem.unbag(pool_bags(core_table, problem.bags(inputs), sparse=sparse))

    def gather() -> Contender:
        require_gathered(problem)
        return contender("peer", "index, weight, einsum; dense gradient", lambda v, x: gather_einsum(v, e, *x))

    def gather_compiled() -> Contender:
        require_gathered(problem)
        pool = compiled(row, gather_einsum)
        settings = "index, weight, einsum under torch.compile; dense gradient"
        return contender("peer", settings, lambda v, x: pool(v, e, *x))

    def gather_sparse() -> Contender:
        require_gathered(problem)
        settings = "F.embedding(sparse=True), weight, einsum; gradient coalesced, as optimisers need it"
        return contender("peer", settings, partial(_embedding_einsum, e), coalesce=True)

    contenders = {
        "ultramem": lambda: ours(sparse=True),
        "ultramem, dense gradient": lambda: ours(sparse=False),
        "embedding_bag, dense": lambda: contender(
            "peer", "sparse=False; gradients of weights and of a dense table", partial(bag, sparse=False)
        ),
        "embedding_bag, sparse": lambda: contender(
            "peer",
            "sparse=True; gradient coalesced, as optimisers need it",
            partial(bag, sparse=True),
            coalesce=True,
            by_core=True,
        ),
        "embedding_bag, sparse, not coalesced": lambda: contender(
            "yardstick", "sparse=True; a row per slot, as autograd leaves it", partial(bag, sparse=True), by_core=True
        ),
        "gather + einsum": gather,
        "gather + einsum, sparse": gather_sparse,
        "gather + einsum, compiled": gather_compiled,
    }
    return Case(contenders=contenders, floor=_floor(problem), shape=problem.shape())


def _ours(problem: Problem, values_ND: Tensor, inputs: Inputs, *, sparse: bool) -> Tensor:
    return lookup_reduce(values_ND, *inputs, num_blocks=problem.size.blocks, sparse_grad=sparse)


def _embedding_einsum(num_blocks: int, values_ND: Tensor, inputs: Inputs) -> Tensor:
    """`gather_einsum` with a gather whose gradient is sparse."""
    indices_TK, scores_TKC = inputs
    n, (t, k, c) = values_ND.shape[0], scores_TKC.shape
    rows_TKCX = F.embedding(indices_TK % n, values_ND, sparse=True).view(t, k, c, -1)
    member_TKE = (indices_TK // n).unsqueeze(-1) == torch.arange(num_blocks, device=indices_TK.device)
    weights_TKEC = member_TKE.unsqueeze(-1) * scores_TKC.unsqueeze(2)
    return torch.einsum("tkec,tkcx->tecx", weights_TKEC, rows_TKCX).reshape(t, num_blocks, -1)


def _draw_gradient(problem: Problem) -> Tensor:
    shape = (problem.t, problem.size.blocks, problem.size.value_dim)
    return torch.randn(shape, device=problem.device, generator=problem.generator).to(problem.dtype)


def _floor(problem: Problem) -> Floor:
    """Touched rows in and their gradients out once each, the gradient of the output in; asked for: once a slot."""
    inputs = problem.draw()
    row_bytes = problem.size.value_dim * problem.values_ND.itemsize
    rows = torch.unique(inputs.indices_TK % problem.n).numel() * row_bytes
    slots = inputs.indices_TK.numel() * row_bytes
    small = inputs.indices_TK.nbytes + inputs.scores_TKC.nbytes
    return Floor(
        read_bytes=rows + problem.t * problem.size.blocks * row_bytes + small,
        request_bytes=rows + slots + small,
        write_bytes=rows + inputs.scores_TKC.nbytes,
        flops=4 * inputs.indices_TK.numel() * problem.size.value_dim,
    )


def check(
    problem: Problem,
    forward: Forward,
    role: Role,
    draw: Callable[[], Ready],
    run: Callable[[Ready], tuple[Tensor, Tensor]],
) -> None:
    """Gradients of some rows and of some tokens' scores against float64; ours twice, to the same bits."""
    ready = draw()
    grad_table, grad_scores = run(ready)
    indices_TK, scores_TKC = ready.inputs.indices_TK, ready.scores_TKC.detach()
    token = torch.linspace(0, problem.t - 1, min(problem.t, CHECKED), device=problem.device).long()
    row_TK = indices_TK % problem.n
    popular = torch.mode(row_TK.flatten()).values.view(1)
    rows = torch.unique(torch.cat([popular, row_TK[token].flatten()[:CHECKED]]))
    actual = _rows_of(
        grad_table.view(problem.values_ND.shape) if not grad_table.is_sparse else grad_table, rows, problem
    )
    low, exact = (
        _row_gradients(problem, indices_TK, scores_TKC.to(d), ready.grad_TED.to(d), rows)
        for d in (problem.dtype, torch.float64)
    )
    require_as_exact_as_eager("gradient of rows", actual, low, exact)
    low, exact = (
        _score_gradients(problem, indices_TK[token], ready.grad_TED[token].to(d), d)
        for d in (problem.dtype, torch.float64)
    )
    require_as_exact_as_eager("gradient of scores", grad_scores[token], low, exact)
    if role == "ours":
        again = forward(ready.table, ready.inputs)
        second_table, second_scores = run(ready._replace(pooled_TED=again))
        if not (torch.equal(_values(grad_table), _values(second_table)) and torch.equal(grad_scores, second_scores)):
            raise WrongResultError("a second backward gives other bits")


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _rows_of(gradient: Tensor, rows: Tensor, problem: Problem) -> Tensor:
    """Rows of a table's gradient [N,D], whatever its layout."""
    if not gradient.is_sparse:
        return gradient[rows]
    cores = gradient.shape[0] // problem.n
    wanted = (rows.unsqueeze(1) * cores + torch.arange(cores, device=rows.device)).flatten()
    position = torch.searchsorted(wanted, gradient._indices()[0]).clamp_max(wanted.numel() - 1)
    hit = (wanted[position] == gradient._indices()[0]).nonzero().squeeze(1)
    found = torch.zeros(wanted.numel(), gradient.shape[1], dtype=gradient.dtype, device=rows.device)
    return found.index_add(0, position[hit], gradient._values()[hit]).view(rows.numel(), -1)


def _row_gradients(problem: Problem, indices_TK: Tensor, scores_TKC: Tensor, grad_TED: Tensor, rows: Tensor) -> Tensor:
    """`sum over slots of the row: score * gradient of its block`, slot by slot [R,D]."""
    row_TK = indices_TK % problem.n
    token, slot = torch.isin(row_TK, rows).nonzero(as_tuple=True)
    block = indices_TK[token, slot] // problem.n
    weights_SC1 = scores_TKC[token, slot].unsqueeze(-1)
    cores = weights_SC1.shape[1]
    contribution = (grad_TED[token, block].unflatten(-1, (cores, -1)) * weights_SC1).flatten(1)
    position = torch.searchsorted(rows, row_TK[token, slot])
    zeros = torch.zeros(rows.numel(), contribution.shape[1], dtype=contribution.dtype, device=rows.device)
    return zeros.index_add(0, position, contribution)


def _score_gradients(problem: Problem, indices_TK: Tensor, grad_TED: Tensor, dtype: torch.dtype) -> Tensor:
    """`<row, gradient of its block>` core by core [T,K,C]."""
    t, k = indices_TK.shape
    cores = problem.size.cores
    rows = problem.values_ND[indices_TK % problem.n].to(dtype).view(t, k, cores, -1)
    block_TK = indices_TK // problem.n
    grads = grad_TED[torch.arange(t, device=block_TK.device).unsqueeze(1), block_TK].view(t, k, cores, -1)
    return (rows * grads).sum(-1)
