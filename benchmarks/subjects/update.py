"""Update of the table by an optimiser, from the gradients of the rows that a step touched.

Shapes: N rows, D columns, U touched rows, R checked rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.shapes import REHEARSAL, Indices, make_table
from ultramem.ops import catch_up_
from ultramem.optim import LazyAdamW, RowAdagrad, TableOptimizer

SLOTS = 32
TABLES = {"2^20 x 256": (2**20, 256), "20M x 64": (20_000_000, 64), REHEARSAL: (97, 16)}
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
CHECKED_ROWS = 64
ADAMW_GPU = Goal(text=">= 8x dense AdamW at 20 M rows", quantity="speedup", bound=8.0, against="AdamW")


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        shapes = [(t, kind) for t in (64, 1024, 16384) for kind in ("uniform", "zipf")]
        return [
            Row(
                subject="update",
                size="2^20 x 256",
                tokens=t,
                indices=kind,
                dtype="float32",
                limit_s=240,
                quick=(t, kind) == (1024, "uniform"),
            )
            for t, kind in shapes
        ]
    return [
        Row(
            subject="update",
            size="20M x 64",
            tokens=t,
            indices=kind,
            dtype="float32",
            goals=(ADAMW_GPU,),
            limit_s=120,
            device_gb=60.0,  # eleven tensors of the table's 5 GB: four optimisers with their states
            priority=3 if kind == "uniform" else 4,  # apart: there is no memory for both at a time
        )
        for t, kind in ((16384, "uniform"), (16384, "zipf"))
    ]


class Problem:
    """A table's shape, and draws of the sparse gradient of one step: touched rows once each, ascending."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.n, self.d = TABLES[row.size]
        self.t, self.device = row.tokens, device
        self.indices = Indices(row.indices, n=self.n, e=1, device=device)
        self.generator = torch.Generator(device).manual_seed(1)

    def table(self) -> nn.Parameter:
        return nn.Parameter(make_table(self.n, self.d, torch.float32, self.device))

    def draw(self) -> Tensor:
        rows_U = torch.unique(self.indices.draw(self.t, SLOTS))
        grads_UD = torch.randn(rows_U.numel(), self.d, device=self.device, generator=self.generator)
        return torch.sparse_coo_tensor(
            rows_U.unsqueeze(0), grads_UD, (self.n, self.d), is_coalesced=True, check_invariants=False
        )

    def floor(self) -> Floor:
        """Gradients in; of the touched rows weights and two moments in and out."""
        gradient = self.draw()
        touched = gradient._values().nbytes
        return Floor(read_bytes=4 * touched + gradient._indices().nbytes, write_bytes=3 * touched)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def build(row: Row, device: torch.device) -> Case:
    problem = Problem(row, device)

    def contender(role: Role, settings: str, make: Make, oracle: Make, *, dense: bool = False) -> Contender:
        """`oracle` makes the optimiser that `make`'s must equal, of a few rows in float64."""
        table = problem.table()
        optimizer = make([table])
        buffer = torch.zeros_like(table) if dense else None

        def draw() -> Tensor:
            gradient = problem.draw()
            return gradient if buffer is None else _into(buffer, gradient)

        def run(gradient: Tensor) -> None:
            table.grad = gradient
            optimizer.step()

        return Contender(
            role=role,
            settings=settings,
            draw=draw,
            run=run,
            check=lambda: check(
                problem, table, optimizer, run, lambda g: g if buffer is None else _into(buffer, g), oracle
            ),
            graphable=False,
        )

    common = {"lr": LR, "betas": BETAS, "eps": EPS}

    def dense_oracle(rows: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(rows, **common, weight_decay=DECAY)

    contenders = {
        "LazyAdamW": lambda: contender(
            "ours",
            "ultramem.optim; touched rows, equal to dense AdamW",
            lambda p: LazyAdamW(p, **common, weight_decay=DECAY),
            dense_oracle,
        ),
        "RowAdagrad": lambda: contender(
            "ours",
            "ultramem.optim; touched rows, one accumulator a row",
            lambda p: RowAdagrad(p, lr=LR, eps=EPS, weight_decay=DECAY),
            _RowAdagradOracle,
        ),
        "AdamW": lambda: contender(
            "peer",
            "torch.optim.AdamW(fused=True), dense gradient",
            lambda p: torch.optim.AdamW(p, **common, weight_decay=DECAY, fused=True),
            dense_oracle,
            dense=True,
        ),
        "SparseAdam": lambda: contender(
            "peer",
            "torch.optim.SparseAdam; rows without a gradient keep their momentum, no decay",
            lambda p: torch.optim.SparseAdam(p, **common),
            lambda p: torch.optim.SparseAdam(p, **common),
        ),
    }
    shape: dict[str, int | str] = {"rows": problem.n, "columns": problem.d, "slots": SLOTS}
    return Case(contenders=contenders, floor=problem.floor(), shape=shape)


def _into(buffer_ND: Tensor, gradient: Tensor) -> Tensor:
    return buffer_ND.zero_().index_copy_(0, gradient._indices()[0], gradient._values())


def check(
    problem: Problem,
    table: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    run: Callable[[Tensor], None],
    prepare: Callable[[Tensor], Tensor],
    oracle: Make,
) -> None:
    """Two steps: rows of the first, of the second, of both and of neither, against the oracle on those rows alone.

    An optimiser of tables treats each row by itself, so a table of a few rows is enough for the oracle.
    """
    gradients = [problem.draw(), problem.draw()]
    touched = [gradient._indices()[0] for gradient in gradients]
    half = CHECKED_ROWS // 4
    spread = torch.arange(half, device=problem.device) * (problem.n - 1) // (half - 1)
    rows_R = torch.unique(torch.cat([touched[0][:half], touched[1][-half:], spread]))
    before_RD = table.detach()[rows_R].clone()
    for gradient in gradients:
        run(prepare(gradient))
    actual_RD = table.detach()[rows_R]
    if isinstance(optimizer, TableOptimizer):
        actual_RD = catch_up_(actual_RD.clone(), optimizer.lazy_rows(table), rows_R)
    low, exact = (_stepped(before_RD.to(dtype), rows_R, gradients, oracle) for dtype in (torch.float32, torch.float64))
    require_as_exact_as_eager("updated rows", actual_RD, low, exact)


def _stepped(values_RD: Tensor, rows_R: Tensor, gradients: list[Tensor], oracle: Make) -> Tensor:
    parameter = nn.Parameter(values_RD.clone())
    optimizer = oracle([parameter])
    for gradient in gradients:
        position = torch.searchsorted(rows_R, gradient._indices()[0]).clamp_max(rows_R.numel() - 1)
        hit = (rows_R[position] == gradient._indices()[0]).nonzero().squeeze(1)
        rows, grads = position[hit], gradient._values()[hit].to(values_RD.dtype)
        if isinstance(optimizer, torch.optim.SparseAdam):
            parameter.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grads, values_RD.shape)
        else:
            parameter.grad = torch.zeros_like(values_RD).index_copy_(0, rows, grads)
        optimizer.step()
    return parameter.detach()


class _RowAdagradOracle(torch.optim.Optimizer):
    """`a += mean(g^2)`, `p <- (1 - lr w) p - lr g / (sqrt(a) + eps)` on every row."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        (self.values_RD,) = params
        self.sums_R = torch.zeros_like(self.values_RD[:, 0])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        grad_RD = self.values_RD.grad
        self.sums_R = self.sums_R + grad_RD.square().mean(1)
        scaled_RD = LR * grad_RD / (self.sums_R.sqrt() + EPS).unsqueeze(1)
        self.values_RD.mul_(1 - LR * DECAY).sub_(scaled_RD)
