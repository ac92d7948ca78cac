"""A folded model computes what the model does, from fewer operators, and leaves the model as it was."""

from dataclasses import replace

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build

from ultramem.graph import UltraMemLayer, fold_for_inference
from ultramem.optim import build_optimizers

LAYERS = {
    "ultramem": MEMORY,
    "two-tailed, rank 3, split": replace(
        MEMORY, rank=3, rank_layout="split", key_dim=12, shared_query=False, candidates="two_tailed"
    ),
    "split": replace(MEMORY, rank_layout="split"),
    "pkm": replace(MEMORY, rank=1, num_cores=1, shared_query=False, qk_norm="none", score_function="softmax"),
    "rms": replace(MEMORY, qk_norm="rms"),
}
TOKENS = torch.arange(22).view(2, 11) % 64


def operators(layer, hidden):
    """Names of what a captured forward calls."""
    with torch.no_grad():
        graph = torch.export.export(layer, (hidden,)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("memory", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_a_folded_layer_computes_the_same(memory):
    layer = UltraMemLayer(memory).eval()
    # Norm weights that tell the columns apart, and cores whose singular vectors are no round numbers.
    for name, weight in layer.named_parameters():
        if "norm" in name or "cores" in name:
            weight.add_(0.1 * torch.rand_like(weight))
    hidden = torch.randn(3, 5, memory.hidden_size)
    exact = layer.double()(hidden.double())
    folded = fold_for_inference(layer)(hidden.double())
    torch.testing.assert_close(folded, exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    layer.float()
    eager_error = (layer(hidden) - exact).abs().max()
    assert (fold_for_inference(layer)(hidden) - exact).abs().max() <= 4 * eager_error


def test_norms_of_keys_and_singular_vectors_are_gone():
    layer, hidden = UltraMemLayer(MEMORY).eval(), torch.randn(3, 5, MEMORY.hidden_size)
    before, after = operators(layer, hidden), operators(fold_for_inference(layer), hidden)
    assert sum("layer_norm" in name for name in before) == 2
    assert sum("layer_norm" in name for name in after) == 1  # the query's
    assert "aten.atan2.default" in before
    assert "aten.atan2.default" not in after
    assert sum("einsum" in name for name in before) - sum("einsum" in name for name in after) == 1


@torch.no_grad()
def test_the_model_stays_as_it_was_and_shares_its_weights():
    model = build(CONFIG)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folded = fold_for_inference(model)
    torch.testing.assert_close(folded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    pointers = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    shared = {name: weight.data_ptr() for name, weight in folded.named_parameters()}
    assert pointers.keys() - shared.keys() == {f"memories.0.score.{name}" for name in ("keys_H2RNK", "norm.weight")}
    assert shared.items() <= pointers.items()
    assert not any(weight.requires_grad for weight in folded.memories[0].score.buffers())


@torch.no_grad()
def test_a_model_without_memory_is_folded_to_itself():
    model = build(DENSE)
    assert torch.equal(fold_for_inference(model)(TOKENS).logits, model(TOKENS).logits)


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match=r"must be in eval mode to be folded \(call model.eval\(\)\)"):
        fold_for_inference(build(CONFIG).train())


def test_stale_tables_are_refused():
    model = build(CONFIG)
    build_optimizers(model, lr=1e-3, tables="lazy_adamw")
    with pytest.raises(ValueError, match=r"must be up to date to be shared: load the saved weights \(ultramem.load\)"):
        fold_for_inference(model.eval())
