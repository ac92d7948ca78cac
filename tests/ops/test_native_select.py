"""What only the C++ kernels of selection could get wrong: threads, sizes past the small ones, scores not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from op_parity import value_and_gradients
from torch import Tensor

from ultramem.ops import Implementation, product_topk, reference, tucker_topk, use_implementation


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with use_implementation(Implementation.NATIVE):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(t: int, h: int, r: int, n: int, c: int, *, whole: bool = False) -> tuple[Tensor, ...]:
    shapes = ((t, h, r, n), (t, h, r, n), (h, c, r, r), (h, r), (h, r))
    return tuple(torch.randint(-2, 3, shape).float() if whole else torch.randn(shape) for shape in shapes)


# (N, K): sides of many vectors and one too many; more kept slots than are ranked by counting; every one of a side.
@pytest.mark.parametrize(("n", "k"), [(513, 42), (1100, 16), (300, 200), (170, 170)])
@pytest.mark.parametrize("whole", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
def test_long_sides(n: int, k: int, whole: bool, candidates: str) -> None:
    inputs = draw(2, 1, 2, n, 2, whole=whole)
    expected = reference.tucker_topk(*(x.double() for x in inputs), k, candidates=candidates)
    top = tucker_topk(*inputs, k, candidates=candidates)
    assert torch.equal(top.addresses, expected.addresses)
    torch.testing.assert_close(top.scores.double(), expected.scores, rtol=1e-5, atol=1e-5)
    row, col = inputs[0][:, :, 0], inputs[1][:, :, 0]
    assert torch.equal(product_topk(row, col, k).addresses, reference.product_topk(row, col, k).addresses)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = draw(75, 2, 2, 90, 2)
    grad = torch.randn(75, 2, 9, 2)

    def run(number: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(number)
        tucker = value_and_gradients(lambda *x: tucker_topk(*x, *inputs[3:], 9).scores, inputs[:3], grad)
        sides = [x[:, :, 0] for x in inputs[:2]]
        return *tucker, *value_and_gradients(lambda *x: product_topk(*x, 9).scores, sides, grad[..., 0])

    assert all(torch.equal(one, two) for one, two in zip(run(1), run(2), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("candidates", ["one_tailed", "two_tailed"])
def test_scores_that_are_not_finite_keep_addresses_in_the_grid(bad: float, candidates: str) -> None:
    row, col, *others = draw(3, 2, 2, 50, 2)
    row[0, 0, 0, :30] = bad
    row[1, 1] = bad
    col[2, 0, 1, 7] = bad
    for addresses in (
        tucker_topk(row, col, *others, 9, candidates=candidates).addresses,
        product_topk(row[:, :, 0], col[:, :, 0], 9).addresses,
    ):
        assert addresses.min() >= 0
        assert addresses.max() < 50 * 50
        assert (addresses.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_once_whatever_the_number_of_tokens(dynamic: bool) -> None:
    torch._dynamo.reset()
    _, _, _, u, v = draw(0, 2, 2, 40, 2)

    def scores(row: Tensor, col: Tensor, cores: Tensor) -> Tensor:
        top = tucker_topk(row * 2, col, cores, u, v, 7)
        return top.scores.sum(-1) + product_topk(row[:, :, 0], col[:, :, 1], 7).scores

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(scores, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (7, 4, 33) if dynamic else (7,):
        inputs, grad = draw(tokens, 2, 2, 40, 2)[:3], torch.randn(tokens, 2, 7)
        torch.testing.assert_close(
            value_and_gradients(compiled, inputs, grad), value_and_gradients(scores, inputs, grad)
        )
    assert counter.frame_count == 1
