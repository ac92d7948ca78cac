"""What an engine launches for a node of ours: kernel, constants, grid, numbers. Plain functions of shapes and types.

A size is an int or a symbolic expression of an engine that adds and multiplies; sizes that a kernel is compiled for
must be ints. Shapes: N rows or side of the grid, D value dim, T tokens, K slots, C cores, E blocks, H heads, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ultramem.ops.triton import lookup_product, lookup_product_quantized, plugin_kernels, select
from ultramem.ops.triton._launch import cdiv
from ultramem.ops.triton.dispatch import FEW_TOKENS, PRODUCT_TOKENS, Lookup, few_tokens, many_tokens
from ultramem.ops.triton.lookup_reduce import pool_launch
from ultramem.ops.triton.lookup_reduce_quantized import quantized_lookup
from ultramem.ops.triton.permute_addresses import BLOCK, permute_launch

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
    """A kernel, and what one launch of it is given."""

    kernel: Any
    types: dict[str, str]
    """Of the run-time arguments."""
    constants: dict[str, Any]
    """And num_warps and num_stages."""
    grid: tuple[Any, Any]
    numbers: tuple[Any, ...]
    """Arguments between the inputs and the outputs, int32."""


def usual_tactic(tokens: int, *, has_product: bool) -> int:
    """The way that the ops themselves take for so many tokens."""
    if has_product and tokens <= PRODUCT_TOKENS:
        return PRODUCT
    return FEW if tokens <= FEW_TOKENS else MANY


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
        launch = {name: value for name, value in launch.items() if name not in ("PERMUTATION", "WIDE")}
        grid = (t * (c * cdiv(d // c, launch["COLUMNS"])), cdiv(e, lookup_product.GROUP))
        return Launch(plugin_kernels.lookup_reduce_product, types, launch, grid, (n, k))
    lookup = Lookup(slots=k, columns=d // c, itemsize=ITEMSIZE[values.dtype], cores=c, blocks=e)
    tile = few_tokens(lookup) if tactic == FEW else many_tokens(lookup)
    launch = _without_permutation(pool_launch(tile, k, d, c, e))
    grid = (t * (c * cdiv(lookup.columns, tile.columns)), cdiv(e, tile.group))
    return Launch(plugin_kernels.lookup_reduce_rows, types, launch, grid, (n, k))


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
        launch = {name: value for name, value in launch.items() if name not in ("PERMUTATION", "WIDE")}
        grid = (t * (c * chunks), cdiv(e, lookup_product_quantized.GROUP))
        return Launch(plugin_kernels.lookup_reduce_quantized_product, types, launch, grid, (n, k))
    tile = few_tokens(lookup) if tactic == FEW else many_tokens(lookup)
    launch = _without_permutation(pool_launch(tile, k, d, c, e)) | {"BITS": bits, "WORD": 8 * lookup.itemsize}
    grid = (t * (c * cdiv(lookup.columns, tile.columns)), cdiv(e, tile.group))
    return Launch(plugin_kernels.lookup_reduce_quantized_rows, types, launch, grid, (n, k))


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
    del launch["INVERSE"]
    programs = cdiv(count, BLOCK) if isinstance(count, int) else ceil_div(count, BLOCK)
    types = _types(("addresses",), inputs, ("count",), ("out",), outputs)
    return Launch(plugin_kernels.permute_addresses, types, launch, (programs, 1), (count,))


def topk_constants(inputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int) -> dict[str, Any]:
    """Constants of the selection, of which its scratch memory depends on TAILS, SLOTS, S and R."""
    row, additive = inputs[0], len(inputs) == 2
    r, n = (1, row.shape[2]) if additive else row.shape[2:]
    c, candidates = (1, "one_tailed") if additive else (inputs[2].shape[1], attributes["candidates"])
    tokens = select.FEW_TOKENS if tactic == FEW else select.FEW_TOKENS + 1
    return select.topk_launch(
        tokens, n, r, c, attributes["k"], candidates=candidates, additive=additive, itemsize=ITEMSIZE[row.dtype]
    )


def topk(
    inputs: Sequence[Operand], outputs: Sequence[Operand], attributes: Mapping[str, Any], tactic: int, ceil_div: CeilDiv
) -> Launch:
    """Of ProductTopK (two inputs) or TuckerTopK (five), whose last two outputs are scratch memory."""
    t, h = inputs[0].shape[:2]
    names = ("row", "col") if len(inputs) == 2 else ("row", "col", "cores", "u", "t")
    types = _types(names, inputs, ("H",), ("scores", "addresses", "found", "chosen"), outputs)
    kernel = plugin_kernels.product_topk if len(inputs) == 2 else plugin_kernels.tucker_topk
    return Launch(kernel, types, topk_constants(inputs, attributes, tactic), (t * h, 1), (h,))


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


def _without_permutation(launch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in launch.items() if name != "PERMUTATION"}
