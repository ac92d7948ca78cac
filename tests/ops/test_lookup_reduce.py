from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo.testing
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, lookup_reduce, reference

NAMES = ("pooled", "grad of values", "grad of scores")
# (T, K, N, D, C, E): odd sizes, one token, one row, blocks beyond a group of 4, cores of 1 to 4.
SIZES = [
    (3, 9, 11, 24, 3, 4),
    (1, 1, 1, 1, 1, 1),
    (2, 17, 5, 36, 4, 9),
    (4, 8, 64, 256, 2, 4),
    (2, 5, 3, 600, 1, 2),
]


def make_inputs(
    t: int, k: int, n: int, d: int, c: int, e: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table, virtual indices (with duplicates), scores, and a gradient of the pooled rows."""
    values = torch.randn(n, d).to(device, dtype)
    indices = torch.randint(n * e, (t, k)).to(device)
    if t and k > 1:
        indices[:, 1] = indices[:, 0]
    scores = torch.randn(t, k, c).to(device, dtype)
    return values, indices, scores, torch.randn(t, e, d).to(device, dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_value_and_gradients_equal_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], sparse_grad: bool
) -> None:
    if dtype == torch.float64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
    values, indices, scores, grad = make_inputs(*size, dtype=dtype, device=device)
    e = size[-1]

    def oracle(v: Tensor, s: Tensor) -> Tensor:
        return reference.lookup_reduce(v, indices, s, num_blocks=e)

    exact = value_and_gradients(oracle, as_float64([values, scores]), grad)
    eager = value_and_gradients(oracle, as_eager([values, scores]), grad)
    actual = value_and_gradients(
        lambda v, s: lookup_reduce(v, indices, s, num_blocks=e, sparse_grad=sparse_grad), [values, scores], grad
    )
    assert_as_exact_as_eager(NAMES, actual, eager, exact)


def test_float32_scores_on_a_bfloat16_table(implementation: Implementation, device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(3, 7, 10, 32, 2, 4, dtype=torch.bfloat16, device=device)
    scores = torch.randn_like(scores, dtype=torch.float32)

    def oracle(v: Tensor, s: Tensor) -> Tensor:
        return reference.lookup_reduce(v, indices, s, num_blocks=4)

    exact = value_and_gradients(oracle, as_float64([values, scores]), grad)
    pooled, grad_values, grad_scores = value_and_gradients(oracle, [values, scores.bfloat16()], grad)
    actual = value_and_gradients(lambda v, s: lookup_reduce(v, indices, s, num_blocks=4), [values, scores], grad)
    assert actual[2].dtype == torch.float32
    assert_as_exact_as_eager(NAMES, actual, (pooled, grad_values, grad_scores.float()), exact)


def test_frozen_table_still_gives_the_gradient_of_scores(implementation: Implementation, device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(3, 11, 6, 40, 2, 4, dtype=torch.float32, device=device)
    both = value_and_gradients(lambda v, s: lookup_reduce(v, indices, s, num_blocks=4), [values, scores], grad)
    alone = value_and_gradients(lambda s: lookup_reduce(values, indices, s, num_blocks=4), [scores], grad)
    torch.testing.assert_close(alone[1], both[2])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter of 0 * inf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_row_reaches_only_tokens_that_read_it(
    implementation: Implementation, device: torch.device, dtype: torch.dtype
) -> None:
    values = torch.ones(4, 8, device=device, dtype=dtype)
    values[0] = torch.inf
    indices = torch.tensor([[0, 2], [1, 2]], device=device)
    pooled = lookup_reduce(values, indices, torch.ones(2, 2, 1, device=device, dtype=dtype))
    assert pooled[0].isinf().all()
    assert torch.equal(pooled[1, 0], torch.full((8,), 2.0, device=device, dtype=dtype))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("t", "k"), [(0, 5), (2, 0)])
def test_nothing_to_pool(
    implementation: Implementation, device: torch.device, t: int, k: int, sparse_grad: bool
) -> None:
    values, indices, scores, grad = make_inputs(t, k, 7, 12, 2, 4, dtype=torch.float32, device=device)
    pooled, grad_values, grad_scores = value_and_gradients(
        lambda v, s: lookup_reduce(v, indices, s, num_blocks=4, sparse_grad=sparse_grad), [values, scores], grad
    )
    assert torch.equal(pooled, torch.zeros_like(pooled))
    assert pooled.shape == (t, 4, 12)
    assert torch.equal(grad_values, torch.zeros_like(values))
    assert grad_scores.shape == scores.shape


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_row_that_every_slot_shares(implementation: Implementation, device: torch.device, sparse_grad: bool) -> None:
    values, indices, scores, grad = make_inputs(5, 13, 9, 16, 2, 4, dtype=torch.float32, device=device)
    indices = torch.full_like(indices, 3 * 9 + 4)

    def oracle(v: Tensor, s: Tensor) -> Tensor:
        return reference.lookup_reduce(v, indices, s, num_blocks=4)

    exact = value_and_gradients(oracle, as_float64([values, scores]), grad)
    eager = value_and_gradients(oracle, [values, scores], grad)
    actual = value_and_gradients(
        lambda v, s: lookup_reduce(v, indices, s, num_blocks=4, sparse_grad=sparse_grad), [values, scores], grad
    )
    assert_as_exact_as_eager(NAMES, actual, eager, exact)
    assert actual[1][4].any()
    assert not actual[1][:4].any()


def test_sparse_gradient_names_each_touched_row_once(implementation: Implementation, device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(6, 9, 20, 8, 1, 4, dtype=torch.float32, device=device)
    values.requires_grad_()
    pooled = lookup_reduce(values, indices, scores, num_blocks=4, sparse_grad=True)
    (sparse,) = torch.autograd.grad(pooled, values, grad)
    assert sparse.layout == torch.sparse_coo
    assert torch.equal(sparse._indices()[0], torch.unique(indices % 20))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_repeated_backward_gives_the_same_bits(
    implementation: Implementation, device: torch.device, sparse_grad: bool
) -> None:
    values, indices, scores, grad = make_inputs(6, 20, 5, 48, 2, 4, dtype=torch.float32, device=device)
    first, second = (
        value_and_gradients(
            lambda v, s: lookup_reduce(v, indices, s, num_blocks=4, sparse_grad=sparse_grad), [values, scores], grad
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_past_two_to_the_31_elements(implementation: Implementation, device: torch.device) -> None:
    d, n = 1024, 2_300_000_000 // 1024
    values = torch.empty(n, d, dtype=torch.bfloat16, device=device)  # on a CPU: virtual memory, unread but for 3 rows
    assert values.numel() > 2**31
    rows = torch.tensor([2**31 // d, n - 1, 5], device=device)
    values[rows] = torch.randn(3, d, device=device).bfloat16()
    scores = torch.randn(1, 3, 2, device=device).bfloat16()
    small = values[rows]
    slots = torch.arange(3, device=device).unsqueeze(0)

    def pooled_and_gradients(table: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        table, weights = table.detach().requires_grad_(), scores.clone().requires_grad_()
        pooled = lookup_reduce(table, indices, weights, num_blocks=2, sparse_grad=True)
        grad_values, grad_scores = torch.autograd.grad(pooled.float().square().sum(), (table, weights))
        return pooled.detach(), grad_values._indices()[0], grad_values._values(), grad_scores

    far = pooled_and_gradients(values, rows.unsqueeze(0) + torch.tensor([[0, n, 0]], device=device))
    near = pooled_and_gradients(small, slots + torch.tensor([[0, 3, 0]], device=device))
    order = rows.argsort()
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[1], rows[order])
    assert torch.equal(far[2], near[2][order])
    assert torch.equal(far[3], near[3])


def test_gradcheck(device: torch.device) -> None:
    values, indices, scores, _ = make_inputs(3, 5, 6, 8, 2, 4, dtype=torch.float64, device=device)
    if device.type == "cuda":
        pytest.skip("float64 runs on the CPU path")
    assert torch.autograd.gradcheck(
        lambda v, s: lookup_reduce(v, indices, s, num_blocks=4), (values.requires_grad_(), scores.requires_grad_())
    )


def test_opcheck(device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(3, 5, 6, 8, 2, 4, dtype=torch.float32, device=device)
    values.requires_grad_()
    scores.requires_grad_()
    for sparse_grad in (False, True):
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        # Tracing the gradient by hand, as the last utility does, does not know sparse outputs.
        utilities += () if sparse_grad else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(
            torch.ops.ultramem.lookup_reduce.default, (values, indices, scores, 4, sparse_grad), test_utils=utilities
        )
    backward = (grad, values.detach(), indices, scores.detach())
    for need_values in (False, True):
        torch.library.opcheck(torch.ops.ultramem.lookup_reduce_backward.default, (*backward, need_values))
    torch.library.opcheck(torch.ops.ultramem.lookup_reduce_backward_rows.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_compiles_to_one_graph(device: torch.device, backend: str, dynamic: bool, sparse_grad: bool) -> None:
    if backend == "inductor" and dynamic != sparse_grad:
        pytest.skip("two inductor cases cover both values of both switches")
    torch._dynamo.reset()

    def step(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
        return lookup_reduce(v, i, s.sigmoid(), num_blocks=4, sparse_grad=sparse_grad) * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for t in (7, 3, 9) if dynamic else (7,):  # no other size is 7, which would tie the two
        values, indices, scores, grad = make_inputs(t, 5, 6, 8, 2, 4, dtype=torch.float32, device=device)
        expected = value_and_gradients(lambda v, s: step(v, indices, s), [values, scores], grad)  # noqa: B023
        actual = value_and_gradients(lambda v, s: compiled(v, indices, s), [values, scores], grad)  # noqa: B023
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_exports_as_one_node_with_a_dynamic_token_count(device: torch.device) -> None:
    class Pool(torch.nn.Module):
        def forward(self, v: Tensor, i: Tensor, s: Tensor) -> Tensor:
            return lookup_reduce(v, i, s, num_blocks=4)

    values, indices, scores, _ = make_inputs(4, 5, 6, 8, 2, 4, dtype=torch.float32, device=device)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(Pool(), (values, indices, scores), dynamic_shapes=(None, {0: tokens}, {0: tokens}))
    assert torch.ops.ultramem.lookup_reduce.default in {node.target for node in program.graph.nodes}
    _, indices, scores, _ = make_inputs(7, 5, 6, 8, 2, 4, dtype=torch.float32, device=device)
    torch.testing.assert_close(
        program.module()(values, indices, scores), lookup_reduce(values, indices, scores, num_blocks=4)
    )


TABLE = torch.zeros(6, 8)
INDICES = torch.zeros(2, 3, dtype=torch.int64)
SCORES = torch.zeros(2, 3, 2)
BAD = [
    ((TABLE[0], INDICES, SCORES), {}, ValueError, "values_ND must have rank 2 [N,D], got shape (8,)"),
    (([1.0], INDICES, SCORES), {}, TypeError, "values_ND must be a torch.Tensor [N,D], got list"),
    ((TABLE, INDICES[0], SCORES), {}, ValueError, "indices_TK must have rank 2 [T,K], got shape (3,)"),
    ((TABLE, INDICES, SCORES[..., 0]), {}, ValueError, "scores_TKC must have rank 3 [T,K,C], got shape (2, 3)"),
    (
        (TABLE.int(), INDICES, SCORES),
        {},
        TypeError,
        "values_ND must have a dtype of float32, bfloat16, float16, float64",
    ),
    ((TABLE, INDICES.int(), SCORES), {}, TypeError, "indices_TK must have dtype torch.int64, got torch.int32"),
    ((TABLE, INDICES, SCORES.half()), {}, TypeError, "scores_TKC must have dtype torch.float32 or that of values_ND"),
    ((TABLE, INDICES, SCORES[:1]), {}, ValueError, "scores_TKC must have shape (2, 3, 2)"),
    (
        (TABLE, INDICES.to("meta"), SCORES),
        {},
        ValueError,
        "indices_TK must be on the device of values_ND (cpu), got meta",
    ),
    (
        (TABLE, INDICES, torch.zeros(2, 3, 3)),
        {},
        ValueError,
        "scores_TKC must have a number of cores that divides the value dim 8",
    ),
    (
        (TABLE, INDICES, SCORES[..., :0]),
        {},
        ValueError,
        "scores_TKC must have a number of cores that divides the value dim 8, got 0",
    ),
    ((TABLE, INDICES, SCORES), {"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
    ((TABLE, INDICES, SCORES), {"num_blocks": 2.0}, TypeError, "num_blocks must be an int, got float"),
    (
        (TABLE, INDICES + 6, SCORES),
        {"checked": True},
        ValueError,
        "indices_TK must be in [0, 6), got 6 (6 out of range)",
    ),
    ((TABLE, INDICES - 1, SCORES), {"checked": True}, ValueError, "indices_TK must be in [0, 6), got -1"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_arguments(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lookup_reduce(*args, **options)


def test_kernels_refuse_float64_and_say_what_does_not(device: torch.device) -> None:
    pytest.importorskip("triton")
    from ultramem.ops import use_implementation

    values, indices, scores, _ = make_inputs(2, 3, 6, 8, 2, 4, dtype=torch.float64, device=device)
    with use_implementation(Implementation.TRITON), pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
        lookup_reduce(values, indices, scores, num_blocks=4)
