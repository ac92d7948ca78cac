"""lookup_dot_lazy: products with the rows that a dense optimiser would have, and their gradients."""

import pytest
import torch
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients

from ultramem import ops
from ultramem.ops import LazyRows

N, D, T, K = 13, 6, 5, 4


def _lazy(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(3)

    def random(*shape, **kwargs):
        return torch.rand(*shape, generator=generator, **kwargs)

    schedule = torch.stack([-0.01 * torch.arange(8), random(8) * 0.1, random(8) * 0.1], dim=1).double()
    schedule[7, 1:] = 0  # the momentum of a row that is up to date has moved it nowhere since
    tensors = (
        schedule,
        torch.tensor(7),
        torch.randint(0, 8, (N,), generator=generator, dtype=torch.int32),
        random(N, D, dtype=dtype) - 0.5,
        random(N, D, dtype=dtype) + 0.1,
    )
    return LazyRows(*(tensor.to(device) for tensor in tensors), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients_equal_the_oracle(dtype, device):
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels refuse float64")
    torch.manual_seed(0)
    lazy = _lazy(dtype, device)
    rows, query = torch.randn(N, D, dtype=dtype, device=device), torch.randn(T, D, dtype=dtype, device=device)
    indices = torch.randint(0, 3 * N, (T, K), device=device)
    indices[:, 0] = 2  # a row that every token reads
    upstream = torch.randn(T, K, dtype=dtype, device=device)

    def oracle(inputs):
        state = LazyRows(*(x.to(inputs[0].dtype) if x is lazy[3] or x is lazy[4] else x for x in lazy))
        return value_and_gradients(
            lambda r, q: ops.reference.lookup_dot_lazy(r, state, indices, q), inputs, upstream.to(inputs[0].dtype)
        )

    exact, eager = oracle(as_float64([rows, query])), oracle(as_eager([rows, query]))
    actual = value_and_gradients(lambda r, q: ops.lookup_dot_lazy(r, lazy, indices, q), [rows, query], upstream)
    assert not torch.allclose(exact[0].to(dtype), ops.reference.lookup_dot(rows, indices, query))  # rows are stale
    assert_as_exact_as_eager(("products", "grad of rows", "grad of query"), actual, eager, exact)


def test_the_gradient_of_rows_is_sparse(device):
    lazy = _lazy(torch.float32, device)
    rows = torch.randn(N, D, device=device, requires_grad=True)
    out = ops.lookup_dot_lazy(rows, lazy, torch.zeros(T, K, dtype=torch.int64, device=device), rows[:T].detach())
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert grad.layout is torch.sparse_coo
    assert grad.coalesce().indices().tolist() == [[0]]


def test_no_tokens():
    query = torch.randn(0, D, requires_grad=True)
    out = ops.lookup_dot_lazy(torch.randn(N, D), _lazy(torch.float32), torch.zeros(0, K, dtype=torch.int64), query)
    assert out.shape == (0, K)


def test_opcheck():
    lazy = _lazy(torch.float32)
    rows, query = torch.randn(N, D), torch.randn(T, D, requires_grad=True)
    torch.library.opcheck(torch.ops.ultramem.lookup_dot_lazy.default, (rows, torch.randint(0, N, (T, K)), query, *lazy))


def test_bad_arguments():
    lazy = _lazy(torch.float32)
    with pytest.raises(ValueError, match=r"lazy\.last_step_N must have shape \(12,\)"):
        ops.lookup_dot_lazy(torch.randn(12, D), lazy, torch.zeros(T, K, dtype=torch.int64), torch.randn(T, D))
