"""Rows that are projected once give the output that a projector gives."""

from dataclasses import replace

import pytest
import torch
from exported import CONFIG, MEMORY, build

from ultramem.graph import UltraMemLayer, fold_for_inference
from ultramem.graph.fold_values import has_foldable_values
from ultramem.graph.quantized_table import quantize_tables

WIDE = replace(MEMORY, expansion=1, value_dim=64, num_cores=2)  # two cores' rows of 32, the model's width
LAYERS = {
    "as wide": WIDE,
    "narrower": replace(WIDE, value_dim=96, num_cores=1),
    "bias": replace(WIDE, project_bias=True),
    "product keys": replace(WIDE, rank=1, num_cores=1, score_function="softmax"),
    "experts": replace(WIDE, expert_dim=16, expert_project=True),
}
OTHERS = {
    "blocks": replace(WIDE, expansion=4),
    "narrow": replace(WIDE, value_dim=62),
    "shared": replace(WIDE, table="shared"),
    "gated": replace(WIDE, output="gated"),
    "no output": replace(WIDE, output="none", value_dim=32, num_cores=1),
}


@pytest.mark.parametrize("memory", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_a_layer_with_projected_values_computes_the_same(memory):
    layer = UltraMemLayer(memory).eval()
    for name, weight in layer.named_parameters():
        if "bias" in name:
            weight.normal_()
    hidden = torch.randn(3, 5, memory.hidden_size)
    exact = layer.double()(hidden.double())
    folded = fold_for_inference(layer, values=True)
    torch.testing.assert_close(folded(hidden.double()), exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    layer.float()
    folded = fold_for_inference(layer, values=True)
    eager_error = (layer(hidden) - exact).abs().max()
    assert (folded(hidden) - exact).abs().max() <= 4 * eager_error
    assert folded.table.values_NV.shape == (memory.table_rows, memory.num_cores * memory.hidden_size)
    assert folded.table.values_NV.nbytes <= layer.table.values_NV.nbytes
    assert not hasattr(folded.expand, "weight")
    assert folded.table.experts_NP is layer.table.experts_NP


@pytest.mark.parametrize("memory", OTHERS.values(), ids=OTHERS)
def test_layers_whose_table_would_grow_stay(memory):
    assert not has_foldable_values(memory)


@torch.no_grad()
def test_the_model_stays_as_it_was():
    model = build(replace(CONFIG, memory=WIDE))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folded = fold_for_inference(model, coarse_keys=True, values=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    tokens = torch.arange(22).view(2, 11) % 64
    torch.testing.assert_close(folded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_quantised_rows_are_not_projected():
    model = quantize_tables(build(replace(CONFIG, memory=WIDE)), 8)
    folded = fold_for_inference(model, values=True)
    assert folded.memories[0].table.rows_NB is model.memories[0].table.rows_NB
    assert folded.memories[0].expand.weight is model.memories[0].expand.weight
