"""Selection rules against the exact top-m of the whole grid: what they find, and what the op costs.

Shapes: T tokens, H heads, R ranks, N side of the grid, C cores, M kept slots.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.graph.singular import leading_singular_pair
from ultramem.ops import tucker_topk
from ultramem.ops.tucker_topk import CANDIDATES, Candidates, tail_length

FACTORS = (1.0, 1.5, 2.0, 4.0)  # m' over m
TIMED_ROUNDS = 9
CHUNK_TOKENS = 64  # of one call of the op, so that 4 m x 4 m cells a token stay within some hundred MB
GRID_BYTES = 64 * 2**20  # of whole grids that are in memory at a time


class WrongSelectionError(RuntimeError):
    """The op kept something that its scores do not justify: nothing is reported."""


class Scores(NamedTuple):
    """What a Tucker selection works on."""

    row_THRN: Tensor
    col_THRN: Tensor
    cores_HCRR: Tensor


class Kept(NamedTuple):
    """Summed scores [T,H,M], best first, and addresses [T,H,M]."""

    scores_THM: Tensor
    addresses_THM: Tensor


class Rule(NamedTuple):
    """Candidates from k = factor * m rows and columns, of which the m best are kept."""

    candidates: Candidates
    factor: float

    def k(self, m: int) -> int:
        return math.ceil(self.factor * m)

    def cells(self, m: int) -> int:
        """Cells rescored for one token and head."""
        k = self.k(m)
        return k**2 if self.candidates == "one_tailed" else 2 * tail_length(k) ** 2


RULES = tuple(Rule(candidates, factor) for factor in FACTORS for candidates in CANDIDATES)


class Quality(NamedTuple):
    """What one rule finds, as means over tokens and heads; 1 is best in each."""

    recall: float
    """Share of the exact top-m that is kept."""
    score_share: float
    """Sum of the kept scores over that of the exact top-m."""
    sign_overlap: float
    """Share of the kept cells that are kept as well with the singular pair's sign turned."""


def exact_top(scores: Scores, m: int, *, grid_bytes: int = GRID_BYTES) -> Kept:
    """The m best cells of the whole grid, a few grids of N * N scores at a time."""
    t, h, _, n = scores.row_THRN.shape
    left_THRN = torch.einsum("hrs,thrn->thsn", scores.cores_HCRR.sum(1), scores.row_THRN)
    chunk = max(1, grid_bytes // (n * n * left_THRN.element_size()))
    sides = zip(left_THRN.flatten(0, 1).split(chunk), scores.col_THRN.flatten(0, 1).split(chunk), strict=True)
    tops = [(left.transpose(1, 2) @ col).flatten(1).topk(m) for left, col in sides]
    values, addresses = (torch.cat(each).view(t, h, m) for each in zip(*tops, strict=True))
    return Kept(values, addresses)


def select(scores: Scores, rule: Rule, m: int, *, turned: bool = False) -> Kept:
    """What `rule` keeps; `turned`: with (-u, -t) for (u, t)."""
    u_HR, t_HR = leading_singular_pair(scores.cores_HCRR.sum(1))
    if turned:
        u_HR, t_HR = -u_HR, -t_HR
    sides = zip(scores.row_THRN.split(CHUNK_TOKENS), scores.col_THRN.split(CHUNK_TOKENS), strict=True)
    tops = [
        tucker_topk(row, col, scores.cores_HCRR, u_HR, t_HR, rule.k(m), candidates=rule.candidates)
        for row, col in sides
    ]
    return Kept(
        torch.cat([top.scores[..., :m, :].sum(-1) for top in tops]),
        torch.cat([top.addresses[..., :m] for top in tops]),
    )


def overlap(first_THM: Tensor, second_THM: Tensor) -> float:
    """Share of the first addresses that are among the second, per token and head."""
    return (first_THM.unsqueeze(-1) == second_THM.unsqueeze(-2)).any(-1).double().mean().item()


def quality(scores: Scores, m: int, rules: Sequence[Rule] = RULES) -> list[Quality]:
    """Each rule against the exact top-m.

    Raises:
        WrongSelectionError: a kept score is not that of its cell, a cell is kept twice, or the kept cells are better
            than the exact top-m.
    """
    exact = exact_top(scores, m)
    exact_sum = exact.scores_THM.double().sum().item()
    found = []
    for rule in rules:
        kept = select(scores, rule, m)
        _check(scores, kept, exact, rule)
        found.append(
            Quality(
                recall=overlap(exact.addresses_THM, kept.addresses_THM),
                score_share=kept.scores_THM.double().sum().item() / exact_sum,
                sign_overlap=overlap(kept.addresses_THM, select(scores, rule, m, turned=True).addresses_THM),
            )
        )
    return found


def _check(scores: Scores, kept: Kept, exact: Kept, rule: Rule) -> None:
    n = scores.row_THRN.shape[-1]
    row_THM, col_THM = kept.addresses_THM // n, kept.addresses_THM % n
    shape = (*scores.row_THRN.shape[:3], kept.addresses_THM.shape[-1])
    row_THRM = scores.row_THRN.double().gather(-1, row_THM.unsqueeze(2).expand(shape))
    col_THRM = scores.col_THRN.double().gather(-1, col_THM.unsqueeze(2).expand(shape))
    cell_THM = torch.einsum("thrm,hrs,thsm->thm", row_THRM, scores.cores_HCRR.double().sum(1), col_THRM)
    rounding = 1e-4 * float(exact.scores_THM.abs().amax())
    in_order = kept.addresses_THM.sort(-1).values
    wrong = {
        "a score is not that of its cell": (kept.scores_THM - cell_THM).abs().max() > rounding,
        "a cell is kept twice": (in_order[..., 1:] == in_order[..., :-1]).any(),
        "a slot is better than the exact one of its rank": (kept.scores_THM - exact.scores_THM).max() > rounding,
    }
    for complaint, holds in wrong.items():
        if holds:
            raise WrongSelectionError(f"{rule.candidates} with {rule.factor} m candidates: {complaint}")


def time_rules(scores: Scores, m: int, rules: Sequence[Rule] = RULES) -> list[dict[str, float]]:
    """Microseconds a token of each rule's op: median and quartiles of interleaved rounds, after one to warm up."""
    row_THRN, col_THRN, cores_HCRR = scores
    scores = Scores(row_THRN[:CHUNK_TOKENS], col_THRN[:CHUNK_TOKENS], cores_HCRR)
    seconds: list[list[float]] = [[] for _ in rules]
    for round_number in range(TIMED_ROUNDS + 1):
        for rule, taken in zip(rules, seconds, strict=True):
            began = time.perf_counter()
            select(scores, rule, m)
            if round_number:
                taken.append(time.perf_counter() - began)
    names = ("low", "median", "high")
    quartiles = [statistics.quantiles(taken, n=4) for taken in seconds]
    tokens = len(scores.row_THRN)
    return [{name: round(1e6 * q / tokens, 1) for name, q in zip(names, each, strict=True)} for each in quartiles]
