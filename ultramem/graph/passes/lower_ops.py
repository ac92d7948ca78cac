"""Replace the ops of this package by the PyTorch operators and Triton kernels that they are made of."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

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
        _inline(gm, node)
    return finish(gm, bool(nodes))


def _inline(gm: GraphModule, node: Node) -> None:
    tensors = [arg for arg in node.args if isinstance(arg, Node)]
    fakes = [arg.meta["val"] for arg in tensors]

    def call(*values: torch.Tensor) -> Any:
        given = iter(values)
        return node.target(*(next(given) if isinstance(arg, Node) else arg for arg in node.args))  # type: ignore[operator]  # an op

    implementation = Implementation.TRITON if fakes[0].is_cuda else Implementation.ATEN
    with use_implementation(implementation), fakes[0].fake_mode:
        # Ops of this package dissolve under functionalisation (ultramem.ops._registration).
        body = make_fx(dispatch_functionalize(call), tracing_mode="real")(*fakes)
    body.graph.eliminate_dead_code()
    placeholders = [each for each in body.graph.nodes if each.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(placeholders, tensors, strict=True))
    with gm.graph.inserting_before(node):
        for each in body.graph.nodes:
            if each.op == "get_attr":
                raise RuntimeError(f"the body of {node.target} holds a tensor constant: {each.target}")
            if each.op == "call_function":
                copies[each] = gm.graph.node_copy(each, copies.__getitem__)
                for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
                    if key in node.meta:
                        copies[each].meta[key] = node.meta[key]
    output: Any = body.graph.output_node().args[0]
    if isinstance(output, Node):
        node.replace_all_uses_with(copies[output])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, user
            index: Any = user.args[1]
            user.replace_all_uses_with(copies[output[index]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
