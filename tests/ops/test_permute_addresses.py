from __future__ import annotations

import math
import re

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from ultramem.ops import Implementation, address_table, permute_addresses, reference

SIZES = [1, 2, 3, 7, 101, 1000, 36864, 65537, 1_000_003]
LARGE = 2**62


@pytest.mark.parametrize("size", SIZES)
def test_is_a_bijection_and_its_inverse_undoes_it(device: torch.device, size: int) -> None:
    addresses = torch.arange(size, device=device)
    permuted = permute_addresses(addresses, size, seed=3)
    assert torch.equal(permuted.sort().values, addresses)
    assert torch.equal(permute_addresses(permuted, size, seed=3, inverse=True), addresses)


@pytest.mark.parametrize("size", [*SIZES, LARGE, LARGE - 1, LARGE - 57, 3 * 2**40 + 1])
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_oracle_bit_for_bit(
    implementation: Implementation, device: torch.device, size: int, inverse: bool
) -> None:
    addresses = torch.randint(size, (3, 107), device=device)
    addresses[0, 0], addresses[0, 1] = 0, size - 1
    expected = reference.permute_addresses(addresses, size, 5, inverse=inverse)
    assert torch.equal(permute_addresses(addresses, size, 5, inverse=inverse), expected)


@pytest.mark.parametrize("size", [LARGE, LARGE - 1, LARGE - 57])
def test_largest_sizes_do_not_overflow(device: torch.device, size: int) -> None:
    ends = torch.arange(1000, device=device)
    addresses = torch.cat([ends, size - 1 - ends, torch.randint(size, (10_000,), device=device)])
    permuted = permute_addresses(addresses, size, seed=1)
    assert permuted.min() >= 0
    assert permuted.max() < size
    assert torch.equal(permute_addresses(permuted, size, seed=1, inverse=True), addresses)
    assert permuted.unique().numel() == addresses.unique().numel()


def test_large_addresses_agree_with_unbounded_integers() -> None:
    """The same network in Python's own integers: what int64 arithmetic must not have wrapped."""
    from ultramem.ops.permute_addresses import PASSES, ROUNDS, schedule

    size = LARGE - 57
    plan = schedule(size, 9)

    def scaled_hash(half: int, side: int, key: tuple[int, ...]) -> int:
        mixed = (half * key[0] + key[1]) % 2**31
        mixed = mixed * mixed // 2**16 % 2**31
        mixed = (mixed * key[2] + key[3]) // 2**16 % 2**31
        return mixed * side // 2**31

    def permute(address: int) -> int:
        for step in range(PASSES):
            address = (address + plan.rotations[step]) % size
            if address >= plan.a * plan.b:
                continue
            high, low = divmod(address, plan.b)
            for turn, key in enumerate(plan.keys[step * ROUNDS : (step + 1) * ROUNDS]):
                if turn % 2 == 0:
                    high = (high + scaled_hash(low, plan.a, key)) % plan.a
                else:
                    low = (low + scaled_hash(high, plan.b, key)) % plan.b
            address = high * plan.b + low
        return address

    addresses = [0, 1, size - 1, size // 2, size // 2 - 1, 2**61 + 12345, plan.a * plan.b - 1]
    assert permute_addresses(torch.tensor(addresses), size, 9).tolist() == [permute(a) for a in addresses]


def test_seeds_differ(device: torch.device) -> None:
    addresses = torch.arange(36864, device=device)
    first = permute_addresses(addresses, 36864, seed=0)
    # Two independent permutations agree in 1 place on average; 12 or more has a chance below 1e-9 (Poisson).
    assert (first == permute_addresses(addresses, 36864, seed=1)).sum() < 12
    assert (first == addresses).sum() < 12


def chi_square(counts: Tensor) -> float:
    """Excess of Pearson's statistic over its mean, in standard deviations (it has mean d and variance 2 d)."""
    expected = counts.sum() / counts.numel()
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / math.sqrt(2 * degrees)


def computed(size: int) -> Tensor:
    return permute_addresses(torch.arange(size), size, seed=7)


def stored(size: int) -> Tensor:
    return address_table(size, seed=7)


@pytest.mark.parametrize("permutation", [computed, stored])
@pytest.mark.parametrize("size", [4 * 192**2, 65537, 1_000_003])
def test_neighbours_spread_over_blocks_and_rows(permutation, size: int) -> None:
    """Where 64 neighbours go (a row of the logical grid), and how far apart two neighbours land, look uniform.

    The bound is 6 standard deviations: Pearson's statistic over more than 100 cells is close to normal, so a uniform
    permutation exceeds it once in 10^7 seeds or so; a network of linear rounds lands between 100 and 100 000.
    """
    permuted = permutation(size)
    cells = 128
    run = 64
    place = (permuted * cells // size)[: size // run * run].view(-1, run)
    # Pairs of cells of adjacent addresses, coarse enough that each expects more than 30.
    coarse = place // 8
    pairs = (coarse[:, :-1] * 16 + coarse[:, 1:]).flatten().bincount(minlength=256)
    distance = ((permuted[1:] - permuted[:-1]) % size * cells // size).bincount(minlength=cells)
    # The position within a run must not favour cells.
    position = (coarse + 16 * (torch.arange(run) % 8)).flatten().bincount(minlength=128)
    for counts in (pairs, distance, position):
        assert abs(chi_square(counts.double())) < 6


def test_stored_table_is_a_permutation_by_seed() -> None:
    table = address_table(1001, seed=2)
    assert table.dtype == torch.int64
    assert torch.equal(table.sort().values, torch.arange(1001))
    assert torch.equal(table, address_table(1001, seed=2))
    assert not torch.equal(table, address_table(1001, seed=3))
    assert torch.equal(table.argsort()[table], torch.arange(1001))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 5)])
def test_any_shape(implementation: Implementation, device: torch.device, shape: tuple[int, ...]) -> None:
    addresses = torch.randint(100, shape, device=device)
    permuted = permute_addresses(addresses, 100, 1)
    assert permuted.shape == shape
    assert torch.equal(permute_addresses(permuted, 100, 1, inverse=True), addresses)


def test_a_view_that_is_not_contiguous(implementation: Implementation, device: torch.device) -> None:
    addresses = torch.arange(60, device=device).view(6, 10).T
    assert torch.equal(permute_addresses(addresses, 60, 1), permute_addresses(addresses.contiguous(), 60, 1))


def test_opcheck(device: torch.device) -> None:
    addresses = torch.arange(30, device=device).view(5, 6)
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.ultramem.permute_addresses.default, (addresses, 30, 1, inverse))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", True, marks=pytest.mark.slow),  # g++ takes most of a minute over the 64-bit divisions
    ],
    ids=str,
)
def test_compiles_to_one_graph(device: torch.device, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(
        lambda a: permute_addresses(a + 1, 1000, 4), fullgraph=True, dynamic=dynamic, backend=counter
    )
    for t in (7, 3, 9) if dynamic else (7,):
        addresses = torch.randint(999, (t, 6), device=device)
        assert torch.equal(compiled(addresses), permute_addresses(addresses + 1, 1000, 4))
    assert counter.frame_count == 1


def test_exports_as_one_node_with_a_dynamic_token_count(device: torch.device) -> None:
    class Permute(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return permute_addresses(a, 1000, 4)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    example = torch.arange(24, device=device).view(4, 6)
    program = torch.export.export(Permute(), (example,), dynamic_shapes=({0: tokens},))
    assert torch.ops.ultramem.permute_addresses.default in {node.target for node in program.graph.nodes}
    addresses = torch.arange(42, device=device).view(7, 6)
    assert torch.equal(program.module()(addresses), permute_addresses(addresses, 1000, 4))


TEN = torch.arange(10)
BAD = [
    (([0, 1], 10, 0), {}, TypeError, "addresses must be a torch.Tensor, got list"),
    ((TEN.int(), 10, 0), {}, TypeError, "addresses must have dtype torch.int64, got torch.int32"),
    ((TEN, 0, 0), {}, ValueError, "size must be at least 1, got 0"),
    ((TEN, 2**62 + 1, 0), {}, ValueError, f"size must be at most 2^62, got {2**62 + 1}"),
    ((TEN, 10.0, 0), {}, TypeError, "size must be an int, got float"),
    ((TEN, 10, -1), {}, ValueError, "seed must be in [0, 2^63), got -1"),
    ((TEN, 10, 2**63), {}, ValueError, f"seed must be in [0, 2^63), got {2**63}"),
    ((TEN, 10, "0"), {}, TypeError, "seed must be an int, got str"),
    ((TEN, 9, 0), {"checked": True}, ValueError, "addresses must be in [0, 9), got 9 (1 out of range)"),
    ((TEN - 1, 9, 0), {"checked": True}, ValueError, "addresses must be in [0, 9), got -1 (1 out of range)"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_arguments(args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        permute_addresses(*args, **options)
