"""Matrix products in place of `aten.einsum`, for engines that multiply matrices well and einsums badly.

ONNX Runtime transposes the operands of its Einsum at every call: 40 MB of keys for the scores of one token. Of a
product the transposed keys are a constant, which `fold_constants` makes once. A batch of a few matrices is as many
products: of a batch, ONNX Runtime does not lay out the constants as its product reads them, which costs from a few
tokens on.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from ultramem.graph.passes.inline import inline
from ultramem.graph.passes.pass_result import PassResult, finish

MOST_PRODUCTS = 8
"""Of a batch that is split; a longer one stays one operator."""


def split_einsums(gm: GraphModule) -> PassResult:
    """Put transpositions and a matrix product in the place of each einsum, which is of two tensors.

    Args:
        gm: a captured graph whose nodes carry fake values (`meta["val"]`); symbolic sizes stay symbolic.
    """
    nodes = [node for node in gm.graph.nodes if node.target is torch.ops.aten.einsum.default]
    for node in nodes:
        equation, operands = node.args
        inline(gm, node, operands, partial(_product, equation))
    return finish(gm, bool(nodes))


def _product(equation: str, *operands: Tensor) -> Tensor:
    """[batch, left, shared] times [batch, shared, right], without a batch of no letters; a batch has a fixed size."""
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    assert set(out) | (set(left) & set(right)) == set(left) | set(right), f"no letter is summed alone: {equation}"
    sizes = {
        letter: size
        for letters, tensor in zip((left, right), operands, strict=True)
        for letter, size in zip(letters, tensor.shape, strict=True)
    }
    batch = [letter for letter in out if letter in left and letter in right]
    rows = [letter for letter in out if letter not in right]
    columns = [letter for letter in out if letter not in left]
    shared = [letter for letter in left if letter not in out]

    def matrices(tensor: Tensor, letters: str, *groups: list[str]) -> Tensor:
        order = [letters.index(letter) for group in (batch, *groups) for letter in group]
        if order != sorted(order):
            tensor = tensor.permute(order)
        axes = [batch, *groups] if batch else groups
        if all(len(axis) == 1 for axis in axes):
            return tensor
        return tensor.reshape([math.prod(sizes[letter] for letter in axis) for axis in axes])

    factors = matrices(operands[0], left, rows, shared), matrices(operands[1], right, shared, columns)
    if batch and math.prod(sizes[letter] for letter in batch) <= MOST_PRODUCTS:
        pairs = zip(*(each.unbind(0) for each in factors), strict=True)
        product = torch.stack([first @ second.contiguous() for first, second in pairs])
    else:
        product = factors[0] @ factors[1]
    found = [*batch, *rows, *columns]
    product = product.view([sizes[letter] for letter in found])
    return product if found == list(out) else product.permute([found.index(letter) for letter in out])
