"""The C++ lookups take addresses before their permutation; a virtual index is the same integer on every way to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultramem.ops import (
    Implementation,
    lookup_reduce,
    lookup_reduce_quantized,
    permute_addresses,
    quantize_rows,
    reference,
    use_implementation,
)
from ultramem.ops.lookup_reduce import _lookup_reduce
from ultramem.ops.lookup_reduce_quantized import _lookup_reduce_quantized
from ultramem.ops.native.library import library
from ultramem.ops.permute_addresses import _permute_addresses, native_permutation

SEED = 11
TOKENS, SLOTS, COLUMNS, CORES = 5, 33, 48, 2


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    threads = torch.get_num_threads()
    assert not library().problem
    with use_implementation(Implementation.NATIVE):
        yield
    torch.set_num_threads(threads)


def virtual_indices(addresses_TK: Tensor, size: int) -> Tensor:
    """By the oracle, which is plain PyTorch."""
    return reference.permute_addresses(addresses_TK, size, SEED)


def make_inputs(rows: int, blocks: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(rows, COLUMNS).to(dtype)
    addresses = torch.randint(rows * blocks, (TOKENS, SLOTS))
    addresses[0, 0], addresses[0, 1] = 0, rows * blocks - 1
    return values, addresses, torch.randn(TOKENS, SLOTS, CORES).to(dtype)


def quantized(bits: int) -> Callable[..., Tensor]:
    def run(values: Tensor, indices: Tensor, scores: Tensor, **options: int) -> Tensor:
        return lookup_reduce_quantized(*quantize_rows(values, bits), indices, scores, **options)

    return run


# Of rows * blocks, 60 is no product of its sides, 7 and 8; 64 and 4 * 37^2 are squares; 1 is a table of one row.
@pytest.mark.parametrize(("rows", "blocks"), [(60, 1), (15, 4), (16, 4), (37 * 37, 4), (1, 1), (1, 3)])
@pytest.mark.parametrize("pool", [lookup_reduce, quantized(8), quantized(4)], ids=["rows", "int8", "int4"])
def test_pools_the_rows_of_the_permuted_addresses_bit_for_bit(
    pool: Callable[..., Tensor], rows: int, blocks: int
) -> None:
    values, addresses, scores = make_inputs(rows, blocks)
    expected = pool(values, virtual_indices(addresses, rows * blocks), scores, num_blocks=blocks)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pooled = pool(values, addresses, scores, num_blocks=blocks, permutation_seed=SEED)
        assert torch.equal(pooled, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_of_every_dtype(dtype: torch.dtype) -> None:
    values, addresses, scores = make_inputs(15, 4, dtype)
    expected = lookup_reduce(values, virtual_indices(addresses, 60), scores, num_blocks=4)
    assert torch.equal(lookup_reduce(values, addresses, scores, num_blocks=4, permutation_seed=SEED), expected)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_gradients_are_those_of_the_permuted_addresses(sparse_grad: bool) -> None:
    values, addresses, scores = make_inputs(15, 4)
    leaves = [values.requires_grad_(), scores.requires_grad_()]
    grads = []
    for indices, seed in ((virtual_indices(addresses, 60), None), (addresses, SEED)):
        pooled = lookup_reduce(values, indices, scores, num_blocks=4, sparse_grad=sparse_grad, permutation_seed=seed)
        grads.append([each.to_dense() for each in torch.autograd.grad(pooled.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_tokens() -> None:
    values, addresses, scores = make_inputs(15, 4)
    pooled = lookup_reduce(values, addresses[:0], scores[:0], num_blocks=4, permutation_seed=SEED)
    assert pooled.shape == (0, 4, COLUMNS)


class Calls(TorchDispatchMode):
    """What PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_lookup_is_one_call_permutation_and_all() -> None:
    values, addresses, scores = make_inputs(15, 4)
    with Calls() as calls:
        _lookup_reduce.body(values, addresses, scores, 4, False, SEED)
        _lookup_reduce_quantized.body(*quantize_rows(values), addresses, scores, 4, SEED)
        _permute_addresses.body(addresses, 60, SEED, False)
    assert [name for name in calls.names if name.startswith("ultramem")] == [
        "ultramem_native.lookup_reduce.default",
        "ultramem_native.lookup_reduce_quantized.default",
        "ultramem_native.permute_addresses.default",
    ]


def test_opcheck() -> None:
    values, addresses, scores = make_inputs(15, 4)
    numbers = native_permutation(60, SEED)
    ops = torch.ops.ultramem_native
    torch.library.opcheck(ops.lookup_reduce.default, (values, addresses, scores, 4, numbers))
    torch.library.opcheck(ops.lookup_reduce_quantized.default, (*quantize_rows(values), addresses, scores, 4, numbers))
    for inverse in (False, True):
        torch.library.opcheck(ops.permute_addresses.default, (addresses, numbers, inverse))
    torch.library.opcheck(torch.ops.ultramem.lookup_reduce.default, (values, addresses, scores, 4, False, SEED))


def test_a_compiled_graph_calls_the_lookup_alone() -> None:
    graphs = []

    def keep(gm, examples):
        from functorch.compile import make_boxed_func

        graphs.append(gm)
        return make_boxed_func(gm.forward)

    from torch._dynamo.backends.common import aot_autograd

    values, addresses, scores = make_inputs(15, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v, i, s: lookup_reduce(v, i, s, num_blocks=4, permutation_seed=SEED),
        backend=aot_autograd(fw_compiler=keep),
        fullgraph=True,
    )
    with torch.no_grad():
        pooled = compiled(values, addresses, scores)
    assert torch.equal(pooled, lookup_reduce(values, addresses, scores, num_blocks=4, permutation_seed=SEED))
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.ultramem_native.lookup_reduce.default]


def test_large_sizes_agree_with_plain_pytorch() -> None:
    size = 2**62 - 57
    addresses = torch.cat([torch.randint(size, (4096,)), torch.tensor([0, 1, size - 1, size // 2, size // 2 - 1])])
    for inverse in (False, True):
        expected = reference.permute_addresses(addresses, size, SEED, inverse=inverse)
        assert torch.equal(permute_addresses(addresses, size, SEED, inverse=inverse), expected)


@pytest.mark.parametrize("numbers", [(60, 7, 8), (60, 0, 8, *range(32)), (10, 7, 8, *range(32))])
def test_numbers_that_are_no_permutation_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="a permutation"):
        torch.ops.ultramem_native.permute_addresses(torch.arange(10), numbers, False)
