from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, lookup_dot, lookup_reduce, reference, use_implementation

NAMES = ("dots", "grad of rows", "grad of query")
BLOCKS = 4  # of the virtual table that the indices are drawn from
# (T, K, N, D): odd sizes, one of everything, more columns than a tile, more slots than a tile.
SIZES = [(3, 9, 11, 24), (1, 1, 1, 1), (2, 17, 5, 36), (4, 8, 64, 256), (2, 5, 3, 600)]


def make_inputs(
    t: int, k: int, n: int, d: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table, virtual indices (with duplicates), query, and a gradient of the dot products."""
    rows = torch.randn(n, d).to(device, dtype)
    indices = torch.randint(n * BLOCKS, (t, k)).to(device)
    if t and k > 1:
        indices[:, 1] = indices[:, 0]
    return rows, indices, torch.randn(t, d).to(device, dtype), torch.randn(t, k).to(device, dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_value_and_gradients_equal_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], sparse_grad: bool
) -> None:
    if dtype == torch.float64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
    rows, indices, query, grad = make_inputs(*size, dtype=dtype, device=device)

    def oracle(r: Tensor, q: Tensor) -> Tensor:
        return reference.lookup_dot(r, indices, q)

    exact = value_and_gradients(oracle, as_float64([rows, query]), grad)
    eager = value_and_gradients(oracle, as_eager([rows, query]), grad)
    actual = value_and_gradients(lambda r, q: lookup_dot(r, indices, q, sparse_grad=sparse_grad), [rows, query], grad)
    assert actual[0].dtype == dtype
    assert_as_exact_as_eager(NAMES, actual, eager, exact)


def test_all_blocks_of_a_row_are_the_same_row(implementation: Implementation, device: torch.device) -> None:
    rows, _, query, _ = make_inputs(2, 1, 6, 8, dtype=torch.float32, device=device)
    indices = torch.arange(6 * BLOCKS, device=device).expand(2, -1)
    dots = lookup_dot(rows, indices, query).view(2, BLOCKS, 6)
    assert torch.equal(dots, dots[:, :1].expand_as(dots))
    torch.testing.assert_close(dots[:, 0], query @ rows.T)


@pytest.mark.parametrize("frozen", [0, 1], ids=["rows", "query"])
def test_either_input_alone_gets_its_gradient(
    implementation: Implementation, device: torch.device, frozen: int
) -> None:
    rows, indices, query, grad = make_inputs(3, 5, 6, 8, dtype=torch.float32, device=device)
    both = value_and_gradients(lambda r, q: lookup_dot(r, indices, q), [rows, query], grad)
    call = (lambda q: lookup_dot(rows, indices, q)) if frozen == 0 else (lambda r: lookup_dot(r, indices, query))
    alone = value_and_gradients(call, [(rows, query)[1 - frozen]], grad)
    assert torch.equal(alone[1], both[2 - frozen])


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("t", "k"), [(0, 5), (2, 0)])
def test_nothing_to_look_up(
    implementation: Implementation, device: torch.device, t: int, k: int, sparse_grad: bool
) -> None:
    rows, indices, query, grad = make_inputs(t, k, 7, 12, dtype=torch.float32, device=device)
    dots, grad_rows, grad_query = value_and_gradients(
        lambda r, q: lookup_dot(r, indices, q, sparse_grad=sparse_grad), [rows, query], grad
    )
    assert dots.shape == (t, k)
    assert torch.equal(grad_rows, torch.zeros_like(rows))
    assert torch.equal(grad_query, torch.zeros_like(query))


def test_sparse_gradient_names_each_touched_row_once(implementation: Implementation, device: torch.device) -> None:
    rows, indices, query, grad = make_inputs(6, 9, 20, 8, dtype=torch.float32, device=device)
    rows.requires_grad_()
    (sparse,) = torch.autograd.grad(lookup_dot(rows, indices, query, sparse_grad=True), rows, grad)
    assert sparse.layout == torch.sparse_coo
    assert torch.equal(sparse._indices()[0], torch.unique(indices % 20))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_repeated_backward_gives_the_same_bits(
    implementation: Implementation, device: torch.device, sparse_grad: bool
) -> None:
    rows, indices, query, grad = make_inputs(6, 20, 5, 48, dtype=torch.float32, device=device)
    first, second = (
        value_and_gradients(lambda r, q: lookup_dot(r, indices, q, sparse_grad=sparse_grad), [rows, query], grad)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_past_two_to_the_31_elements(implementation: Implementation, device: torch.device) -> None:
    d, n = 1024, 2_300_000_000 // 1024
    table = torch.empty(n, d, dtype=torch.bfloat16, device=device)  # on a CPU: virtual memory, unread but for 3 rows
    assert table.numel() > 2**31
    rows = torch.tensor([2**31 // d, n - 1, 5], device=device)
    table[rows] = torch.randn(3, d, device=device).bfloat16()
    query = torch.randn(1, d, device=device).bfloat16()
    small = table[rows]
    slots = torch.arange(3, device=device).unsqueeze(0)

    def dots_and_gradients(table: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        table, x = table.detach().requires_grad_(), query.clone().requires_grad_()
        dots = lookup_dot(table, indices, x, sparse_grad=True)
        grad_rows, grad_query = torch.autograd.grad(dots.float().square().sum(), (table, x))
        return dots.detach(), grad_rows._indices()[0], grad_rows._values(), grad_query

    far = dots_and_gradients(table, rows.unsqueeze(0) + torch.tensor([[0, n, 0]], device=device))
    near = dots_and_gradients(small, slots + torch.tensor([[0, 3, 0]], device=device))
    order = rows.argsort()
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[1], rows[order])
    assert torch.equal(far[2], near[2][order])
    assert torch.equal(far[3], near[3])


def test_gradcheck() -> None:
    rows, indices, query, _ = make_inputs(3, 5, 6, 8, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda r, q: lookup_dot(r, indices, q), (rows.requires_grad_(), query.requires_grad_())
    )


def test_opcheck(device: torch.device) -> None:
    rows, indices, query, _ = make_inputs(3, 5, 6, 8, dtype=torch.float32, device=device)
    leaves = rows.requires_grad_(), indices, query.requires_grad_()
    for sparse_grad in (False, True):
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        # Tracing the gradient by hand, as the last utility does, does not know sparse outputs.
        utilities += () if sparse_grad else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(torch.ops.ultramem.lookup_dot.default, (*leaves, sparse_grad), test_utils=utilities)


@pytest.mark.parametrize(
    ("backend", "dynamic", "sparse_grad"),
    [
        ("aot_eager", False, False),
        ("aot_eager", True, False),
        ("aot_eager", True, True),
        ("inductor", True, False),
    ],
    ids=str,
)
def test_one_neuron_experts_compile_to_one_graph(
    device: torch.device, backend: str, dynamic: bool, sparse_grad: bool
) -> None:
    torch._dynamo.reset()
    up = torch.randn(6, 8, device=device)

    def experts(down: Tensor, i: Tensor, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(lookup_dot(down, i, x, sparse_grad=sparse_grad))
        return lookup_reduce(up, i, hidden.unsqueeze(-1), num_blocks=BLOCKS)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(experts, fullgraph=True, dynamic=dynamic, backend=counter)
    for t in (7, 3, 9) if dynamic else (7,):  # no other size is 7, which would tie the two
        rows, indices, query, _ = make_inputs(t, 5, 6, 8, dtype=torch.float32, device=device)
        grad = torch.randn(t, BLOCKS, 8, device=device)
        expected = value_and_gradients(lambda r, q: experts(r, indices, q), [rows, query], grad)  # noqa: B023
        actual = value_and_gradients(lambda r, q: compiled(r, indices, q), [rows, query], grad)  # noqa: B023
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


TABLE = torch.zeros(6, 8)
INDICES = torch.zeros(2, 3, dtype=torch.int64)
QUERY = torch.zeros(2, 8)
BAD = [
    ((TABLE[0], INDICES, QUERY), {}, ValueError, "rows_ND must have rank 2 [N,D], got shape (8,)"),
    (([1.0], INDICES, QUERY), {}, TypeError, "rows_ND must be a torch.Tensor [N,D], got list"),
    ((TABLE, INDICES[0], QUERY), {}, ValueError, "indices_TK must have rank 2 [T,K], got shape (3,)"),
    ((TABLE, INDICES, QUERY[0]), {}, ValueError, "query_TD must have rank 2 [T,D], got shape (8,)"),
    ((TABLE.int(), INDICES, QUERY), {}, TypeError, "rows_ND must have a dtype of float32, bfloat16, float16, float64"),
    ((TABLE, INDICES.int(), QUERY), {}, TypeError, "indices_TK must have dtype torch.int64, got torch.int32"),
    ((TABLE, INDICES, QUERY.half()), {}, TypeError, "query_TD must have the dtype of rows_ND (torch.float32)"),
    ((TABLE, INDICES, QUERY[:1]), {}, ValueError, "query_TD must have shape (2, 8) (T of indices_TK, D of rows_ND)"),
    ((TABLE, INDICES, QUERY[:, :7]), {}, ValueError, "query_TD must have shape (2, 8)"),
    ((TABLE, INDICES.to("meta"), QUERY), {}, ValueError, "indices_TK must be on the device of rows_ND (cpu), got meta"),
    ((TABLE, INDICES - 1, QUERY), {"checked": True}, ValueError, "got -1 (6 out of range)"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_arguments(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lookup_dot(*args, **options)


def test_kernels_refuse_float64_and_say_what_does_not(device: torch.device) -> None:
    pytest.importorskip("triton")
    rows, indices, query, _ = make_inputs(2, 3, 6, 8, dtype=torch.float64, device=device)
    with use_implementation(Implementation.TRITON), pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
        lookup_dot(rows, indices, query)
