"""The oracle of each op: plain PyTorch, any floating dtype, any device."""

from ultramem.ops.grouped_mm import grouped_mm_reference as grouped_mm
from ultramem.ops.lookup_dot import lookup_dot_reference as lookup_dot
from ultramem.ops.lookup_dot_lazy import lookup_dot_lazy_reference as lookup_dot_lazy
from ultramem.ops.lookup_reduce import lookup_reduce_reference as lookup_reduce
from ultramem.ops.lookup_reduce_lazy import lookup_reduce_lazy_reference as lookup_reduce_lazy
from ultramem.ops.lookup_reduce_quantized import lookup_reduce_quantized_reference as lookup_reduce_quantized
from ultramem.ops.permute_addresses import permute_addresses_reference as permute_addresses
from ultramem.ops.product_topk import product_topk_reference as product_topk
from ultramem.ops.tucker_topk import tucker_topk_reference as tucker_topk

__all__ = [
    "grouped_mm",
    "lookup_dot",
    "lookup_dot_lazy",
    "lookup_reduce",
    "lookup_reduce_lazy",
    "lookup_reduce_quantized",
    "permute_addresses",
    "product_topk",
    "tucker_topk",
]
