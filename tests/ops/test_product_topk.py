from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, product_topk, reference, use_implementation

NAMES = ("scores", "grad of row scores", "grad of column scores")
# (T, H, N, K): odd sides, one token, k = n, a side that fills its tile, one cell.
SIZES = [(2, 2, 37, 5), (1, 1, 4, 4), (1, 3, 64, 7), (1, 1, 1, 1), (3, 1, 2, 1)]


def make_scores(t: int, h: int, n: int, *, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(t, h, n).to(device, dtype) for _ in range(2)]


def scores_at(addresses: Tensor, n: int):
    """The sum of both sides at given addresses, as plain indexing."""
    return lambda row, col: row.gather(-1, addresses // n) + col.gather(-1, addresses % n)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value_and_gradients_equal_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    if dtype == torch.float64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
    t, h, n, k = size
    inputs = make_scores(t, h, n, dtype=dtype, device=device)
    expected = reference.product_topk(*as_float64(inputs), k)
    assert torch.equal(product_topk(*inputs, k).addresses, expected.addresses)

    grad = torch.randn(t, h, k).to(device, dtype)
    exact = value_and_gradients(scores_at(expected.addresses, n), as_float64(inputs), grad)
    eager = value_and_gradients(scores_at(expected.addresses, n), as_eager(inputs), grad)
    actual = value_and_gradients(lambda row, col: product_topk(row, col, k).scores, inputs, grad)
    assert torch.equal(exact[0], expected.scores)
    assert_as_exact_as_eager(NAMES, actual, eager, exact)


@pytest.mark.parametrize(("t", "h", "n", "k"), [(2, 1, 16, 16), (1, 2, 33, 9), (1, 1, 8, 1)])
def test_of_equal_scores_the_lower_address_is_kept_and_first(
    implementation: Implementation, device: torch.device, t: int, h: int, n: int, k: int
) -> None:
    row, col = (torch.randint(-1, 2, (t, h, n), device=device).float() for _ in range(2))
    row[row == 0] = -0.0  # a tie with 0.0
    assert torch.equal(
        product_topk(row, col, k).addresses, reference.product_topk(row.double(), col.double(), k).addresses
    )
    flat = torch.zeros(1, 1, n, device=device)
    assert torch.equal(product_topk(flat, flat, k).addresses.flatten(), torch.arange(k, device=device))


def test_infinities_are_ordered(implementation: Implementation, device: torch.device) -> None:
    row = torch.tensor([[[-torch.inf, 1.0, torch.inf]]], device=device)
    top = product_topk(row, torch.zeros_like(row), 3)
    assert top.addresses.flatten().tolist() == [6, 7, 8]
    lowest = product_topk(torch.full_like(row, -torch.inf), torch.zeros_like(row), 2)
    assert lowest.addresses.flatten().tolist() == [0, 1]


def test_no_tokens(implementation: Implementation, device: torch.device) -> None:
    row, col = make_scores(0, 2, 9, dtype=torch.float32, device=device)
    value, *grads = value_and_gradients(lambda r, c: product_topk(r, c, 3).scores, [row, col], torch.zeros(0, 2, 3))
    assert value.shape == (0, 2, 3)
    assert [g.shape for g in grads] == [row.shape, col.shape]


def test_repeated_backward_gives_the_same_bits(implementation: Implementation, device: torch.device) -> None:
    if implementation is Implementation.ATEN and device.type == "cuda":
        pytest.skip("PyTorch's gather adds its gradient by atomics on a GPU")
    inputs = make_scores(2, 2, 20, dtype=torch.float32, device=device)
    grad = torch.randn(2, 2, 20, device=device)
    first, second = (value_and_gradients(lambda r, c: product_topk(r, c, 20).scores, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck() -> None:
    row, col = (x.requires_grad_() for x in make_scores(2, 2, 11, dtype=torch.float64, device=torch.device("cpu")))
    assert torch.autograd.gradcheck(lambda r, c: product_topk(r, c, 5).scores, (row, col))


def test_opcheck(device: torch.device) -> None:
    row, col = make_scores(2, 2, 11, dtype=torch.float32, device=device)
    addresses = product_topk(row, col, 5).addresses
    torch.library.opcheck(
        torch.ops.ultramem.product_topk_backward.default, (torch.randn_like(row[..., :5]), addresses, 11)
    )
    torch.library.opcheck(torch.ops.ultramem.product_topk.default, (row.requires_grad_(), col.requires_grad_(), 5))


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)], ids=str
)
def test_compiles_to_one_graph(device: torch.device, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def step(row: Tensor, col: Tensor) -> Tensor:
        return product_topk(row * 2, col, 5).scores.sigmoid()

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for t in (7, 3, 9) if dynamic else (7,):
        inputs = make_scores(t, 2, 11, dtype=torch.float32, device=device)
        grad = torch.randn(t, 2, 5, device=device)
        torch.testing.assert_close(value_and_gradients(compiled, inputs, grad), value_and_gradients(step, inputs, grad))
    assert counter.frame_count == 1


def test_exports_as_one_node_with_a_dynamic_token_count(device: torch.device) -> None:
    class Select(torch.nn.Module):
        def forward(self, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(product_topk(row, col, 5))

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    inputs = tuple(make_scores(4, 2, 11, dtype=torch.float32, device=device))
    program = torch.export.export(Select(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    assert torch.ops.ultramem.product_topk.default in {node.target for node in program.graph.nodes}
    inputs = make_scores(7, 2, 11, dtype=torch.float32, device=device)
    scores, addresses = program.module()(*inputs)
    expected = product_topk(*inputs, 5)
    assert torch.equal(addresses, expected.addresses)
    torch.testing.assert_close(scores, expected.scores)


SIDE = torch.zeros(2, 1, 6)
BAD = [
    ((SIDE[0], SIDE, 2), ValueError, "row_scores_THN must have rank 3 [T,H,N], got shape (1, 6)"),
    ((SIDE, SIDE[0], 2), ValueError, "col_scores_THN must have rank 3 [T,H,N], got shape (1, 6)"),
    ((None, SIDE, 2), TypeError, "row_scores_THN must be a torch.Tensor [T,H,N], got NoneType"),
    ((SIDE.long(), SIDE, 2), TypeError, "row_scores_THN must have a dtype of float32, bfloat16, float16, float64"),
    ((SIDE, SIDE.half(), 2), TypeError, "col_scores_THN must have the dtype of row_scores_THN (torch.float32)"),
    ((SIDE, SIDE[..., :5], 2), ValueError, "col_scores_THN must have shape (2, 1, 6)"),
    ((SIDE, SIDE.to("meta"), 2), ValueError, "col_scores_THN must be on the device of row_scores_THN (cpu), got meta"),
    ((SIDE, SIDE, 7), ValueError, "k must be at most the 6 scores of a side, got 7"),
    ((SIDE, SIDE, 0), ValueError, "k must be at least 1, got 0"),
    ((SIDE, SIDE, 2.0), TypeError, "k must be an int, got float"),
    ((torch.zeros(1, 1, 65537), torch.zeros(1, 1, 65537), 2), ValueError, "a side may have at most 65536 scores"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_arguments(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        product_topk(*args)


def test_kernels_name_what_they_do_not_support(device: torch.device) -> None:
    pytest.importorskip("triton")
    with use_implementation(Implementation.TRITON):
        with pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
            product_topk(*make_scores(1, 1, 4, dtype=torch.float64, device=device), 2)
        with pytest.raises(ValueError, match=r"k must be at most 1024.*got 1025.*Implementation\.ATEN"):
            product_topk(*make_scores(1, 1, 1025, dtype=torch.float32, device=device), 1025)
