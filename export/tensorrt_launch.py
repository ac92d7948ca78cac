"""What an engine launches for a node of ours: kernel, constants, grid, numbers. Plain functions of shapes and types.

A size is an int or a symbolic expression of an engine that adds and multiplies; sizes that a kernel is compiled for
must be ints. Shapes: N rows or side of the grid, D value dim, T tokens, K slots, C cores, E blocks, H heads, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ultramem.ops.triton import lookup_product, lookup_product_quantized, select
from ultramem.ops.triton._launch import cdiv
from ultramem.ops.triton.dispatch import Lookup, few_tokens, many_tokens
from ultramem.ops.triton.lookup_reduce import lookup_reduce_kernel, pool_launch
from ultramem.ops.triton.lookup_reduce_quantized import lookup_reduce_quantized_kernel, quantized_lookup
from ultramem.ops.triton.permute_addresses import BLOCK, permute_addresses_kernel, permute_launch

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i8": 1}
# Ways to launch one op, which an engine times against each other for every profile. They are numbered from 1.
MANY, FEW, PRODUCT = 1, 2, 3

Shape = Sequence[Any]
CeilDiv = Callable[[Any, int], Any]


class Operand(NamedTuple):
    """Shape and type of an input or output; types as Triton spells them, without the asterisk."""

    shape: Shape
    dtype: str


class Launch(NamedTuple):
    """The kernel of an op, and what one launch of it by an engine is given."""

    kernel: Any
    types: dict[str, str]
    """Of the run-time arguments, in an engine's order: inputs, numbers, outputs."""
    constants: dict[str, Any]
    """And num_warps and num_stages. Addresses come permuted, so that no lookup needs memory of its own."""
    grid: tuple[Any, Any]
    numbers: tuple[Any, ...]
    """Arguments between the inputs and the outputs, int32."""


def lookup_reduce_tactics(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    values, _, scores = inputs
    return (MANY, FEW, PRODUCT) if ITEMSIZE[values.dtype] == 2 and values.dtype == scores.dtype else (MANY, FEW)


def lookup_reduce(
    inputs: Sequence[Operand], outputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int, ceil_div: CeilDiv
) -> Launch:
    values, indices, scores = inputs
    (n, d), k, (t, _, c), e = values.shape, indices.shape[1], scores.shape, attributes["num_blocks"]
    types = _types(("values", "indices", "scores"), inputs, ("N", "K"), ("out",), outputs)
    if tactic == PRODUCT:
        launch = lookup_product.product_launch(k, d, c, e, size=0, permutation_seed=None)
        grid = (t * (c * cdiv(d // c, launch["COLUMNS"])), cdiv(e, lookup_product.GROUP))
        return Launch(lookup_product.lookup_product_kernel, types, launch, grid, (n, k))
    lookup = Lookup(slots=k, columns=d // c, itemsize=ITEMSIZE[values.dtype], cores=c, blocks=e)
    tile = few_tokens(lookup) if tactic == FEW else many_tokens(lookup)
    launch = pool_launch(tile, k, d, c, e) | {"scales": None, "permuted": None}
    grid = (t * (c * cdiv(lookup.columns, tile.columns)), cdiv(e, tile.group))
    return Launch(lookup_reduce_kernel, types, launch, grid, (n, k))


def lookup_reduce_quantized_tactics(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    return (MANY, FEW, PRODUCT) if ITEMSIZE[inputs[3].dtype] == 2 else (MANY, FEW)


def lookup_reduce_quantized(
    inputs: Sequence[Operand], outputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int, ceil_div: CeilDiv
) -> Launch:
    rows, _, indices, scores = inputs
    (n, d), k, (t, _, c), e = rows.shape, indices.shape[1], scores.shape, attributes["num_blocks"]
    bits = attributes["bits"]
    if bits != 8:
        raise ValueError(f"bits must be 8: an engine has no unsigned bytes inside, in which int4 is packed; got {bits}")
    lookup = quantized_lookup(k, d, c, e, bits=bits)
    types = _types(("words", "scales", "indices", "scores"), inputs, ("N", "K"), ("out",), outputs)
    types["words"] = f"*i{8 * lookup.itemsize}"
    if tactic == PRODUCT:
        launch = lookup_product_quantized.product_launch(k, d, c, e, bits=bits, size=0, permutation_seed=None)
        chunks = cdiv(d // c * bits // launch["WORD"], launch["COLUMNS"])
        grid = (t * (c * chunks), cdiv(e, lookup_product_quantized.GROUP))
        return Launch(lookup_product_quantized.lookup_product_quantized_kernel, types, launch, grid, (n, k))
    tile = few_tokens(lookup) if tactic == FEW else many_tokens(lookup)
    launch = pool_launch(tile, k, d, c, e) | {"BITS": bits, "WORD": 8 * lookup.itemsize, "permuted": None}
    grid = (t * (c * cdiv(lookup.columns, tile.columns)), cdiv(e, tile.group))
    return Launch(lookup_reduce_quantized_kernel, types, launch, grid, (n, k))


def one_tactic(inputs: Sequence[Operand], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    """The way for many tokens. That of the selections for few spills up to 8 registers for sm_90a and sm_120a."""
    return (MANY,)


def permute_addresses(
    inputs: Sequence[Operand], outputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int, ceil_div: CeilDiv
) -> Launch:
    count: Any = 1
    for size in inputs[0].shape:
        count = count * size if isinstance(size, int) else size * count  # an expression stands on the left
    launch = permute_launch(attributes["size"], attributes["seed"], inverse=False)
    programs = cdiv(count, BLOCK) if isinstance(count, int) else ceil_div(count, BLOCK)
    types = _types(("addresses",), inputs, ("count",), ("out",), outputs)
    return Launch(permute_addresses_kernel, types, launch, (programs, 1), (count,))


def topk(
    inputs: Sequence[Operand], outputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int, ceil_div: CeilDiv
) -> Launch:
    """Of ProductTopK (two inputs) or TuckerTopK (five), whose last two outputs are scratch memory."""
    t, h = inputs[0].shape[:2]
    names = ("row", "col") if len(inputs) == 2 else ("row", "col", "cores", "u", "t")
    types = _types(names, inputs, ("H",), ("scores", "addresses", "found", "chosen"), outputs)
    row, additive = inputs[0], len(inputs) == 2
    r, n = (1, row.shape[2]) if additive else row.shape[2:]
    c, candidates = (1, "one_tailed") if additive else (inputs[2].shape[1], attributes["candidates"])
    many = select.FEW_TOKENS + 1  # as the op launches it for many tokens: that spills on no architecture
    launch = select.topk_launch(
        many, n, r, c, attributes["k"], candidates=candidates, additive=additive, itemsize=ITEMSIZE[row.dtype]
    )
    return Launch(select.topk_kernel, types, launch, (t * h, 1), (h,))


def _types(
    names: Sequence[str],
    inputs: Sequence[Operand],
    numbers: Sequence[str],
    output_names: Sequence[str],
    outputs: Sequence[Operand],
) -> dict[str, str]:
    types = {name: f"*{each.dtype}" for name, each in zip(names, inputs, strict=True)}
    types |= dict.fromkeys(numbers, "i32")
    return types | {name: f"*{each.dtype}" for name, each in zip(output_names, outputs, strict=True)}
