"""What offline_gate compiles: every kernel variant that dispatch can pick at the paper's sizes, and what it may cost.

A kernel file has one function here, named in KERNEL_FILES, that lists its variants for one size and dtype. To add a
kernel, add a `Variant` to the function of its file:

    Variant(
        "lookup_reduce decode",  # the row's name in the static table
        lookup_reduce.decode_kernel,
        types={"values": x, "indices": "*i64", ..., "N": "i32"},  # run-time arguments, as Triton spells types
        launch=lookup_reduce.decode_launch(size.value_dim, CORES, BLOCKS),  # constants, num_warps, num_stages
        budget=Budget(wide_loads=2, registers=96, barriers_in_loop=0),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks.cubin import WIDEST_ACCESS_BYTES
from benchmarks.occupancy import THREADS_PER_WARP
from ultramem.ops.triton import (
    catch_up,
    dispatch,
    lookup_product,
    lookup_product_quantized,
    lookup_reduce,
    lookup_reduce_quantized,
    permute_addresses,
    row_gradient,
    score_gradient,
    select,
    select_backward,
    select_two_launches,
    sorted_slots,
    update_rows,
    update_segments,
)

RANKS, CORES, BLOCKS, HEADS = 2, 2, 4, 2
CAPABILITIES = (80, 90, 100)
ITEMSIZE = {"bf16": 2, "fp32": 4}
MOST_REGISTERS = 255
TOKENS = {"few": 1, "many": 65536}
"""For kernels that dispatch picks by the number of tokens."""
NARROW = 64  # columns of a table whose rows are shorter than a warp's load


class Size(NamedTuple):
    """One UltraMem row of the paper's Table 6: value dim, side of the virtual grid, slots a head."""

    value_dim: int
    side: int
    top_m: int


SIZES = {"151m": Size(512, 2200, 16), "680m": Size(768, 3264, 35), "1.6b": Size(1024, 3584, 42)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a variant may cost. None leaves a figure to the static table alone, which holds every figure where it is.

    Spills are never allowed, so they are no field.
    """

    registers: int = MOST_REGISTERS
    wide_loads: int = 0  # at least so many global loads of 16 bytes a lane; narrower rows would hold none
    wide_stores: int = 0
    barriers_in_loop: int | None = None  # at most, in all loops of the code together


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as one launch compiles it.

    `types` gives the run-time arguments: "*bf16", "*i64", "i32", "fp32", ... Pointers are taken to be aligned to 16
    bytes, as the allocator's are; "i32:16" is an integer that is always a multiple of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    launch: dict[str, Any]
    budget: Budget = Budget()


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One compilation, one row of the static table."""

    variant: Variant
    size: str
    dtype: str
    capability: int


def row_loads(
    launch: dict[str, Any], dtype: str, *, tiles: int = 1, rows: int | None = None, columns: int | None = None
) -> int:
    """Loads of 16 bytes a lane in `tiles` tiles of `rows` (default: SLOTS) rows of the `columns` (all) that exist."""
    lanes = launch["num_warps"] * THREADS_PER_WARP
    elements = (launch["SLOTS"] if rows is None else rows) * min(launch["COLUMNS"], columns or launch["COLUMNS"])
    return int(tiles * elements * ITEMSIZE[dtype] // (lanes * WIDEST_ACCESS_BYTES))


def lookup_reduce_variants(size: Size, dtype: str) -> Iterator[Variant]:
    x, d, k, itemsize = f"*{dtype}", size.value_dim, size.top_m * HEADS, ITEMSIZE[dtype]
    inputs = {"indices": "*i64", "scores": x, "out": x, "N": "i32", "K": "i32"}
    lookup = dispatch.Lookup(slots=k, columns=d // CORES, itemsize=itemsize, cores=CORES, blocks=BLOCKS)
    quantised = {
        f"int{bits}": (bits, lookup_reduce_quantized.quantized_lookup(k, d, CORES, BLOCKS, bits=bits))
        for bits in (8, 4)
    }
    for how, seed in {"": None, " permuted": 0}.items():
        if itemsize == 2:
            launch = lookup_product.product_launch(k, d, CORES, BLOCKS, size=size.side**2, permutation_seed=seed)
            yield Variant(
                f"lookup_reduce product{how}",
                lookup_product.lookup_product_kernel,
                {"values": x, **inputs},
                launch,
                Budget(wide_loads=row_loads(launch, dtype), registers=64, barriers_in_loop=0),
            )
        for build in dispatch.TILES:
            name, tile = build.__name__.removesuffix("_tokens"), build(lookup)
            launch = lookup_reduce.pool_launch(tile, k, d, CORES, BLOCKS, size=size.side**2, permutation_seed=seed)
            yield Variant(
                f"lookup_reduce {name}{how}",
                lookup_reduce.lookup_reduce_kernel,
                {"values": x, **inputs, **({} if seed is None else {"permuted": "*i64"})},
                {**launch, "scales": None, **({"permuted": None} if seed is None else {})},
                # Permuted addresses may cross lanes in a loop of one warp, which waits for nobody.
                Budget(wide_loads=row_loads(launch, dtype), registers=96, barriers_in_loop=0 if seed is None else 1),
            )
    for kind, (bits, words) in quantised.items():
        if itemsize == 2:
            launch = lookup_product_quantized.product_launch(
                k, d, CORES, BLOCKS, bits=bits, size=size.side**2, permutation_seed=0
            )
            yield Variant(
                f"lookup_reduce {kind} product",
                lookup_product_quantized.lookup_product_quantized_kernel,
                {"words": "*i32", "scales": "*fp32", **inputs},
                launch,
                Budget(wide_loads=row_loads(launch, "fp32"), registers=96, barriers_in_loop=0),
            )
        for build in dispatch.TILES:
            name, tile = build.__name__.removesuffix("_tokens"), build(words)
            launch = lookup_reduce.pool_launch(tile, k, d, CORES, BLOCKS, size=size.side**2, permutation_seed=0)
            yield Variant(
                f"lookup_reduce {kind} {name}",
                lookup_reduce_quantized.lookup_reduce_quantized_kernel,
                {"words": "*i32", "scales": "*fp32", **inputs, "permuted": "*i64"},
                {**launch, "BITS": bits, "WORD": 8 * words.itemsize},
                Budget(wide_loads=row_loads(launch, "fp32"), registers=128, barriers_in_loop=1),
            )


def lookup_reduce_backward_variants(size: Size, dtype: str) -> Iterator[Variant]:
    x, d, itemsize = f"*{dtype}", size.value_dim, ITEMSIZE[dtype]
    counts = {"K": "i32", "count": "i32"}
    written = {"targets": "*i64", "grad_rows": x}
    for name, need_scores in {"row and score": True, "row": False}.items():
        launch = row_gradient.row_gradient_launch(2**20, d, CORES, BLOCKS, itemsize=itemsize, need_scores=need_scores)
        yield Variant(
            f"lookup_reduce {name} gradient",
            row_gradient.row_gradient_kernel,
            {"grad": x, "values": x, "scores": x, "keys": "*i32", "order": "*i64", **written}
            | {"grad_scores": x, "parts": "*fp32", **counts},
            launch,
            Budget(
                wide_loads=row_loads(launch, dtype, tiles=1 + need_scores, columns=d // CORES),
                registers=160,
                barriers_in_loop=0,
            ),
        )
    combine = row_gradient.combine_launch(d, BLOCKS, 64)
    yield Variant(
        "lookup_reduce combine parts",
        row_gradient.combine_parts_kernel,
        {"keys": "*i32", **written, "parts": "*fp32", "windows": "i32"},
        combine,
        Budget(wide_loads=row_loads(combine, "fp32"), registers=160, barriers_in_loop=0),
    )
    for name, tokens in TOKENS.items():
        launch = score_gradient.score_gradient_launch(tokens, size.top_m * HEADS, d, CORES, BLOCKS, itemsize=itemsize)
        yield Variant(
            f"lookup_reduce score gradient {name}",
            score_gradient.score_gradient_kernel,
            {"grad": x, "values": x, "indices": "*i64", "grad_scores": x, "N": "i32", "K": "i32"},
            launch,
            # A tile's sums leave through shared memory; a program is one warp, which waits for nobody.
            Budget(
                wide_loads=row_loads(launch, dtype, tiles=2),
                registers=128 if name == "few" else 168,
                barriers_in_loop=1,
            ),
        )
    if dtype == "bf16":  # indices have one dtype
        yield Variant(
            "lookup_reduce slot keys",
            sorted_slots.slot_keys_kernel,
            {"indices": "*i64", "keys": "*i32", "count": "i32", "N": "i32"},
            sorted_slots.slot_keys_launch(size.side**2 // BLOCKS, BLOCKS, 0),
        )


def select_variants(size: Size, dtype: str) -> Iterator[Variant]:
    x, n, m = f"*{dtype}", size.side, size.top_m
    sides = {"row": x, "col": x}
    for rule in ("one_tailed", "two_tailed", "product"):
        additive = rule == "product"
        r, c, candidates = (1, 1, "one_tailed") if additive else (RANKS, CORES, rule)
        for tokens in TOKENS:
            yield _select(f"select {rule}", tokens, n, r, c, m, candidates, dtype)
        wide = 2 * m  # more candidates than slots that a layer keeps
        if select.fits_one_launch(n, wide):
            continue
        yield Variant(
            f"select side wide {rule}",
            select_two_launches.side_topk_kernel,
            {**sides, "u": x, "t": x, "positions": "*i32", "H": "i32"},
            select_two_launches.side_launch(n, r, wide, candidates=candidates, weighted=not additive),
        )
        yield Variant(
            f"select grid wide {rule}",
            select_two_launches.grid_topk_kernel,
            {**sides, "cores": x, "positions": "*i32", "found": "*i64", "scores": x, "addresses": "*i64", "H": "i32"},
            select_two_launches.grid_launch(n, r, c, wide, candidates=candidates, additive=additive),
        )
    if m == max(each.top_m for each in SIZES.values()):
        for candidates in ("one_tailed", "two_tailed"):
            n, m = select.MAX_N, select.MAX_K
            for tokens in TOKENS:
                yield _select(f"select {candidates} {m} of {n}", tokens, n, RANKS, CORES, m, candidates, dtype)
    n, m = size.side, size.top_m
    grads = {"grad": x, "addresses": "*i64", "grad_row": x, "grad_col": x}
    yield Variant(
        "select product gradient",
        select_backward.product_topk_backward_kernel,
        grads,
        select_backward.product_backward_launch(n, m),
    )
    yield Variant(
        "select tucker gradient",
        select_backward.tucker_topk_backward_kernel,
        {**grads, **sides, "cores": x, "core_parts": "*fp32", "H": "i32"},
        select_backward.tucker_backward_launch(n, RANKS, CORES, m),
    )


def _select(name: str, tokens: str, n: int, r: int, c: int, m: int, candidates: str, dtype: str) -> Variant:
    x, itemsize = f"*{dtype}", ITEMSIZE[dtype]
    additive = "product" in name
    launch = select.topk_launch(TOKENS[tokens], n, r, c, m, candidates=candidates, additive=additive, itemsize=itemsize)
    types = {**dict.fromkeys(("row", "col", "u", "t", "cores", "scores"), x), "found": "*i64", "chosen": "*fp32"}
    return Variant(
        f"{name} {tokens}",
        select.topk_kernel,
        {**types, "addresses": "*i64", "H": "i32"},
        launch,
        Budget(wide_loads=launch["UNROLL"] * r, registers=192),
    )


def permute_addresses_variants(size: Size, dtype: str) -> Iterator[Variant]:
    if dtype != "bf16":  # addresses have one dtype
        return
    for inverse in (False, True):
        yield Variant(
            f"permute_addresses {'inverse' if inverse else 'forward'}",
            permute_addresses.permute_addresses_kernel,
            {"addresses": "*i64", "out": "*i64", "count": "i32"},
            permute_addresses.permute_launch(size.side**2, 0, inverse=inverse),
        )


def update_rows_variants(size: Size, dtype: str) -> Iterator[Variant]:
    yield from _update_rows(size.value_dim, dtype, "", registers=72)
    if size == SIZES["151m"]:  # a size that is none of the paper's: several rows a warp
        yield from _update_rows(NARROW, dtype, f" of {NARROW}", registers=128)


def _update_rows(d: int, dtype: str, name: str, *, registers: int) -> Iterator[Variant]:
    x, launch = f"*{dtype}", catch_up.row_tile(d)
    state = {"values": x, "last_step": "*i32", "schedule": "*fp64", "rows": "*i64", "count": "i32", "eps": "fp32"}
    step = {"step": "i32", "seed": "i64", "decay": "fp32", "grads": x}
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), "*fp32")
    powers = ("log2_beta1", "log2_beta1_rest", "log2_beta2", "log2_beta2_rest")
    rates = dict.fromkeys((*powers, "rest1", "rest2", "root_scale", "rate"), "fp32")
    table, wide = (row_loads(launch, each, rows=launch["ROWS"]) for each in (dtype, "fp32"))  # loads of a tile
    budget = partial(Budget, registers=registers, barriers_in_loop=0)
    yield Variant(
        f"catch_up_rows{name}",
        catch_up.catch_up_rows_kernel,
        {**state, **moments, "step": "*i64", "out": "*fp32"},
        launch,
        budget(wide_loads=table + 2 * wide, wide_stores=wide),
    )
    yield Variant(
        f"catch_up_rows of decay{name}",
        catch_up.catch_up_rows_kernel,
        {**state, "step": "*i64", "out": "*fp32"},
        {**launch, **dict.fromkeys(moments)},
        budget(wide_loads=table, wide_stores=wide),
    )
    yield Variant(
        f"adamw_rows{name}",
        update_rows.adamw_rows_kernel,
        {**state, **moments, **step, **rates},
        launch,
        budget(wide_loads=2 * table + 2 * wide, wide_stores=table + 2 * wide),
    )
    yield Variant(
        f"adagrad_rows{name}",
        update_rows.adagrad_rows_kernel,
        {**state, **step, "row_sum": "*fp32", "lr": "fp32"},
        launch,
        budget(wide_loads=3 * table, wide_stores=table),
    )


def update_segments_variants(size: Size, dtype: str) -> Iterator[Variant]:
    x, d, window = f"*{dtype}", size.value_dim, 64
    launch = update_segments.segments_launch(d, CORES, BLOCKS, window)
    slots = {"grad": x, "scores": x, "keys": "*i32", "order": "*i64", "K": "i32", "count": "i32"}
    state = {"parts": "*fp32", "values": x, "last_step": "*i32", "schedule": "*fp64"}
    step = {"step": "i32", "seed": "i64", "windows": "i32", **dict.fromkeys(("rate", "decay", "eps"), "fp32")}
    moments = ("exp_avg", "exp_avg_sq")
    powers = ("log2_beta1", "log2_beta1_rest", "log2_beta2", "log2_beta2_rest")
    numbers = (*powers, "rest1", "rest2", "root_scale")
    table, wide = (row_loads(launch, each, rows=launch["CORES"]) for each in (dtype, "fp32"))  # loads of a row
    rules = {
        "adamw": (dict.fromkeys(moments, "*fp32") | dict.fromkeys(numbers, "fp32"), ("row_sum",), 2 * wide),
        "adagrad": ({"row_sum": "*fp32"}, (*moments, *numbers), 0),
    }
    for name, (types, absent, kept) in rules.items():
        constants = {**launch, **dict.fromkeys(absent)}
        yield Variant(
            f"{name}_segments",
            update_segments.update_segments_kernel,
            {**slots, **state, **step, **types},
            {**constants, "SLOTS": update_segments.SLOTS},
            Budget(wide_loads=(update_segments.SLOTS + 1) * table + kept, wide_stores=table + kept, registers=128),
        )
        yield Variant(
            f"{name}_segments crossing",
            update_segments.update_crossing_rows_kernel,
            {"keys": "*i32", **state, **step, **types},
            constants,
            Budget(wide_loads=wide + table + kept, wide_stores=table + kept, registers=128),
        )
    combine = row_gradient.combine_launch(d, BLOCKS, window)
    if dtype == "bf16":  # parts have one dtype
        yield Variant(
            "segments combine parts",
            row_gradient.combine_parts_kernel,
            {"keys": "*i32", "parts": "*fp32", "windows": "i32"},
            {**combine, "targets": None, "grad_rows": None},
            Budget(wide_loads=row_loads(combine, "fp32"), registers=160, barriers_in_loop=0),
        )


KERNEL_FILES: tuple[Callable[[Size, str], Iterator[Variant]], ...] = (
    lookup_reduce_variants,
    lookup_reduce_backward_variants,
    select_variants,
    permute_addresses_variants,
    update_rows_variants,
    update_segments_variants,
)


def cases() -> list[Case]:
    """Every compilation, in the order of the static table."""
    return [
        Case(variant=variant, size=name, dtype=dtype, capability=capability)
        for capability in CAPABILITIES
        for name, size in SIZES.items()
        for dtype in ITEMSIZE
        for variants in KERNEL_FILES
        for variant in variants(size, dtype)
    ]
