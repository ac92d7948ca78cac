"""Remove nodes that return their input: what capture leaves behind for training and for its own checks."""

from __future__ import annotations

from typing import Any

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
    args: tuple[Any, ...] = node.args
    if node.target in _ALWAYS:
        return True
    if node.target is aten.dropout.default:
        return args[2] is False
    if node.target is aten.to.dtype:
        return len(args) == 2 and not node.kwargs and args[0].meta["val"].dtype == args[1]
    if node.target is aten.slice.Tensor and len(args) == 4:
        return args[2] in (None, 0) and args[3] == _NEVER_END
    return False
