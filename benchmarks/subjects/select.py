"""Selection: the best slots of the Tucker grid, from the scores of its sides.

Shapes: T tokens, H heads, R ranks, N side of the grid, C cores, M kept slots, K key width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role, WrongResultError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.shapes import BASE_GB, SIZES, compiled, dtype_of, size_of
from ultramem.graph.singular import leading_singular_pair
from ultramem.ops import Implementation, TopK, reference, tucker_topk, use_implementation

CHECKED_TOKENS = 2  # the oracle holds the whole grid of each
GRID_GB = 5.0  # of the oracle
GOALS = (
    Goal(text="<= 1.25x the key GEMM alone", quantity="slowdown", bound=1.25, against="key GEMM"),
    Goal(text=">= 8x eager", quantity="speedup", bound=8.0, against="plain PyTorch, eager"),
)


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        shapes = [("151m", t) for t in (1, 16, 64, 1024)] + [("680m", 64), ("1.6b", 1), ("1.6b", 64)]
        return [
            Row(
                subject="select",
                size=size,
                tokens=t,
                dtype="float32",
                limit_s=240,
                goals=GOALS,
                quick=(size, t) == ("151m", 64),
            )
            for size, t in shapes
        ]
    shapes = [("1.6b", 64), ("1.6b", 4096), ("1.6b", 1), ("1.6b", 16384), ("151m", 64), ("151m", 16384), ("680m", 4096)]
    return [
        Row(
            subject="select",
            size=size,
            tokens=t,
            dtype="bfloat16",
            goals=GOALS,
            graph=t <= 64,
            limit_s=90,
            device_gb=BASE_GB + GRID_GB + 16 * _sides_gb(size, t),
            priority=2 if number < 2 else 7,
        )
        for number, (size, t) in enumerate(shapes)
    ]


def _sides_gb(size: str, tokens: int) -> float:
    """Scores of one side [T,H,R,N] in two bytes."""
    paper = SIZES[size]
    return tokens * paper.heads * paper.rank * 2 * paper.knum * 2 / 1e9


class Sides(NamedTuple):
    """Of one call: row and column scores [T,H,R,N]."""

    row_THRN: Tensor
    col_THRN: Tensor


class Problem:
    """Cores and keys of one layer, and draws of scores and queries."""

    def __init__(self, row: Row, device: torch.device) -> None:
        size = size_of(row)
        self.t, self.dtype, self.device, self.size = row.tokens, dtype_of(row), device, size
        self.side, self.m = 2 * size.knum, size.top_m  # a grid of E = 4 blocks
        self.generator = torch.Generator(device).manual_seed(0)
        h, r = size.heads, size.rank
        self.cores_HCRR = self.normal(h, size.cores, r, r).abs()
        self.u_HR, self.t_HR = leading_singular_pair(self.cores_HCRR.sum(1))
        self.keys_2HRNK = self.normal(2, h, r, self.side, size.key_dim)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)

    def draw(self) -> Sides:
        shape = (self.t, self.size.heads, self.size.rank, self.side)
        return Sides(self.normal(*shape), self.normal(*shape))

    def select(self, sides: Sides) -> TopK:
        return tucker_topk(*sides, self.cores_HCRR, self.u_HR, self.t_HR, self.m)

    def floor(self) -> Floor:
        """Scores of both sides in, kept scores and addresses out."""
        size = self.size
        sides = 2 * self.t * size.heads * size.rank * self.side * self.dtype.itemsize
        kept = self.t * size.heads * self.m * (size.cores * self.dtype.itemsize + 8)
        return Floor(read_bytes=sides, write_bytes=kept, flops=4 * self.t * size.heads * size.rank * self.side)


def build(row: Row, device: torch.device) -> Case:
    problem = Problem(row, device)

    def contender(
        role: Role, settings: str, draw: Callable[[], Any], run: Callable[[Any], Any], check: Callable[[Any, Any], None]
    ) -> Contender:
        run = torch.inference_mode()(run)

        def check_once() -> None:
            inputs = draw()
            check(inputs, run(inputs))

        return Contender(role=role, settings=settings, draw=draw, run=run, check=check_once)

    def eager(sides: Sides) -> TopK:
        with use_implementation(Implementation.ATEN):
            return problem.select(sides)

    graph = compiled(row, problem.select)

    def eager_compiled(sides: Sides) -> TopK:
        with use_implementation(Implementation.ATEN):
            return graph(sides)

    select = partial(contender, draw=problem.draw, check=partial(check_kept, problem))
    contenders = {
        "ultramem": lambda: select("ours", "ops.tucker_topk, AUTO", run=problem.select),
        "plain PyTorch, eager": lambda: select("peer", "the op's aten path", run=eager),
        "plain PyTorch, compiled": lambda: select(
            "peer", "the op's aten path under torch.compile, static shapes", run=eager_compiled
        ),
        "key GEMM": lambda: contender(
            "yardstick",
            "scores of both sides from queries, what comes before",
            partial(draw_query, problem),
            partial(key_scores, problem),
            partial(check_key_scores, problem),
        ),
        "torch.topk of both sides": lambda: contender(
            "yardstick",
            "torch.topk of u^T row and t^T col, without what follows",
            problem.draw,
            partial(top_of_sides, problem),
            partial(check_top_of_sides, problem),
        ),
    }
    size = problem.size
    shape: dict[str, int | str] = {
        "side": problem.side,
        "heads": size.heads,
        "rank": size.rank,
        "cores": size.cores,
        "top_m": problem.m,
        "key_dim": size.key_dim,
    }
    return Case(contenders=contenders, floor=problem.floor(), shape=shape)


def check_kept(problem: Problem, sides: Sides, kept: TopK) -> None:
    """The scores that are kept, best sum first, are those of the oracle on some tokens."""
    token = slice(0, CHECKED_TOKENS)
    few = (sides.row_THRN[token], sides.col_THRN[token], problem.cores_HCRR, problem.u_HR, problem.t_HR)
    exact = reference.tucker_topk(*(x.double() for x in few), problem.m)
    eager = reference.tucker_topk(*few[:3], *(x.to(problem.dtype) for x in few[3:]), problem.m)
    require_as_exact_as_eager("kept scores", kept.scores[token].sum(-1), eager.scores.sum(-1), exact.scores.sum(-1))
    n = problem.side
    row, col = (
        side.double().gather(-1, where.unsqueeze(2).expand(*side.shape[:3], problem.m))
        for side, where in zip(few[:2], (kept.addresses[token] // n, kept.addresses[token] % n), strict=True)
    )
    at_addresses = torch.einsum("thrk,hcrs,thsk->thkc", row, problem.cores_HCRR.double(), col)
    require_as_exact_as_eager("scores at the kept addresses", kept.scores[token], eager.scores, at_addresses)


def draw_query(problem: Problem) -> Tensor:
    return problem.normal(2, problem.t, problem.size.key_dim)


def key_scores(problem: Problem, query_2TK: Tensor) -> tuple[Tensor, Tensor]:
    row, col = (
        torch.einsum("tk,hrnk->thrn", query, keys) for query, keys in zip(query_2TK, problem.keys_2HRNK, strict=True)
    )
    return row, col


def check_key_scores(problem: Problem, query_2TK: Tensor, scores: tuple[Tensor, Tensor]) -> None:
    """Against float64: a product may round once to its dtype, and lose eps * sqrt(K) of the largest on the way.

    Raises:
        WrongResultError: it loses more.
    """
    few = query_2TK[:, :CHECKED_TOKENS]
    for side in (0, 1):
        exact = torch.einsum("tk,hrnk->thrn", few[side].double(), problem.keys_2HRNK[side].double())
        error = (scores[side][:CHECKED_TOKENS].double() - exact).abs().max().item()
        summing = torch.finfo(torch.float32).eps * problem.size.key_dim**0.5
        allowed = (torch.finfo(problem.dtype).eps + summing) * exact.abs().max().item()
        if not error <= allowed:
            raise WrongResultError(f"key scores differ from float64 by {error:.3g}, accepted {allowed:.3g}")


def top_of_sides(problem: Problem, sides: Sides) -> tuple[Tensor, Tensor]:
    row, col = (
        (side * vector.to(problem.dtype).unsqueeze(-1)).sum(2).topk(problem.m).values
        for side, vector in zip(sides, (problem.u_HR, problem.t_HR), strict=True)
    )
    return row, col


def check_top_of_sides(problem: Problem, sides: Sides, tops: tuple[Tensor, Tensor]) -> None:
    for side, vector, top in zip(sides, (problem.u_HR, problem.t_HR), tops, strict=True):
        exact = torch.einsum("hr,thrn->thn", vector.double(), side.double()).sort(descending=True).values
        eager = torch.einsum("hr,thrn->thn", vector.to(problem.dtype), side).sort(descending=True).values
        require_as_exact_as_eager("top of a side", top, eager[..., : problem.m], exact[..., : problem.m])


__all__ = ["build", "rows"]
