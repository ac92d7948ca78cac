"""A node replaced by what it computes, node by node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx


def inline(gm: GraphModule, node: Node, inputs: Sequence[Node], call: Callable[..., Any]) -> None:
    """Put the operators that `call` runs in the place of `node`.

    Args:
        gm: a captured graph whose nodes carry fake values (`meta["val"]`); symbolic sizes stay symbolic.
        node: to be replaced.
        inputs: nodes of the tensors that it reads.
        call: a function of these tensors, of the result of `node`. It makes no tensor from numbers.
    """
    fakes = [each.meta["val"] for each in inputs]
    with fakes[0].fake_mode:
        # Ops of this package dissolve under functionalisation (ultramem.ops._registration).
        body = make_fx(dispatch_functionalize(call), tracing_mode="real")(*fakes)
    body.graph.eliminate_dead_code()
    placeholders = [each for each in body.graph.nodes if each.op == "placeholder"]
    copies: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
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
