"""grouped_mm: a product per group against a loop, with gradients, in every dtype, for empty and uneven groups."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ultramem import ops

ENDS = {
    "uneven": [3, 3, 10, 11],
    "all in one": [0, 0, 11, 11],
    "last ones empty": [11, 11, 11, 11],
}


def _inputs(dtype=torch.float32, ends=(3, 3, 10, 11), device="cpu"):
    torch.manual_seed(0)
    return (
        torch.randn(ends[-1], 8, dtype=dtype, device=device, requires_grad=True),
        torch.randn(4, 8, 24, dtype=dtype, device=device, requires_grad=True),
        torch.tensor(ends, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients_equal_a_loop(dtype, ends, device):
    inputs, weights, ends_E = _inputs(dtype, ends, device)
    upstream = torch.randn(11, 24, dtype=dtype, device=device)
    out = ops.grouped_mm(inputs, weights, ends_E)
    grads = torch.autograd.grad(out, (inputs, weights), upstream)
    exact = [each.detach().double().requires_grad_() for each in (inputs, weights)]
    expected = ops.reference.grouped_mm(*exact, ends_E)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for got, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert got.dtype == dtype
        # Sums of at most 24 products, each rounded once more on the way out.
        error = 24 * torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= error


def test_no_tokens():
    out = ops.grouped_mm(torch.randn(0, 8), torch.randn(4, 8, 24), torch.zeros(4, dtype=torch.int32))
    assert out.shape == (0, 24)


def test_opcheck():
    torch.library.opcheck(torch.ops.ultramem.grouped_mm.default, _inputs())
    torch.library.opcheck(torch.ops.ultramem.grouped_mm.default, _inputs(torch.float64))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic):
    frames = CompileCounter()
    compiled = torch.compile(
        lambda x, w, e: ops.grouped_mm(x, w, e).square().sum(), fullgraph=True, dynamic=dynamic, backend=frames
    )
    for last in (11, 13, 17) if dynamic else (11,):
        x, w, e = _inputs(ends=(3, 3, 10, last))
        compiled(x, w, e).backward()
        assert w.grad.shape == w.shape
    assert frames.frame_count == 1


def test_bad_arguments():
    x, w, e = _inputs()
    with pytest.raises(TypeError, match=r"ends_E must have dtype torch\.int32, got torch\.int64"):
        ops.grouped_mm(x, w, e.long())
    with pytest.raises(ValueError, match=r"inputs_TD must have shape \(11, 8\)"):
        ops.grouped_mm(x[:, :4], w, e)
    with pytest.raises(ValueError, match=r"D of weights_EDI must make rows of a multiple of 16 bytes .* got 7"):
        ops.grouped_mm(x[:, :7], w[:, :7], e)
    with pytest.raises(TypeError, match="weights_EDI must have the dtype of inputs_TD"):
        ops.grouped_mm(x, w.double(), e)
