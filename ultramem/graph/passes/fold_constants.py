"""Evaluate what depends on weights alone, so that no engine computes it again for every token.

In a memory layer: the leading singular pair of the summed core, and the LayerNorm of the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ultramem.graph.passes.pass_result import PassResult, finish

SMALL_BYTES = 64 * 1024

# Views of a weight cost nothing where they are; folding them would only copy the weight.
_VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "alias", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select", "slice", "split", "squeeze",
        "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    )
)  # fmt: skip


def fold_constants(gm: GraphModule, weights: Mapping[str, Tensor], *, small_bytes: int = SMALL_BYTES) -> PassResult:
    """Replace values that depend on weights alone by buffers `folded_<hash>` of `gm`.

    A value is folded if it takes at most `small_bytes`, or no more than the weights that only it reads. Equal values
    have one name, in this graph and in others of the same model, so that graphs can share them.

    Args:
        gm: a graph whose weights are placeholders.
        weights: the tensor of each such placeholder, by name.
        small_bytes: up to this size a folded value may be an addition to the weights.
    """
    constant = _constant_nodes(gm, weights)
    frontier = [
        node
        for node in gm.graph.nodes
        if node in constant
        and node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and any(user not in constant for user in node.users)
    ]
    cones = {node: _cone(node) for node in frontier}
    worth = [node for node in frontier if any(_computes(each) for each in cones[node])]
    freed = _bytes(_read_only_by(worth, cones))
    added = _bytes(node for node in worth if _bytes([node]) > small_bytes)
    if added > freed:
        worth = [node for node in worth if _bytes([node]) <= small_bytes]
    if not worth:
        return finish(gm, False)
    values = _Evaluate(gm, weights).values(worth)
    made = {node.name.removeprefix("b_"): node for node in gm.graph.nodes if node.op == "placeholder"}
    for node, value in zip(worth, values, strict=True):
        name = f"folded_{_hash(value)}"
        if name not in made:
            gm.register_buffer(name, value)
            with gm.graph.inserting_before(node):
                made[name] = gm.graph.get_attr(name)
            made[name].meta = dict(node.meta)
        node.replace_all_uses_with(made[name])
    return finish(gm, True)


def _hash(value: Tensor) -> str:
    digest = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
    digest.update(value.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _constant_nodes(gm: GraphModule, weights: Mapping[str, Tensor]) -> set[Node]:
    constant: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node.name in weights:
                constant.add(node)
        elif node.op == "get_attr" or (
            node.op == "call_function"
            and all(each in constant for each in node.all_input_nodes)
            and not node.is_impure()
            and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        ):
            constant.add(node)
    return constant


def _cone(node: Node) -> set[Node]:
    """The node and everything that it depends on."""
    seen = {node}
    waiting = [node]
    while waiting:
        for each in waiting.pop().all_input_nodes:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return seen


def _computes(node: Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return node.op == "call_function" and packet is not None and packet not in _VIEWS


def _read_only_by(worth: list[Node], cones: Mapping[Node, set[Node]]) -> list[Node]:
    """Weights that nothing reads once `worth` is folded."""
    inside: set[Node] = set().union(*(cones[node] for node in worth))
    dying: set[Node] = set()
    for node in sorted(inside, reverse=True):
        if node in worth or all(user in dying for user in node.users):
            dying.add(node)
    return [node for node in dying if node.op == "placeholder"]


def _bytes(nodes: Iterable[Node]) -> int:
    return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in nodes)


class _Evaluate(Interpreter):
    """Run the part of a graph that wanted nodes need, on real weights."""

    def __init__(self, gm: GraphModule, weights: Mapping[str, Tensor]) -> None:
        super().__init__(gm)
        self.gm = gm
        self.weights = weights

    @torch.no_grad()
    def values(self, wanted: list[Node]) -> list[Tensor]:
        needed = set().union(*(_cone(node) for node in wanted))
        for node in self.gm.graph.nodes:
            if node in needed:
                self.env[node] = self.weights[node.name] if node.op == "placeholder" else self.run_node(node)
        return [self.env[node].detach().clone(memory_format=torch.contiguous_format) for node in wanted]
