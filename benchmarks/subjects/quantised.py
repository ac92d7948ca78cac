"""Forward of the lookup in rows of 8 or 4 bits.

Shapes: N rows, D value dim, T tokens, K slots a token, C cores, E blocks, X = D / C columns of a core, B packed bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.check import require_as_exact_as_eager
from benchmarks.harness.contender import Case, Contender, Floor, Role, UnavailableError
from benchmarks.harness.row import Goal, Row, Suite
from benchmarks.subjects.fbgemm import quantised_embedding, require_fbgemm
from benchmarks.subjects.lookup import CHECKED_TOKENS, Bags, Inputs, Problem
from benchmarks.subjects.shapes import BASE_GB, table_gb
from ultramem.ops import lookup_reduce, lookup_reduce_quantized, quantize_rows, reference

INT8_CPU = Goal(text=">= 3x its quantised peer, int8 rows", quantity="speedup", bound=3.0, against="quantized")
LOST_BITS = 3  # the Triton kernel adds 1.5 to every integer and takes it off the sum
SCALE_BYTES = 4  # of a row or of one core's share of it: a scale and an offset in half precision

Dequantise = Callable[[Tensor], Tensor]
"""Rows [R,D] of row numbers [R], as the contender sees them."""


def rows(suite: Suite) -> list[Row]:
    if suite == "cpu":
        shapes = [(bits, "151m", t) for bits in (8, 4) for t in (1, 16, 1024, 16384)] + [
            (8, "1.6b", 1),
            (8, "1.6b", 1024),
        ]
        return [
            Row(
                subject="quantised",
                variant=f"int{bits}",
                size=size,
                tokens=t,
                indices="uniform",
                dtype="float32",
                limit_s=150,
                goals=(INT8_CPU,) if bits == 8 else (),
                quick=(bits, size, t) == (8, "151m", 16),
            )
            for bits, size, t in shapes
        ]
    return [
        Row(
            subject="quantised",
            variant=f"int{bits}",
            size="1.6b",
            tokens=t,
            indices="uniform",
            dtype="bfloat16",
            graph=t <= 64,
            priority=6,
            limit_s=90,
            device_gb=BASE_GB + 5 * table_gb("1.6b"),  # as it was, in float32, in few bits
        )
        for bits in (8, 4)
        for t in (64, 16384)
    ]


def build(row: Row, device: torch.device) -> Case:
    problem = Problem(row, device)
    bits = int(row.variant.removeprefix("int"))
    e, c = problem.size.blocks, problem.size.cores

    def contender(
        role: Role, settings: str, run: Callable[[Any], Tensor], prepare: Callable[[Inputs], Any], rows_of: Dequantise
    ) -> Contender:
        run = torch.no_grad()(run)
        return Contender(
            role=role,
            settings=settings,
            draw=lambda: prepare(problem.draw()),
            run=run,
            check=lambda: check(problem, role, run, prepare, rows_of),
        )

    def unquantised() -> Contender:
        return contender(
            "yardstick",
            "ops.lookup_reduce on the rows as they were",
            lambda x: lookup_reduce(problem.values_ND, *x, num_blocks=e),
            lambda x: x,
            lambda r: problem.values_ND[r],
        )

    def ours() -> Contender:
        rows_NB, scales_N = quantize_rows(problem.values_ND, bits)
        one = torch.ones(1, 1, device=device)

        def unpack(rows: Tensor) -> Tensor:
            weights = one.expand(rows.numel(), 1, 1)
            return reference.lookup_reduce_quantized(rows_NB, scales_N, rows.unsqueeze(1), weights).squeeze(1)

        return contender(
            "ours",
            "ops.lookup_reduce_quantized, AUTO",
            lambda x: lookup_reduce_quantized(rows_NB, scales_N, *x, num_blocks=e),
            lambda x: x,
            unpack,
        )

    def torch_quantized() -> Contender:
        if device.type == "cuda":
            raise UnavailableError("torch.ops.quantized has no such kernel for CUDA")
        kind = "byte" if bits == 8 else "4bit"
        ops = torch.ops.quantized
        packed_RB = getattr(ops, f"embedding_bag_{kind}_prepack")(problem.core_table.float())
        pool = getattr(ops, f"embedding_bag_{kind}_rowwise_offsets")
        unpack = getattr(ops, f"embedding_bag_{kind}_unpack")

        def run(bags: Bags) -> Tensor:
            return problem.unbag(pool(packed_RB, bags.rows, bags.first, False, 0, False, bags.weights))

        settings = (
            f"torch.ops.quantized.embedding_bag_{kind}_rowwise_offsets, prepacked; sorting into bags is not timed"
        )
        return contender(
            "peer", settings, run, lambda x: _in_float32(problem.bags(x)), _by_core(lambda r: unpack(packed_RB[r]), c)
        )

    def fbgemm() -> Contender:
        version = require_fbgemm()
        module = quantised_embedding(problem.core_table.float(), bits=bits)
        ((weights_RB, scales_R4),) = module.split_embedding_weights()

        def prepare(inputs: Inputs) -> Bags:
            bags = _in_float32(problem.bags(inputs))
            end = bags.first.new_tensor([bags.rows.numel()])
            return Bags(bags.rows.int(), torch.cat([bags.first, end]).int(), bags.weights)

        def run(bags: Bags) -> Tensor:
            return problem.unbag(module(bags.rows, bags.first, per_sample_weights=bags.weights))

        def unpack(rows: Tensor) -> Tensor:
            fused = torch.cat([weights_RB[rows], scales_R4[rows]], 1)
            return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(fused.cpu(), bits).to(fused.device)

        settings = f"{version}, table-batched int{bits} embedding; sorting into bags is not timed"
        return contender("peer", settings, run, prepare, _by_core(unpack, c))

    contenders = {
        "ultramem": ours,
        "quantized embedding_bag": torch_quantized,
        "FBGEMM": fbgemm,
        "unquantised": unquantised,
    }
    return Case(contenders=contenders, floor=floor(problem, bits), shape=problem.shape() | {"bits": bits})


def _in_float32(bags: Bags) -> Bags:
    return bags._replace(weights=bags.weights.float())


def _by_core(unpack: Dequantise, cores: int) -> Dequantise:
    """Rows of a table whose cores are rows of their own."""

    def rows_of(rows: Tensor) -> Tensor:
        each = rows.unsqueeze(1) * cores + torch.arange(cores, device=rows.device)
        return unpack(each.flatten()).view(rows.numel(), -1)

    return rows_of


def check(
    problem: Problem, role: Role, run: Callable[[Any], Tensor], prepare: Callable[[Inputs], Any], rows_of: Dequantise
) -> None:
    """Pooled rows of some tokens against float64, from the rows as the contender stores them."""
    inputs = problem.draw()
    token = torch.linspace(0, problem.t - 1, min(problem.t, CHECKED_TOKENS), device=problem.device).long()
    actual = run(prepare(inputs))[token]
    rows, position = torch.unique(inputs.indices_TK[token] % problem.n, return_inverse=True)
    moved = position + inputs.indices_TK[token] // problem.n * rows.numel()
    table, scores = rows_of(rows), inputs.scores_TKC[token]
    pool = partial(reference.lookup_reduce, num_blocks=problem.size.blocks)
    eager = pool(table, moved, scores.to(table.dtype))
    exact = pool(table.double(), moved, scores.double())
    require_as_exact_as_eager("pooled rows", actual, eager, exact, lost_bits=LOST_BITS if role == "ours" else 0)


def floor(problem: Problem, bits: int) -> Floor:
    """Rows once each with their scales, indices and scores in, pooled rows out."""
    whole = problem.floor()
    inputs = problem.draw()
    row_bytes = problem.size.value_dim * bits // 8 + SCALE_BYTES
    given = inputs.indices_TK.nbytes + inputs.scores_TKC.nbytes
    distinct = torch.unique(inputs.indices_TK % problem.n).numel()
    return Floor(
        read_bytes=distinct * row_bytes + given,
        request_bytes=inputs.indices_TK.numel() * row_bytes + given,
        write_bytes=whole.write_bytes,
        flops=whole.flops,
    )
