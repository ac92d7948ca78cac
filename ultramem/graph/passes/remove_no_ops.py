"""Remove nodes that return their input: what capture leaves behind for training and for its own checks."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ultramem.graph.passes.pass_result import PassResult, finish

aten = torch.ops.aten

_ALWAYS = (aten.detach.default, aten.alias.default)
_NEVER_END = 2**63 - 1


def remove_no_ops(gm: GraphModule) -> PassResult:
    """Remove detach, dropout outside training, conversions to the same dtype, whole slices, and metadata checks."""
    modified = False
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif _returns_its_input(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        else:
            continue
        modified = True
    return finish(gm, modified)


def _returns_its_input(node: Node) -> bool:
    if node.target in _ALWAYS:
        return True
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs and node.args[0].meta["val"].dtype == node.args[1]  # type: ignore[union-attr]  # a node, by the op's schema
    if node.target is aten.slice.Tensor:
        _, _, start, end, *step = (*node.args, *((0, 0, _NEVER_END)[len(node.args) - 1 :]))
        return start in (None, 0) and end == _NEVER_END and step in ([], [1])
    return False
