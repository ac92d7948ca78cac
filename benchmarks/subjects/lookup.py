"""Forward of the lookup: weighted pooling of value rows, per block and core.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, X = D / C columns of a core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role, UnavailableError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.fbgemm import batched_embedding, require_fbgemm
from benchmarks.subjects.shapes import (
    BASE_GB,
    Indices,
    compiled,
    dtype_of,
    gathered_gb,
    make_table,
    size_of,
    table_gb,
    table_rows,
)
from ultramem.ops import lookup_reduce, reference

CHECKED_TOKENS = 32
GATHER_LIMIT_BYTES = {"cpu": 3 * 2**30, "cuda": 12 * 2**30}  # of the gathered rows, of which there are several copies
DECODE_TOKENS = (1, 4, 16, 64)

CPU_DECODE = Goal(
    text=">= 2x embedding_bag at its best, T = 1 to 16", quantity="speedup", bound=2.0, against="embedding_bag"
)
CPU_PREFILL = Goal(
    text=">= 1.1x embedding_bag at its best, T >= 1024", quantity="speedup", bound=1.1, against="embedding_bag"
)
GPU_DECODE = Goal(
    text="<= 1.25x (bytes / bandwidth) + 3 us, T = 1..64", quantity="over_floor_us", bound=3.0, factor=1.25
)
GPU_SHARE = Goal(text=">= 92 % of measured peak bandwidth, T >= 4096", quantity="bandwidth_share", bound=0.92)
GPU_PEERS = Goal(text=">= 1.15x the best peer, T >= 4096", quantity="speedup", bound=1.15)


def rows(suite: Suite) -> list[Row]:
    return _cpu_rows() if suite == "cpu" else _gpu_rows()


def _cpu_rows() -> list[Row]:
    shapes = [("151m", t, "uniform") for t in (1, 4, 16, 64, 1024, 16384, 65536)]
    shapes += [("680m", t, "uniform") for t in (1, 16, 1024)]
    shapes += [("1.6b", t, "uniform") for t in (1, 4, 16, 64, 1024, 16384)]  # 65536 tokens take over 5 s a call
    shapes += [("151m", t, "zipf") for t in (1, 16, 1024, 16384)] + [("1.6b", t, "zipf") for t in (16, 1024)]
    found = []
    for size, t, indices in shapes:
        goals = (CPU_DECODE,) if t <= 16 else (CPU_PREFILL,) if t >= 1024 else ()
        quick = size == "151m" and t in (16, 1024) and indices == "uniform"
        found.append(
            Row(
                subject="lookup",
                size=size,
                tokens=t,
                indices=indices,
                dtype="float32",
                goals=goals,
                quick=quick,
                limit_s=150,
            )
        )
    return found


def _gpu_rows() -> list[Row]:
    first = [("1.6b", 4096, "uniform"), ("1.6b", 1, "uniform"), ("1.6b", 64, "uniform"), ("1.6b", 65536, "zipf")]
    then = [(size, t, "uniform") for size in ("1.6b", "151m", "680m") for t in (1, 4, 16, 64, 1024, 16384, 65536)]
    then += [(size, t, "zipf") for size in ("1.6b", "151m") for t in (64, 16384)]
    found = []
    for size, t, indices in dict.fromkeys([*first, *then]):
        goals: tuple[Goal, ...] = (GPU_DECODE,) if t <= 64 else ()
        if t >= 4096:
            goals = (GPU_SHARE, GPU_PEERS) if indices == "uniform" else (GPU_PEERS,)
        priority = 0 if (size, t, indices) in first else 4 if size == "1.6b" else 8
        found.append(
            Row(
                subject="lookup",
                size=size,
                tokens=t,
                indices=indices,
                dtype="bfloat16",
                goals=goals,
                graph=t in DECODE_TOKENS,
                priority=priority,
                limit_s=90,
                device_gb=BASE_GB + table_gb(size) + 3 * gathered_gb(size, t),
            )
        )
    return found


class Inputs(NamedTuple):
    """Of one call: virtual indices [T,K] and scores [T,K,C]."""

    indices_TK: Tensor
    scores_TKC: Tensor


class Bags(NamedTuple):
    """The same as bags of a table seen as [N*C, D/C], one per (token, core, block), slots sorted by block."""

    rows: Tensor
    first: Tensor
    weights: Tensor


def pool_bags(core_table: Tensor, bags: Bags, *, sparse: bool = False) -> Tensor:
    return F.embedding_bag(
        bags.rows, core_table, bags.first, mode="sum", per_sample_weights=bags.weights, sparse=sparse
    )


class Problem:
    """One table and draws of what is looked up in it."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.size = size_of(row)
        self.t, self.dtype, self.device = row.tokens, dtype_of(row), device
        self.values_ND = make_table(table_rows(row, device), self.size.value_dim, self.dtype, device)
        self.indices = Indices(row.indices, n=self.n, e=self.size.blocks, device=device)
        self.generator = torch.Generator(device).manual_seed(1)

    @property
    def n(self) -> int:
        return self.values_ND.shape[0]

    def draw(self) -> Inputs:
        scores = torch.randn(self.t, self.size.slots, self.size.cores, device=self.device, generator=self.generator).to(
            self.dtype
        )
        return Inputs(self.indices.draw(self.t, self.size.slots), scores)

    @property
    def core_table(self) -> Tensor:
        return self.values_ND.view(self.n * self.size.cores, -1)

    def bags(self, inputs: Inputs) -> Bags:
        """As quick as plain PyTorch makes them."""
        e, (t, k, c) = self.size.blocks, inputs.scores_TKC.shape
        block_TK, order_TK = (inputs.indices_TK // self.n).sort(dim=1)
        core_C1 = torch.arange(c, device=self.device).view(1, c, 1)
        rows_TCK = (inputs.indices_TK % self.n).gather(1, order_TK).unsqueeze(1) * c + core_C1
        weights_TCK = inputs.scores_TKC.transpose(1, 2).gather(2, order_TK.unsqueeze(1).expand(t, c, k))
        first_TE = torch.searchsorted(block_TK, torch.arange(e, device=self.device).expand(t, e).contiguous())
        first_TCE = first_TE.unsqueeze(1) + torch.arange(t * c, device=self.device).view(t, c, 1) * k
        return Bags(rows_TCK.reshape(-1), first_TCE.reshape(-1), weights_TCK.reshape(-1))

    def unbag(self, pooled: Tensor) -> Tensor:
        """Pooled bags [T*C*E,X] as [T,E,D]."""
        t, c, e = self.t, self.size.cores, self.size.blocks
        return pooled.view(t, c, e, -1).transpose(1, 2).reshape(t, e, -1)

    def floor(self) -> Floor:
        """Rows once each, indices and scores in, pooled rows out."""
        inputs = self.draw()
        row_bytes = self.size.value_dim * self.values_ND.itemsize
        given = inputs.indices_TK.nbytes + inputs.scores_TKC.nbytes
        return Floor(
            read_bytes=torch.unique(inputs.indices_TK % self.n).numel() * row_bytes + given,
            request_bytes=inputs.indices_TK.numel() * row_bytes + given,
            write_bytes=self.t * self.size.blocks * row_bytes,
            flops=2 * inputs.indices_TK.numel() * self.size.value_dim,
        )

    def shape(self) -> dict[str, int | str]:
        size = self.size
        return {
            "rows": self.n,
            "value_dim": size.value_dim,
            "slots": size.slots,
            "cores": size.cores,
            "blocks": size.blocks,
        }

    def check(self, run: Callable[[Any], Tensor], prepare: Callable[[Inputs], Any]) -> None:
        """The pooled rows of some tokens of a full draw against float64."""
        inputs = self.draw()
        token = torch.linspace(0, self.t - 1, min(self.t, CHECKED_TOKENS), device=self.device).long()
        actual = run(prepare(inputs))[token]
        rows, position = torch.unique(inputs.indices_TK[token] % self.n, return_inverse=True)
        moved = position + inputs.indices_TK[token] // self.n * rows.numel()
        table, scores = self.values_ND[rows], inputs.scores_TKC[token]
        pool = partial(reference.lookup_reduce, num_blocks=self.size.blocks)
        require_as_exact_as_eager(
            "pooled rows", actual, pool(table, moved, scores), pool(table.double(), moved, scores.double())
        )


def build(row: Row, device: torch.device) -> Case:
    problem = Problem(row, device)
    e = problem.size.blocks

    def contender(
        role: Role, settings: str, run: Callable[[Any], Tensor], prepare: Callable[[Inputs], Any] = lambda x: x
    ) -> Contender:
        run = torch.no_grad()(run)  # FBGEMM's op does not know the inference mode
        return Contender(
            role=role,
            settings=settings,
            draw=lambda: prepare(problem.draw()),
            run=run,
            check=lambda: problem.check(run, prepare),
        )

    def ours() -> Contender:
        return contender(
            "ours", "ops.lookup_reduce, AUTO", lambda x: lookup_reduce(problem.values_ND, *x, num_blocks=e)
        )

    def bag(bags: Bags) -> Tensor:
        return problem.unbag(pool_bags(problem.core_table, bags))

    def bag_prepared() -> Contender:
        settings = "a bag per (token, core, block); sorting slots into bags is not timed"
        return contender("peer", settings, bag, problem.bags)

    def bag_whole() -> Contender:
        return contender(
            "peer", "a bag per (token, core, block); sorting slots into bags is timed", lambda x: bag(problem.bags(x))
        )

    def gather() -> Contender:
        require_gathered(problem)
        pool = partial(gather_einsum, problem.values_ND, e)
        return contender("peer", "index, weight, einsum with block membership", lambda x: pool(*x))

    def gather_compiled() -> Contender:
        require_gathered(problem)
        pool = compiled(row, gather_einsum)
        settings = "index, weight, einsum under torch.compile, static shapes"
        return contender("peer", settings, lambda x: pool(problem.values_ND, e, *x))

    def fbgemm() -> Contender:
        version = require_fbgemm()
        module = batched_embedding(problem.core_table)

        def prepare(inputs: Inputs) -> Bags:
            bags = problem.bags(inputs)
            end = bags.first.new_tensor([bags.rows.numel()])
            return Bags(bags.rows, torch.cat([bags.first, end]), bags.weights.float())

        def run(bags: Bags) -> Tensor:
            return problem.unbag(module(bags.rows, bags.first, per_sample_weights=bags.weights))

        settings = f"{version}, table-batched embedding, a bag per (token, core, block); sorting into bags is not timed"
        return contender("peer", settings, run, prepare)

    contenders = {
        "ultramem": ours,
        "embedding_bag, bags prepared": bag_prepared,
        "embedding_bag": bag_whole,
        "gather + einsum": gather,
        "gather + einsum, compiled": gather_compiled,
        "FBGEMM, bags prepared": fbgemm,
    }
    return Case(contenders=contenders, floor=problem.floor(), shape=problem.shape())


def gather_einsum(values_ND: Tensor, num_blocks: int, indices_TK: Tensor, scores_TKC: Tensor) -> Tensor:
    """What one writes first: gather every row, weight it core by core, add it to its block."""
    n, (t, k, c) = values_ND.shape[0], scores_TKC.shape
    rows_TKCX = values_ND[indices_TK % n].view(t, k, c, -1)
    member_TKE = (indices_TK // n).unsqueeze(-1) == torch.arange(num_blocks, device=indices_TK.device)
    weights_TKEC = member_TKE.unsqueeze(-1) * scores_TKC.unsqueeze(2)
    return torch.einsum("tkec,tkcx->tecx", weights_TKEC, rows_TKCX.to(scores_TKC.dtype)).reshape(t, num_blocks, -1)


def require_gathered(problem: Problem) -> None:
    """Raise if the gathered rows [T,K,D] are too large to be anybody's way."""
    gathered = problem.t * problem.size.slots * problem.size.value_dim * problem.values_ND.itemsize
    if gathered > GATHER_LIMIT_BYTES[problem.device.type]:
        raise UnavailableError(f"the gathered rows alone would take {gathered / 2**30:.1f} GiB")
