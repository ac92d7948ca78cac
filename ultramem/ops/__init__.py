"""The stages of a memory layer that a compiler cannot derive, each as `torch.ops.ultramem.<op>`."""

from ultramem.ops import reference
from ultramem.ops._registration import accumulation_dtype
from ultramem.ops.ask_for_rows import ask_for_rows, expect_single_rows
from ultramem.ops.catch_up import LazyRows, catch_up_, catch_up_rows
from ultramem.ops.grouped_mm import grouped_mm
from ultramem.ops.huge_pages import advise_huge_pages
from ultramem.ops.implementation import Implementation, use_implementation
from ultramem.ops.lookup_dot import lookup_dot
from ultramem.ops.lookup_dot_lazy import lookup_dot_lazy
from ultramem.ops.lookup_reduce import lookup_reduce
from ultramem.ops.lookup_reduce_lazy import lookup_reduce_lazy
from ultramem.ops.lookup_reduce_quantized import (
    QuantizedRows,
    lookup_reduce_quantized,
    quantize_rows,
    unpack_rows,
)
from ultramem.ops.permute_addresses import address_table, permute_addresses
from ultramem.ops.product_topk import TopK, product_topk
from ultramem.ops.round_stochastically import round_stochastically
from ultramem.ops.route_own import OwnSlots, route_own
from ultramem.ops.route_rows import Route, route_rows
from ultramem.ops.sorted_slots import SortedSlots, sort_slots
from ultramem.ops.tucker_topk import tucker_topk
from ultramem.ops.update_rows import adagrad_rows_, adamw_rows_
from ultramem.ops.update_segments import adagrad_segments_, adamw_segments_

__all__ = [
    "Implementation",
    "LazyRows",
    "OwnSlots",
    "QuantizedRows",
    "Route",
    "SortedSlots",
    "TopK",
    "accumulation_dtype",
    "adagrad_rows_",
    "adagrad_segments_",
    "adamw_rows_",
    "adamw_segments_",
    "address_table",
    "advise_huge_pages",
    "ask_for_rows",
    "catch_up_",
    "catch_up_rows",
    "expect_single_rows",
    "grouped_mm",
    "lookup_dot",
    "lookup_dot_lazy",
    "lookup_reduce",
    "lookup_reduce_lazy",
    "lookup_reduce_quantized",
    "permute_addresses",
    "product_topk",
    "quantize_rows",
    "reference",
    "round_stochastically",
    "route_own",
    "route_rows",
    "sort_slots",
    "tucker_topk",
    "unpack_rows",
    "use_implementation",
]
