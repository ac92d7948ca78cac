"""Rewrites of a captured graph: one function and one file each, `PassResult(gm, modified)`."""

from ultramem.graph.passes.fold_constants import fold_constants
from ultramem.graph.passes.lower_ops import lower_ops
from ultramem.graph.passes.pass_result import PassResult
from ultramem.graph.passes.remove_no_ops import remove_no_ops
from ultramem.graph.passes.split_einsums import split_einsums
from ultramem.graph.passes.split_experts import split_experts

__all__ = ["PassResult", "fold_constants", "lower_ops", "remove_no_ops", "split_einsums", "split_experts"]
