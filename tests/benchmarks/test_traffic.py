"""Bytes counted in the interpreter against arithmetic."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if torch.cuda.is_available():
    pytest.skip("bytes are counted in Triton's interpreter", allow_module_level=True)

from benchmarks.byte_count import count  # noqa: E402  # it needs Triton
from benchmarks.gate_cases import HEADS, Size  # noqa: E402
from benchmarks.traffic import problems, touched_rows  # noqa: E402

SIZE = Size(24, 20, 3)  # value dim, side, top-m: no powers of two
TOKENS = 2
# Kernels touch every byte of the inputs and outputs of these. Of the other gradients they need not: at this size a
# token leaves blocks empty, and PyTorch writes some of the outputs.
EXACT = (
    "lookup_reduce", "permute_addresses", "tucker_topk one_tailed", "tucker_topk two_tailed", "product_topk",
    "product_topk gradient",
)  # fmt: skip


@triton.jit
def add_kernel(x, y, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < count) + tl.load(y)
    tl.store(out + at, total, mask=at < count)


def test_loads_and_stores_are_counted_by_kernel_and_argument() -> None:
    def run(x, y):
        out = torch.empty(10)
        add_kernel[(3,)](x, y, out, 10, BLOCK=4)
        return out * 2

    counted = count(run, (torch.ones(10), torch.ones(1)))
    bytes_of = {argument: (each.loaded, each.stored) for (_, argument), each in counted.accesses.items()}
    assert bytes_of == {"x": (40, 0), "y": (12, 0), "out": (0, 40)}
    assert counted.operator_bytes == 80  # of the product: 10 floats in, 10 out
    assert counted.asked == 40 + 12 + 40 + 80
    assert counted.outputs[0].tolist() == [4.0] * 10


@pytest.mark.parametrize("name", problems(SIZE, torch.bfloat16))
def test_floor_is_what_has_to_be_touched(name: str) -> None:
    # float32 where that is quick: the searches of a selection take the interpreter seconds
    problem = problems(SIZE, torch.bfloat16 if "topk" in name else torch.float32)[name]
    inputs = problem.inputs(TOKENS)
    counted = count(problem.run, inputs)
    floor = problem.floor(TOKENS, TOKENS * SIZE.top_m * HEADS)
    assert counted.asked >= floor
    if name in EXACT:
        assert counted.touched([*inputs, *counted.outputs]) == floor


def test_touched_rows() -> None:
    assert touched_rows(1000, 1) == 1
    assert touched_rows(10, 10**6) == 10
    draws = torch.randint(1000, (200, 500))
    mean = sum(len(draw.unique()) for draw in draws) / len(draws)
    assert touched_rows(1000, 500) == pytest.approx(mean, rel=0.01)
