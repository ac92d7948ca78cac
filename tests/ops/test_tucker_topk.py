from __future__ import annotations

import math
import re

import pytest
import torch
import torch._dynamo.testing
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, reference, tucker_topk, use_implementation

NAMES = ("scores", "grad of row scores", "grad of column scores", "grad of cores")
RULES = ("one_tailed", "two_tailed")
# (T, H, R, N, C, K): ranks and cores 1 to 4, odd sides, k = n, one cell, tails that overlap.
SIZES = [(2, 2, 2, 37, 2, 5), (1, 1, 1, 4, 1, 4), (1, 2, 3, 9, 4, 6), (1, 1, 4, 64, 3, 8), (1, 1, 2, 1, 1, 1)]


def make_inputs(
    t: int, h: int, r: int, n: int, c: int, *, dtype: torch.dtype, device: torch.device, integers: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """[row scores, column scores, cores] and [u, t]; whole numbers make every score exact, and many of them equal."""

    def draw(*shape: int) -> Tensor:
        x = torch.randint(-2, 3, shape).double() if integers else torch.randn(shape)
        return x.to(device, dtype)

    return [draw(t, h, r, n), draw(t, h, r, n), draw(h, c, r, r)], [draw(h, r), draw(h, r)]


def scores_at(addresses: Tensor, n: int):
    """row^T core col at given addresses, as plain indexing and a sum over ranks."""

    def score(row: Tensor, col: Tensor, cores: Tensor) -> Tensor:
        where = (*row.shape[:3], addresses.shape[-1])
        row = row.gather(-1, (addresses // n).unsqueeze(2).expand(where))
        col = col.gather(-1, (addresses % n).unsqueeze(2).expand(where))
        return torch.einsum("thrk,hcrs,thsk->thkc", row, cores, col)

    return score


@pytest.mark.parametrize("candidates", RULES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_value_and_gradients_equal_the_oracle(
    implementation: Implementation, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], candidates: str
) -> None:
    if dtype == torch.float64 and implementation is Implementation.TRITON:
        pytest.skip("the kernels refuse float64")
    t, h, r, n, c, k = size
    inputs, pair = make_inputs(t, h, r, n, c, dtype=dtype, device=device)
    expected = reference.tucker_topk(*as_float64(inputs), *as_float64(pair), k, candidates=candidates)
    assert torch.equal(tucker_topk(*inputs, *pair, k, candidates=candidates).addresses, expected.addresses)

    grad = torch.randn(t, h, k, c).to(device, dtype)
    exact = value_and_gradients(scores_at(expected.addresses, n), as_float64(inputs), grad)
    eager = value_and_gradients(scores_at(expected.addresses, n), as_eager(inputs), grad)
    actual = value_and_gradients(lambda *x: tucker_topk(*x, *pair, k, candidates=candidates).scores, inputs, grad)
    torch.testing.assert_close(exact[0], expected.scores)
    assert_as_exact_as_eager(NAMES[:3], actual[:3], eager[:3], exact[:3])
    # A core's gradient adds up products that cancel, on a GPU with other roundings than eager's; seen on an H100.
    lost_bits = 2 if implementation is Implementation.TRITON and device.type == "cuda" else 0
    assert_as_exact_as_eager(NAMES[3:], actual[3:], eager[3:], exact[3:], lost_bits=lost_bits)


@pytest.mark.parametrize("candidates", RULES)
@pytest.mark.parametrize(("n", "k"), [(16, 16), (21, 6), (5, 1)])
def test_of_equal_scores_the_lower_position_is_kept_and_first(
    implementation: Implementation, device: torch.device, n: int, k: int, candidates: str
) -> None:
    inputs, pair = make_inputs(2, 1, 2, n, 2, dtype=torch.float32, device=device, integers=True)
    expected = reference.tucker_topk(*as_float64(inputs), *as_float64(pair), k, candidates=candidates)
    actual = tucker_topk(*inputs, *pair, k, candidates=candidates)
    assert torch.equal(actual.addresses, expected.addresses)
    assert torch.equal(actual.scores.double(), expected.scores)
    zeros = [torch.zeros_like(x) for x in (*inputs, *pair)]
    assert torch.equal(tucker_topk(*zeros, k).addresses[0, 0], reference.tucker_topk(*zeros, k).addresses[0, 0])


@pytest.mark.parametrize("integers", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize(("r", "n", "k"), [(2, 40, 5), (2, 9, 8), (3, 25, 7)])
def test_two_tails_do_not_depend_on_the_sign_of_the_singular_pair(
    implementation: Implementation, device: torch.device, r: int, n: int, k: int, integers: bool
) -> None:
    inputs, (u, t) = make_inputs(2, 2, r, n, 2, dtype=torch.float32, device=device, integers=integers)
    plus = tucker_topk(*inputs, u, t, k, candidates="two_tailed")
    minus = tucker_topk(*inputs, -u, -t, k, candidates="two_tailed")
    assert torch.equal(plus.addresses, minus.addresses)
    assert torch.equal(plus.scores, minus.scores)


@pytest.mark.parametrize("candidates", RULES)
@pytest.mark.parametrize("wide", [6, 8, 16])
def test_the_first_of_more_slots_are_the_best_of_all_candidates(
    implementation: Implementation, device: torch.device, wide: int, candidates: str
) -> None:
    m, n = 4, 21
    (row, col, cores), (u, t) = make_inputs(1, 1, 2, n, 2, dtype=torch.float32, device=device)
    top = tucker_topk(row, col, cores, u, t, wide, candidates=candidates)
    grid = (row[0, 0].T @ cores[0].sum(0) @ col[0, 0]).flatten()
    by_row, by_col = (u[0] @ row[0, 0]).argsort(descending=True), (t[0] @ col[0, 0]).argsort(descending=True)
    crossed = [(by_row[:wide], by_col[:wide])]
    if candidates == "two_tailed":
        tail = math.ceil(0.71 * wide)
        crossed = [(by_row[:tail], by_col[:tail]), (by_row[-tail:], by_col[-tail:])]
    cells = torch.cat([(rows.unsqueeze(1) * n + cols).flatten() for rows, cols in crossed]).unique()
    best = cells[grid[cells].argsort(descending=True)[:m]]
    assert torch.equal(top.addresses[0, 0, :m], best)
    torch.testing.assert_close(top.scores[0, 0, :m].sum(-1), grid[best])


def test_two_tails_find_what_one_tail_cannot() -> None:
    # Rank 1: the best cells are products of two large negatives, which the positive tail never sees.
    row = torch.tensor([3.0, 1.0, -9.0, -8.0]).view(1, 1, 1, 4)
    ones = torch.ones(1, 1)
    one, two = (
        tucker_topk(row, row, ones.view(1, 1, 1, 1), ones, ones, 2, candidates=rule).scores.max() for rule in RULES
    )
    assert one == 9.0
    assert two == 81.0


@pytest.mark.parametrize("candidates", RULES)
def test_no_tokens(implementation: Implementation, device: torch.device, candidates: str) -> None:
    inputs, pair = make_inputs(0, 2, 2, 9, 2, dtype=torch.float32, device=device)
    value, *grads = value_and_gradients(
        lambda *x: tucker_topk(*x, *pair, 3, candidates=candidates).scores, inputs, torch.zeros(0, 2, 3, 2)
    )
    assert value.shape == (0, 2, 3, 2)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[2].any()


def test_repeated_backward_gives_the_same_bits(implementation: Implementation, device: torch.device) -> None:
    if implementation is Implementation.ATEN and device.type == "cuda":
        pytest.skip("PyTorch's gather adds its gradient by atomics on a GPU")
    inputs, pair = make_inputs(3, 1, 2, 12, 2, dtype=torch.float32, device=device)
    grad = torch.randn(3, 1, 12, 2, device=device)
    first, second = (value_and_gradients(lambda *x: tucker_topk(*x, *pair, 12).scores, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_singular_pair_gets_no_gradient(device: torch.device) -> None:
    inputs, pair = make_inputs(1, 1, 2, 8, 1, dtype=torch.float32, device=device)
    u, t = (x.requires_grad_() for x in pair)
    scores = tucker_topk(inputs[0].requires_grad_(), *inputs[1:], u, t, 3).scores
    scores.sum().backward()
    assert u.grad is None
    assert t.grad is None


@pytest.mark.parametrize("candidates", RULES)
def test_gradcheck(candidates: str) -> None:
    inputs, pair = make_inputs(2, 2, 2, 11, 2, dtype=torch.float64, device=torch.device("cpu"))
    leaves = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(lambda *x: tucker_topk(*x, *pair, 4, candidates=candidates).scores, leaves)


def test_opcheck(device: torch.device) -> None:
    inputs, pair = make_inputs(2, 2, 2, 11, 2, dtype=torch.float32, device=device)
    top = tucker_topk(*inputs, *pair, 5)
    torch.library.opcheck(
        torch.ops.ultramem.tucker_topk_backward.default, (torch.randn_like(top.scores), *inputs, top.addresses)
    )
    leaves = [x.requires_grad_() for x in inputs]
    for rule in RULES:
        torch.library.opcheck(torch.ops.ultramem.tucker_topk.default, (*leaves, *pair, 5, rule))


@pytest.mark.parametrize(
    ("backend", "dynamic", "candidates"),
    [
        ("aot_eager", False, "one_tailed"),
        ("aot_eager", True, "one_tailed"),
        ("aot_eager", True, "two_tailed"),
        ("inductor", True, "two_tailed"),
    ],
    ids=str,
)
def test_compiles_to_one_graph(device: torch.device, backend: str, dynamic: bool, candidates: str) -> None:
    torch._dynamo.reset()
    _, pair = make_inputs(0, 2, 3, 11, 2, dtype=torch.float32, device=device)

    def step(row: Tensor, col: Tensor, cores: Tensor) -> Tensor:
        return tucker_topk(row * 2, col, cores, *pair, 5, candidates=candidates).scores.sigmoid()

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for t in (7, 4, 9) if dynamic else (7,):
        inputs, _ = make_inputs(t, 2, 3, 11, 2, dtype=torch.float32, device=device)
        grad = torch.randn(t, 2, 5, 2, device=device)
        torch.testing.assert_close(value_and_gradients(compiled, inputs, grad), value_and_gradients(step, inputs, grad))
    assert counter.frame_count == 1


def test_exports_as_one_node_with_a_dynamic_token_count(device: torch.device) -> None:
    class Select(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(tucker_topk(*inputs, 5))

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    inputs, pair = make_inputs(4, 2, 2, 11, 2, dtype=torch.float32, device=device)
    shapes = (({0: tokens}, {0: tokens}, None, None, None),)
    program = torch.export.export(Select(), (*inputs, *pair), dynamic_shapes=shapes)
    assert torch.ops.ultramem.tucker_topk.default in {node.target for node in program.graph.nodes}
    inputs, pair = make_inputs(7, 2, 2, 11, 2, dtype=torch.float32, device=device)
    scores, addresses = program.module()(*inputs, *pair)
    expected = tucker_topk(*inputs, *pair, 5)
    assert torch.equal(addresses, expected.addresses)
    torch.testing.assert_close(scores, expected.scores)


SIDE, CORES, PAIR = torch.zeros(2, 1, 3, 6), torch.zeros(1, 2, 3, 3), torch.zeros(1, 3)
BAD = [
    (
        (SIDE[0], SIDE, CORES, PAIR, PAIR, 2),
        ValueError,
        "row_scores_THRN must have rank 4 [T,H,R,N], got shape (1, 3, 6)",
    ),
    ((SIDE, 3, CORES, PAIR, PAIR, 2), TypeError, "col_scores_THRN must be a torch.Tensor [T,H,R,N], got int"),
    ((SIDE, SIDE, CORES[0], PAIR, PAIR, 2), ValueError, "cores_HCRR must have rank 4 [H,C,R,R], got shape (2, 3, 3)"),
    ((SIDE, SIDE, CORES, PAIR[0], PAIR, 2), ValueError, "u_HR must have rank 2 [H,R], got shape (3,)"),
    ((SIDE, SIDE, CORES, PAIR, PAIR[:, :2], 2), ValueError, "t_HR must have shape (1, 3) ([H,R]), got (1, 2)"),
    ((SIDE, SIDE, CORES[..., :2], PAIR, PAIR, 2), ValueError, "cores_HCRR must have shape (1, 2, 3, 3)"),
    ((SIDE, SIDE, CORES[:, :0], PAIR, PAIR, 2), ValueError, "the number of cores must be at least 1, got 0"),
    ((SIDE.int(), SIDE, CORES, PAIR, PAIR, 2), TypeError, "row_scores_THRN must have a dtype of float32"),
    ((SIDE, SIDE.half(), CORES, PAIR, PAIR, 2), TypeError, "col_scores_THRN must have the dtype of row_scores_THRN"),
    ((SIDE, SIDE, CORES.int(), PAIR, PAIR, 2), TypeError, "cores_HCRR must have a dtype of float32"),
    ((SIDE, SIDE, CORES, PAIR.int(), PAIR, 2), TypeError, "u_HR must have a dtype of float32"),
    (
        (SIDE, SIDE, CORES.to("meta"), PAIR, PAIR, 2),
        ValueError,
        "cores_HCRR must be on the device of row_scores_THRN (cpu)",
    ),
    ((SIDE, SIDE, CORES, PAIR, PAIR, 7), ValueError, "k must be at most the 6 scores of a side, got 7"),
    ((SIDE, SIDE, CORES, PAIR, PAIR, 0), ValueError, "k must be at least 1, got 0"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_bad_arguments(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tucker_topk(*args)


def test_unknown_candidates() -> None:
    message = "candidates must be one of one_tailed, two_tailed, got 'three_tailed'"
    with pytest.raises(ValueError, match=re.escape(message)):
        tucker_topk(SIDE, SIDE, CORES, PAIR, PAIR, 2, candidates="three_tailed")


def test_kernels_refuse_float64_and_say_what_does_not(device: torch.device) -> None:
    pytest.importorskip("triton")
    inputs, pair = make_inputs(1, 1, 2, 6, 1, dtype=torch.float64, device=device)
    with use_implementation(Implementation.TRITON), pytest.raises(TypeError, match=r"float64.*Implementation\.ATEN"):
        tucker_topk(*inputs, *pair, 2)
