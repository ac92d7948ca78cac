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

from ultramem.ops import Implementation, lookup_dot, lookup_reduce, permute_addresses, reference, use_implementation
from ultramem.ops.triton import (
    dispatch,
    lookup_reduce_quantized,
    row_gradient,
    score_gradient,
    slot_order,
)
from ultramem.ops.triton import lookup_reduce as forward

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
    for module in (forward, lookup_reduce_quantized):
        monkeypatch.setattr(module, "pool_tile", lambda tokens, lookup, capability: tile(lookup))


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
@pytest.mark.parametrize("piece", [4, 16])
def test_slots_are_ordered_in_pieces(monkeypatch: pytest.MonkeyPatch, device: torch.device, piece: int) -> None:
    monkeypatch.setattr(slot_order, "MAX_PIECE", piece)
    values, indices, scores, _ = make_inputs(2, 21, 5, 16, 2, 4, device)
    exact = reference.lookup_reduce(values.double(), indices, scores.double(), num_blocks=4)
    pooled = lookup_reduce(values, indices, scores, num_blocks=4)
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=1e-5)


def test_too_many_slots_for_a_counter_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 65535 slots a token"):
        slot_order.order_constants(65536, 8, None)


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


def pack_int4(values_ND: Tensor) -> Tensor:
    """Bytes [N,D/2], column 2i in the low half."""
    low, high = values_ND.to(torch.int32).unflatten(1, (-1, 2)).unbind(-1)
    return ((high & 15) << 4 | (low & 15)).to(torch.uint8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", dispatch.TILES)
@pytest.mark.parametrize(("bits", "seed"), [(8, None), (4, None), (8, SEED), (4, SEED)])
def test_quantised_rows(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, tile: Any, bits: int, seed: int | None
) -> None:
    use_tile(monkeypatch, tile)
    n, d, c, e = 9, 48, 2, 4
    _, indices, scores, _ = make_inputs(2, 11, n, d, c, e, device)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, d), device=device, dtype=torch.int8)
    integers[0] = -(2 ** (bits - 1))
    scales = torch.rand(n, device=device)
    stored = integers if bits == 8 else pack_int4(integers)
    pooled = lookup_reduce_quantized.lookup_reduce_quantized(
        stored, scales, indices, scores, e, torch.float32, permutation_seed=seed
    )
    virtual = indices if seed is None else permute_addresses(indices, n * e, seed)
    rows = integers.double() * scales.double().unsqueeze(1)
    exact = reference.lookup_reduce(rows, virtual, scores.double(), num_blocks=e)
    # The bias of an element is three times its range: two bits of float32 at most, and a few for the sum.
    allowed = 16 * torch.finfo(torch.float32).eps * (scales.max() * 2**bits * scores.abs().sum(1).max()).item()
    assert (pooled.double() - exact).abs().max().item() <= allowed


@pytest.mark.usefixtures("poisoned")
def test_rows_of_float8(device: torch.device) -> None:
    n, d, c, e = 9, 48, 2, 4
    _, indices, scores, _ = make_inputs(2, 11, n, d, c, e, device)
    values, scales = torch.randn(n, d, device=device).to(torch.float8_e4m3fn), torch.rand(n, device=device)
    pooled = forward.lookup_reduce_fp8(values, scales, indices, scores, e, None, torch.float32)
    rows = values.double() * scales.double().unsqueeze(1)
    exact = reference.lookup_reduce(rows, indices, scores.double(), num_blocks=e)
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=1e-5)


def test_float8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(forward, "capability_of", lambda device: 80)
    values, scales = torch.zeros(3, 4, device=device).to(torch.float8_e4m3fn), torch.ones(3, device=device)
    _, indices, scores, _ = make_inputs(1, 2, 3, 4, 1, 1, device)
    with pytest.raises(ValueError, match=r"float8_e4m3fn need a GPU of compute capability 8\.9 or more, got 8\.0"):
        forward.lookup_reduce_fp8(values, scales, indices, scores, 1, None, torch.float32)


def test_quantised_rows_past_two_to_the_31_bytes(device: torch.device) -> None:
    n, d = 2_300_000_000 // 64, 64
    values = torch.empty(n, d, dtype=torch.int8, device=device)  # on a CPU: virtual memory, unread but for 2 rows
    rows = torch.tensor([2**31 // d + 3, n - 1], device=device)
    values[rows] = torch.randint(-128, 128, (2, d), dtype=torch.int8, device=device)
    scales = torch.ones(n, device=device)
    scores = torch.randn(1, 2, 1, device=device)
    far = lookup_reduce_quantized.lookup_reduce_quantized(values, scales, rows.unsqueeze(0), scores, 1, torch.float32)
    near = lookup_reduce_quantized.lookup_reduce_quantized(
        values[rows], scales[:2], torch.tensor([[0, 1]], device=device), scores, 1, torch.float32
    )
    assert torch.equal(far, near)


@pytest.mark.parametrize("capability", dispatch.DEVICES)
@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_many_tokens_keep_enough_bytes_in_flight(size: str, itemsize: int, capability: int) -> None:
    slots, columns = PAPER[size]
    lookup = dispatch.Lookup(slots=slots, columns=columns, itemsize=itemsize, cores=2, blocks=4)
    tile = dispatch.pool_tile(65536, lookup, capability)
    assert tile.bytes_in_flight >= dispatch.DEVICES[capability].bytes_in_flight_needed
    assert tile.warps == 1
    assert dispatch.pool_tile(1, lookup, capability).warps == 4


def test_an_open_number_of_tokens_counts_as_many_and_guards_nothing() -> None:
    lookup = dispatch.Lookup(slots=84, columns=512, itemsize=2, cores=2, blocks=4)
    shapes = ShapeEnv()
    tokens = shapes.create_unbacked_symint()
    assert dispatch.pool_tile(tokens, lookup, 90) == dispatch.pool_tile(65536, lookup, 90)
    assert not shapes.guards
