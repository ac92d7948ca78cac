"""Einsums become matrix products whose transposed weights are constants."""

import sys
from dataclasses import replace

import pytest
import torch
from exported import CONFIG, MEMORY, build
from torch import nn

from ultramem.export.program import FlatModel, apply_pass, capture, example_inputs, simplify, weights
from ultramem.graph.passes import split_einsums

EQUATIONS = {
    "one query": ("tk,hrnk->thrn", (5, 7), (2, 3, 4, 7)),
    "a query per head": ("thk,hrnk->thrn", (5, 2, 7), (2, 3, 4, 7)),
    "a query per rank": ("thrk,hrnk->thrn", (5, 2, 3, 7), (2, 3, 4, 7)),
    "sides together": ("stk,shnk->sthn", (2, 5, 7), (2, 3, 4, 7)),
    "spaces": ("t k , n k -> n t", (5, 7), (4, 7)),
    "a plain product": ("tk,kn->tn", (5, 7), (7, 4)),
    "nothing shared": ("t,n->tn", (5,), (4,)),
}


class Einsum(nn.Module):
    """Of an input and a weight."""

    def __init__(self, equation, shape):
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum(self.equation, x, self.weight)


@pytest.mark.parametrize("most_products", [0, 8])
@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS.values(), ids=EQUATIONS)
def test_every_kind_of_einsum_is_the_same_for_any_size(monkeypatch, equation, left, right, most_products):
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules[split_einsums.__module__], "MOST_PRODUCTS", most_products)
    axis, letters = equation.split(",")[0].replace(" ", ""), torch.export.Dim("tokens", min=2)
    model = Einsum(equation, right)
    exported = torch.export.export(
        model, (torch.randn(left, dtype=torch.float64),), dynamic_shapes=({axis.index("t"): letters},)
    )
    result = split_einsums(exported.graph_module)
    assert result.modified
    assert not any("einsum" in str(node.target) for node in result.gm.graph.nodes)
    for tokens in (2, 9):
        shape = [tokens if letter == "t" else size for letter, size in zip(axis, left, strict=True)]
        x = torch.randn(shape, dtype=torch.float64)
        (found,) = result.gm(model.weight, x)
        torch.testing.assert_close(found, model(x))
    assert not split_einsums(result.gm).modified


def test_a_sum_of_one_operand_alone_is_not_taken_for_a_product():
    exported = torch.export.export(Einsum("tk,nj->tn", (4, 3)).float(), (torch.randn(5, 7),))
    with pytest.raises(AssertionError, match="no letter is summed alone: tk,nj->tn"):
        split_einsums(exported.graph_module)


@pytest.mark.parametrize(
    "memory",
    [
        MEMORY,
        replace(MEMORY, shared_query=False, rank_layout="split", qk_norm="rms"),
        replace(MEMORY, rank=1, num_cores=1, qk_norm="none"),
    ],
    ids=["tucker", "split", "product-keys"],
)
def test_keys_are_constants_as_the_product_reads_them(memory):
    """No operator is left between the weights and the product, and keys are held once."""
    model = build(replace(CONFIG, memory=memory))
    program = simplify(apply_pass(capture(model), split_einsums))
    constants = {node for node in program.exported.graph.nodes if node.name in weights(program.exported)}
    products = [
        node
        for node in program.exported.graph.nodes
        if str(node.target) in ("aten.mm.default", "aten.bmm.default") and "score" in str(node.meta["nn_module_stack"])
    ]
    ranks = memory.num_heads * memory.rank if memory.rank_layout == "split" else 1
    assert len(products) == 2 * ranks
    assert all(node.args[1] in constants for node in products)
    keys = model.memories[0].score.keys_H2RNK
    assert sum(node.args[1].meta["val"].numel() for node in products) == keys.numel()
    assert not any(tensor.shape == keys.shape for tensor in weights(program.exported).values())
    inputs = list(example_inputs(model, batch=3, seq=2, past=4))
    inputs[0] = torch.randint(64, (3, 2))
    with torch.no_grad():
        found, expected = program.exported.module(check_guards=False)(*inputs), FlatModel(model)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
