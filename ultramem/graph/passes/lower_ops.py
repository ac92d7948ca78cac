"""Replace the ops of this package by the PyTorch operators and Triton kernels that they are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ultramem.graph.passes.inline import inline
from ultramem.graph.passes.pass_result import PassResult, finish
from ultramem.ops.implementation import Implementation, use_implementation

NAMESPACE = "ultramem"


def lower_ops(gm: GraphModule) -> PassResult:
    """Inline each `ultramem::*` node, so that the graph runs where this package is not installed.

    A node on the CPU becomes its aten path; one on a GPU launches the op's Triton kernels, which Inductor compiles.

    Args:
        gm: a captured graph whose nodes carry fake values (`meta["val"]`); symbolic sizes stay symbolic.
    """
    nodes = [node for node in gm.graph.nodes if getattr(node.target, "namespace", None) == NAMESPACE]
    for node in nodes:
        _lower(gm, node)
    return finish(gm, bool(nodes))


def _lower(gm: GraphModule, node: Node) -> None:
    tensors = [arg for arg in node.args if isinstance(arg, Node)]

    def call(*values: torch.Tensor) -> Any:
        given = iter(values)
        return node.target(*(next(given) if isinstance(arg, Node) else arg for arg in node.args))  # type: ignore[operator]  # an op

    on_gpu = tensors[0].meta["val"].is_cuda
    with use_implementation(Implementation.TRITON if on_gpu else Implementation.ATEN):
        inline(gm, node, tensors, call)
