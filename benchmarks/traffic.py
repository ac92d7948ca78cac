"""Bytes that the kernels ask for, counted in Triton's interpreter, against the fewest that their ops can move.

    TRITON_INTERPRET=1 python -m benchmarks.traffic [--check | --update]

Every load and store of every program is counted, re-reads by other programs included, and so are the arguments and
results of the PyTorch operators in between. The count is taken at the sizes of the paper for one or two tokens whose
rows all differ, with the kernels that an unknown number of tokens gets above 64, and grows with the tokens. The floor
moves each input that the op needs and each output once: `floor_bytes` with a row once however many tokens read it
(uniform indices), `unshared_bytes` with a row once a token.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import static_table
from benchmarks.gate_cases import BLOCKS, CORES, HEADS, RANKS, SIZES, Size
from ultramem import ops
from ultramem.ops.tucker_topk import Candidates

TOKENS = (1, 16, 64, 1024, 16384, 65536)
MOST_COUNTED_TOKENS = 2
MOST_FEW_TOKENS = 64
DTYPE = torch.bfloat16
SECTION = static_table.Section(
    name="traffic", key=("op", "size", "tokens"), at_most={"asked_bytes": 1.0}, libraries=("torch", "triton")
)


class Problem(NamedTuple):
    """An op at one size: its inputs for T tokens, its call, and its floor for T tokens and U distinct rows."""

    inputs: Callable[[int], tuple[Tensor, ...]]
    run: Callable[..., Any]
    floor: Callable[[int, int], int]
    rows: int = 0
    """Rows of the table, where there is one."""


def problems(size: Size, dtype: torch.dtype) -> dict[str, Problem]:
    """Every op with kernels, at the structure of UltraMem or (product) of PKM."""
    return {**_lookup_problems(size, dtype), **_select_problems(size, dtype)}


def _lookup_problems(size: Size, dtype: torch.dtype) -> dict[str, Problem]:
    s, d, k, c, e = dtype.itemsize, size.value_dim, size.top_m * HEADS, CORES, BLOCKS
    rows = size.side**2 // e

    def lookup(t: int) -> tuple[Tensor, Tensor, Tensor]:
        n = 2 * t * k  # a small table: only rows that are read matter
        indices = torch.randperm(n)[: t * k] + n * torch.randint(e, (t * k,))
        return torch.rand(n, d).to(dtype), indices.view(t, k), torch.rand(t, k, c).to(dtype)

    def pool(values: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        return ops.lookup_reduce(values, indices, scores, num_blocks=e, sparse_grad=True)

    def slots(t: int) -> int:
        """Bytes of indices and scores."""
        return t * k * (8 + c * s)

    def floor(t: int, u: int) -> int:
        return u * d * s + slots(t) + t * e * d * s

    return {
        "lookup_reduce": Problem(lookup, pool, floor, rows),
        "lookup_reduce gradient": _gradient(
            lookup, pool, (0, 2), lambda t, u: floor(t, u) + u * (d * s + 8) + t * k * c * s, rows
        ),
        "lookup_reduce score gradient": _gradient(lookup, pool, (2,), floor, rows),
        "permute_addresses": Problem(
            lambda t: (torch.randint(size.side**2, (t, k)),),
            lambda x: ops.permute_addresses(x, size.side**2, 0),
            lambda t, _: 16 * t * k,
        ),
    }


def _select_problems(size: Size, dtype: torch.dtype) -> dict[str, Problem]:
    s, n, m, h, r, c = dtype.itemsize, size.side, size.top_m, HEADS, RANKS, CORES
    cores, pair = torch.rand(h, c, r, r).to(dtype), torch.rand(h, r)

    def tucker_inputs(t: int) -> tuple[Tensor, ...]:
        return torch.rand(t, h, r, n).to(dtype), torch.rand(t, h, r, n).to(dtype), cores, pair, pair.clone()

    def tucker(rule: Candidates) -> Callable[..., ops.TopK]:
        return lambda row, col, cores, u, t: ops.tucker_topk(row, col, cores, u, t, m, candidates=rule)

    def product_inputs(t: int) -> tuple[Tensor, ...]:
        return torch.rand(t, h, n).to(dtype), torch.rand(t, h, n).to(dtype)

    def product(row: Tensor, col: Tensor) -> ops.TopK:
        return ops.product_topk(row, col, m)

    def kept(t: int, scores: int) -> int:
        """Bytes of addresses and their scores."""
        return t * h * m * (8 + scores * s)

    def tucker_floor(t: int, _: int) -> int:
        return 2 * t * h * r * n * s + cores.nbytes + 2 * pair.nbytes + kept(t, c)

    def product_floor(t: int, _: int) -> int:
        return 2 * t * h * n * s + kept(t, 1)

    return {
        "tucker_topk one_tailed": Problem(tucker_inputs, tucker("one_tailed"), tucker_floor),
        "tucker_topk two_tailed": Problem(tucker_inputs, tucker("two_tailed"), tucker_floor),
        "tucker_topk gradient": _gradient(
            tucker_inputs,
            tucker("one_tailed"),
            (0, 1, 2),
            lambda t, _: 2 * t * h * r * n * s + 2 * cores.nbytes + kept(t, c),
        ),
        "product_topk": Problem(product_inputs, product, product_floor),
        "product_topk gradient": _gradient(product_inputs, product, (0, 1), product_floor),
    }


def _gradient(
    inputs: Callable[[int], tuple[Tensor, ...]],
    run: Callable[..., Any],
    wanted: tuple[int, ...],
    floor: Callable[[int, int], int],
    rows: int = 0,
) -> Problem:
    """The backward of an op, for the gradients of the inputs at the positions `wanted`."""

    def forward(t: int) -> tuple[Tensor, ...]:
        found = inputs(t)
        for position in wanted:
            found[position].requires_grad_()
        with torch.enable_grad(), ops.use_implementation(ops.Implementation.ATEN):
            result = run(*found)
        output, *others = [result] if isinstance(result, Tensor) else result
        return output, torch.rand(output.shape).to(output.dtype), *others, *(found[position] for position in wanted)

    def backward(output: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, rest[-len(wanted) :], grad)

    return Problem(forward, backward, floor, rows)


def touched_rows(rows: int, slots: int) -> int:
    """Expected number of distinct rows among `slots` uniform ones."""
    return round(rows * -np.expm1(slots * np.log1p(-1 / rows))) if rows else 0


def _choosing_modules() -> list[Any]:
    """Where the number of tokens picks a kernel."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("ultramem.ops.triton")]
    return [module for module in loaded if hasattr(module, "statically_known_true")]


@contextlib.contextmanager
def many_tokens() -> Iterator[None]:
    """Kernels are picked as for a number of tokens that a compiler leaves open."""
    with contextlib.ExitStack() as stack:
        for module in _choosing_modules():
            stack.enter_context(mock.patch.object(module, "statically_known_true", return_value=False))
        yield


def figures(name: str, problem: Problem, size_name: str, k: int) -> Iterator[static_table.Row]:
    """The rows of an op at one size, K slots a token."""
    from benchmarks.byte_count import count

    asked: dict[tuple[int, bool], int] = {}
    for t in TOKENS:
        counted, many = min(t, MOST_COUNTED_TOKENS), t > MOST_FEW_TOKENS and bool(_choosing_modules())
        if (counted, many) not in asked:
            with many_tokens() if many else contextlib.nullcontext():
                asked[counted, many] = count(problem.run, problem.inputs(counted)).asked
        asked_bytes = asked[counted, many] * t // counted
        unshared = problem.floor(t, t * k)
        yield {
            "op": name,
            "size": size_name,
            "tokens": t,
            "asked_bytes": asked_bytes,
            "floor_bytes": problem.floor(t, touched_rows(problem.rows, t * k)),
            "unshared_bytes": unshared,
            "ratio": round(asked_bytes / unshared, 3),
        }


def rows_of_size(size_name: str) -> list[static_table.Row]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = SIZES[size_name]
    every = problems(size, DTYPE)
    return [row for name, each in every.items() for row in figures(name, each, size_name, size.top_m * HEADS)]


def table(rows: list[static_table.Row]) -> str:
    fields = ("tokens", "asked_bytes", "floor_bytes", "unshared_bytes", "ratio")
    lines = [f"{'op':28} {'size':5}" + "".join(f" {name:>14}" for name in fields)]
    lines += [f"{row['op']:28} {row['size']:5}" + "".join(f" {row[name]:14}" for name in fields) for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    static_table.add_modes(parser)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sizes at a time")
    options = parser.parse_args(arguments)
    if "TRITON_INTERPRET" not in os.environ:
        parser.error("bytes are counted in Triton's interpreter: run it with TRITON_INTERPRET=1")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        rows = [row for part in pool.map(rows_of_size, SIZES) for row in part]
    print(table(rows))
    return static_table.conclude(SECTION, rows, options)


if __name__ == "__main__":
    sys.exit(main())
