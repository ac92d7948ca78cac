"""The lookup's kernels by variant: tiles that dispatch knows, slots in pieces, runs over windows, quantised rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_parity import as_eager, as_float64, assert_as_exact_as_eager, value_and_gradients
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from ultramem.ops import (
    Implementation,
    lookup_dot,
    lookup_reduce,
    lookup_reduce_quantized,
    permute_addresses,
    quantize_rows,
    reference,
    use_implementation,
)
from ultramem.ops.triton import _slots, dispatch, lookup_product, lookup_product_quantized, row_gradient, score_gradient
from ultramem.ops.triton import lookup_reduce as forward
from ultramem.ops.triton import lookup_reduce_quantized as quantized

SEED = 5
# Of the paper's Table 6: slots of a token, columns of a core.
PAPER = {"151m": (32, 256), "680m": (70, 384), "1.6b": (84, 512)}


@pytest.fixture(autouse=True)
def _kernels() -> Any:
    with use_implementation(Implementation.TRITON):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty

    def poison(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def use_tile(monkeypatch: pytest.MonkeyPatch, tile: Callable[[dispatch.Lookup], dispatch.PoolTile]) -> None:
    for module in (forward, quantized):
        monkeypatch.setattr(module, "pool_tile", lambda tokens, lookup: tile(lookup))


def make_inputs(
    t: int, k: int, n: int, d: int, c: int, e: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table, virtual indices, scores, and a gradient of the pooled rows; a third of the slots share a row."""
    indices = torch.randint(n * e, (t, k), device=device)
    indices[torch.rand(t, k, device=device) < 0.3] = n * e - 1
    values, scores = torch.randn(n, d, device=device).to(dtype), torch.randn(t, k, c, device=device).to(dtype)
    return values, indices, scores, torch.randn(t, e, d, device=device).to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", dispatch.TILES)
@pytest.mark.parametrize(("c", "e", "x"), [(1, 1, 7), (2, 4, 24), (1, 6, 36)], ids=str)
def test_every_tile_pools_the_oracle(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tile: Any, c: int, e: int, x: int
) -> None:
    use_tile(monkeypatch, tile)
    values, indices, scores, _ = make_inputs(2, 19, 5, x * c, c, e, device)
    exact = reference.lookup_reduce(values.double(), indices, scores.double(), num_blocks=e)
    pooled = lookup_reduce(values, indices, scores, num_blocks=e)
    assert_as_exact_as_eager(
        ["pooled"], [pooled], [reference.lookup_reduce(values, indices, scores, num_blocks=e)], [exact]
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("c", "e", "x"), [(1, 1, 7), (2, 4, 24), (1, 17, 36)], ids=str)
@pytest.mark.parametrize("slots", [16, 128])
def test_products_pool_the_oracle(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, c: int, e: int, x: int, slots: int
) -> None:
    monkeypatch.setattr(lookup_product, "MAX_SLOTS", slots)  # one piece, or several
    values, indices, scores, _ = make_inputs(2, 39, 5, x * c, c, e, device, dtype)
    exact = reference.lookup_reduce(values.double(), indices, scores.double(), num_blocks=e)
    eager = reference.lookup_reduce(values, indices, scores, num_blocks=e)
    pooled = lookup_product.lookup_product(values, indices, scores, e, None)
    assert_as_exact_as_eager(["pooled"], [pooled], [eager], [exact])
    again = lookup_product.lookup_product(values, permute_addresses(indices, 5 * e, SEED), scores, e, None)
    assert torch.equal(lookup_product.lookup_product(values, indices, scores, e, SEED), again)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("c", "e", "x"), [(1, 1, 8), (2, 4, 24), (1, 9, 72)], ids=str)
def test_products_of_integers_in_pieces(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, bits: int, c: int, e: int, x: int
) -> None:
    monkeypatch.setattr(lookup_product, "MAX_SLOTS", 16)
    monkeypatch.setattr(lookup_product_quantized, "COLUMNS", 16)  # 72 bytes take two programs
    values, addresses, scores, _ = make_inputs(2, 39, 5, x * c, c, e, device)
    scores = scores.bfloat16()
    rows, scales = quantize_rows(values, bits)
    indices = permute_addresses(addresses, 5 * e, SEED)
    pooled = lookup_reduce_quantized(rows, scales, addresses, scores, num_blocks=e, permutation_seed=SEED)
    exact = reference.lookup_reduce_quantized(rows, scales, indices, scores.double(), num_blocks=e)
    # The result is rounded once, by the interpreter towards zero; what a weight loses is far below that.
    torch.testing.assert_close(pooled.double(), exact, rtol=2**-7, atol=2**-12 * exact.abs().max().item())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("piece", [4, 16])
def test_addresses_are_permuted_in_pieces(monkeypatch: pytest.MonkeyPatch, device: torch.device, piece: int) -> None:
    monkeypatch.setattr(_slots, "MAX_PIECE", piece)
    values, indices, scores, _ = make_inputs(2, 21, 5, 16, 2, 4, device)
    pooled = lookup_reduce(values, indices, scores, num_blocks=4, permutation_seed=SEED)
    permuted = permute_addresses(indices, 5 * 4, SEED)
    assert torch.equal(pooled, lookup_reduce(values, permuted, scores, num_blocks=4))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_runs_of_a_row_over_many_windows(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, sparse_grad: bool
) -> None:
    monkeypatch.setattr(row_gradient, "WINDOWS", ((0, 4),))
    monkeypatch.setattr(row_gradient, "COMBINED_WINDOWS", 2)  # runs of more parts than one load of them
    values, indices, scores, grad = make_inputs(4, 15, 6, 12, 2, 4, device)

    def oracle(v: Tensor, s: Tensor) -> Tensor:
        return reference.lookup_reduce(v, indices, s, num_blocks=4)

    def actual(v: Tensor, s: Tensor) -> Tensor:
        return lookup_reduce(v, indices, s, num_blocks=4, sparse_grad=sparse_grad)

    exact = value_and_gradients(oracle, as_float64([values, scores]), grad)
    eager = value_and_gradients(oracle, as_eager([values, scores]), grad)
    first, second = (value_and_gradients(actual, [values, scores], grad) for _ in range(2))
    assert_as_exact_as_eager(("pooled", "grad of values", "grad of scores"), first, eager, exact)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_of_rows_alone_reads_no_rows(device: torch.device) -> None:
    values, indices, scores, grad = make_inputs(3, 7, 5, 8, 1, 1, device)
    op = torch.ops.ultramem.lookup_reduce_backward
    both, _ = op(grad, values, indices, scores, True)
    alone, nothing = op(grad, torch.full_like(values, torch.nan), indices, scores, True, False)
    assert torch.equal(both, alone)
    assert nothing.numel() == 0


@pytest.mark.parametrize("few", [False, True])
def test_dot_products_in_several_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device, few: bool) -> None:
    monkeypatch.setattr(score_gradient, "TILE_BYTES", 2 * 32 * 4)
    monkeypatch.setattr(score_gradient, "MAX_COLUMNS", 16)
    monkeypatch.setattr(score_gradient, "FEW_TOKENS", 64 if few else 0)
    values, indices, _, _ = make_inputs(2, 13, 5, 20, 1, 1, device)
    query = torch.randn(2, 20, device=device)
    exact = reference.lookup_dot(values.double(), indices, query.double())
    torch.testing.assert_close(lookup_dot(values, indices, query).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("e", [1, 4])
def test_permutes_addresses_as_it_reads_them(device: torch.device, e: int, frozen: bool) -> None:
    values, addresses, scores, grad = make_inputs(2, 9, 7, 8, 2, e, device)
    values.requires_grad_(not frozen)
    indices = permute_addresses(addresses, 7 * e, SEED)
    assert not torch.equal(indices, addresses)
    expected, actual = (
        torch.autograd.grad(pooled, [x for x in (values, scores) if x.requires_grad], grad)
        for scores_ in [scores.requires_grad_()]
        for pooled in (
            lookup_reduce(values, indices, scores_, num_blocks=e),
            lookup_reduce(values, addresses, scores_, num_blocks=e, permutation_seed=SEED),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(
        lookup_reduce(values, addresses, scores, num_blocks=e, permutation_seed=SEED),
        lookup_reduce(values, indices, scores, num_blocks=e),
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", dispatch.TILES)
@pytest.mark.parametrize(("bits", "floating"), [(8, False), (4, False), (8, True)])
def test_every_tile_dequantises_rows(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tile: Any, bits: int, floating: bool
) -> None:
    use_tile(monkeypatch, tile)
    values, addresses, scores, _ = make_inputs(2, 11, 9, 48, 2, 4, device)
    rows, scales = quantize_rows(values, bits, floating=floating)
    indices = permute_addresses(addresses, 9 * 4, SEED)
    pooled = lookup_reduce_quantized(rows, scales, addresses, scores, num_blocks=4, permutation_seed=SEED)
    exact = reference.lookup_reduce_quantized(rows, scales, indices, scores.double(), num_blocks=4)
    # The bias of an integer is three times its range: two bits of float32, and a few for the sum.
    allowed = 16 * torch.finfo(torch.float32).eps * (values.abs().max() * scores.abs().sum(1).max()).item()
    assert (pooled.double() - exact).abs().max().item() <= allowed


def test_float8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(forward, "capability_of", lambda device: 80)
    values, indices, scores, _ = make_inputs(1, 2, 3, 4, 1, 1, device)
    rows, scales = quantize_rows(values, floating=True)
    with pytest.raises(ValueError, match=r"float8_e4m3fn need a GPU of compute capability 8\.9 or more, got 8\.0"):
        lookup_reduce_quantized(rows, scales, indices, scores)


# By Little's law, bytes over bandwidth and latency (0.7 us) of a processor: A100, H100 SXM, B200.
BYTES_NEEDED = {capability: 0.7 * rate / processors for capability, rate, processors in (
    (80, 2.0e6, 108), (90, 3.35e6, 132), (100, 8.0e6, 148),
)}  # fmt: skip
RESIDENT = 65536 // (32 * 96)  # programs of one warp in a processor, at the most registers that the gate allows


@pytest.mark.parametrize("capability", BYTES_NEEDED)
@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_many_tokens_keep_enough_bytes_in_flight(size: str, itemsize: int, capability: int) -> None:
    slots, columns = PAPER[size]
    lookup = dispatch.Lookup(slots=slots, columns=columns, itemsize=itemsize, cores=2, blocks=4)
    tile = dispatch.pool_tile(65536, lookup)
    in_flight = RESIDENT * tile.slots * tile.columns * itemsize // 2  # if half of each tile's loads are
    assert in_flight >= BYTES_NEEDED[capability]
    assert tile.warps == 1
    assert dispatch.pool_tile(1, lookup).warps == 4


def test_an_open_number_of_tokens_counts_as_many_and_guards_nothing() -> None:
    lookup = dispatch.Lookup(slots=84, columns=512, itemsize=2, cores=2, blocks=4)
    shapes = ShapeEnv()
    tokens = shapes.create_unbacked_symint()
    assert dispatch.pool_tile(tokens, lookup) == dispatch.pool_tile(65536, lookup)
    assert dispatch.takes_products(tokens) == dispatch.takes_products(65536)
    assert not shapes.guards
