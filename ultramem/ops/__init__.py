"""The stages of a memory layer that a compiler cannot derive, each as `torch.ops.ultramem.<op>`."""

from ultramem.ops import reference
from ultramem.ops.grouped_mm import grouped_mm
from ultramem.ops.implementation import Implementation, use_implementation
from ultramem.ops.lookup_dot import lookup_dot
from ultramem.ops.lookup_reduce import lookup_reduce
from ultramem.ops.permute_addresses import address_table, permute_addresses
from ultramem.ops.product_topk import TopK, product_topk
from ultramem.ops.tucker_topk import tucker_topk

__all__ = [
    "Implementation",
    "TopK",
    "address_table",
    "grouped_mm",
    "lookup_dot",
    "lookup_reduce",
    "permute_addresses",
    "product_topk",
    "reference",
    "tucker_topk",
    "use_implementation",
]
