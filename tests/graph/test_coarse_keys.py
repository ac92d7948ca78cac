"""Selection by coarse keys is that of all keys, and reads fewer of them."""

from dataclasses import replace

import pytest
import torch
from exported import CONFIG, MEMORY, build

from ultramem import ops
from ultramem.graph import UltraMemLayer, coarse_keys, fold_for_inference
from ultramem.graph.coarse_keys import CoarseScore, CoarseSelect, has_coarse_keys
from ultramem.graph.fold_for_inference import FoldedScore
from ultramem.runtime.engine import open_engine

LAYERS = {
    "ultramem": MEMORY,
    "a query per head": replace(MEMORY, shared_query=False),
    "rank 3": replace(MEMORY, rank=3, num_cores=4),
    "more candidates": replace(MEMORY, candidate_ratio=1.7),
    "softmax, rms": replace(MEMORY, score_function="softmax", qk_norm="rms"),
    "all rows": replace(MEMORY, knum=5, expansion=1, top_m=5),
    "experts": replace(MEMORY, expert_dim=16, expert_project=True),
}
OTHERS = {
    "split ranks": replace(MEMORY, rank_layout="split"),
    "two tails": replace(MEMORY, candidates="two_tailed"),
    "product keys": replace(MEMORY, rank=1, num_cores=1),
}


def layer_of(memory):
    layer = UltraMemLayer(memory).eval()
    with torch.no_grad():
        # Norm weights that tell the columns apart, and cores whose singular vectors are no round numbers.
        for name, weight in layer.named_parameters():
            if "norm" in name or "cores" in name:
                weight.add_(0.1 * torch.rand_like(weight))
    return layer


@pytest.mark.parametrize("tokens", [1, 15])
@pytest.mark.parametrize("memory", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_a_layer_with_coarse_keys_computes_the_same(memory, tokens):
    layer = layer_of(memory)
    hidden = torch.randn(tokens, 1, memory.hidden_size)
    exact = layer.double()(hidden.double())
    folded = fold_for_inference(layer, coarse_keys=True)
    assert isinstance(folded.score, CoarseScore)
    torch.testing.assert_close(folded(hidden.double()), exact, rtol=0, atol=1e-6 * exact.abs().max().item())
    layer.float()
    eager_error = (layer(hidden) - exact).abs().max()
    assert (fold_for_inference(layer, coarse_keys=True)(hidden) - exact).abs().max() <= 4 * eager_error


@pytest.mark.parametrize("memory", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_slots_and_their_order_are_the_same(memory):
    layer = layer_of(memory).double()
    folded = fold_for_inference(layer, coarse_keys=True)
    query = layer.query(torch.randn(9, 1, memory.hidden_size, dtype=torch.float64))
    kept, expected = folded.select(*folded.score(query)), layer.select(*layer.score(query))
    assert torch.equal(kept.addresses, expected.addresses)
    torch.testing.assert_close(kept.scores, expected.scores)


@torch.no_grad()
def test_of_equal_scores_the_lower_address_is_kept():
    layer = UltraMemLayer(MEMORY).eval()
    layer.score.keys_H2RNK[:] = layer.score.keys_H2RNK[:, :, :, :1]  # all rows alike, and all columns
    folded = fold_for_inference(layer, coarse_keys=True)
    query = layer.query(torch.randn(3, 1, MEMORY.hidden_size))
    addresses = folded.select(*folded.score(query)).addresses
    assert torch.equal(addresses, layer.select(*layer.score(query)).addresses)
    assert addresses.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    """Scores are as near to those of float64 as eager's; a slot that is kept or not is a leap for both."""
    layer = layer_of(MEMORY).to(dtype)
    exact_layer = layer_of(MEMORY).double()
    exact_layer.load_state_dict(layer.state_dict())
    folded = fold_for_inference(layer, coarse_keys=True)
    hidden = torch.randn(64, 1, MEMORY.hidden_size, dtype=dtype)
    exact = exact_layer(hidden.double())
    eager_error = (layer(hidden) - exact).abs().mean()
    assert (folded(hidden) - exact).abs().mean() <= 4 * eager_error


@pytest.mark.parametrize("memory", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_layers_that_would_not_gain_are_folded_without(memory):
    assert not has_coarse_keys(memory)
    layer, hidden = layer_of(memory), torch.randn(3, 5, memory.hidden_size)
    folded = fold_for_inference(layer, coarse_keys=True)
    assert isinstance(folded.score, FoldedScore)
    assert torch.equal(folded(hidden), fold_for_inference(layer)(hidden))


@torch.no_grad()
def test_keys_are_shared_and_the_model_stays_as_it_was():
    model = build(CONFIG)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folded = fold_for_inference(model, coarse_keys=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    layer = folded.memories[0]
    assert isinstance(layer.select, CoarseSelect)
    assert layer.select.cores_HCRR is model.memories[0].select.cores_HCRR
    assert layer.table.values_NV is model.memories[0].table.values_NV
    held = sum(buffer.numel() for buffer in layer.score.buffers())
    held += layer.select.keys_BK.numel()
    assert held == model.memories[0].score.keys_H2RNK.numel() * 3 // 2  # all keys, and one set in place of two ranks'


def test_keys_of_candidates_are_all_that_is_read_by_rank(monkeypatch):
    read = []
    lookup_dot = ops.lookup_dot
    monkeypatch.setattr(
        ops, "lookup_dot", lambda rows, index, query: read.append(index) or lookup_dot(rows, index, query)
    )
    layer = fold_for_inference(layer_of(MEMORY), coarse_keys=True)
    with torch.no_grad():
        layer(torch.randn(1, 1, MEMORY.hidden_size))
    (index,) = read
    assert index.numel() == 2 * MEMORY.num_heads * MEMORY.rank * MEMORY.num_candidates
    assert layer.score.coarse_keys_2HNK.shape == (2, MEMORY.num_heads, MEMORY.grid_side, MEMORY.rank_key_dim)


@torch.no_grad()
def test_it_compiles_in_one_graph_and_exports(device):
    layer = fold_for_inference(layer_of(MEMORY).to(device), coarse_keys=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (2, 5):
        hidden = torch.randn(tokens, 3, MEMORY.hidden_size, device=device)
        torch.testing.assert_close(compiled(hidden), layer(hidden), rtol=1e-4, atol=1e-5)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(layer, (hidden,), dynamic_shapes=({0: batch},)).module()
    hidden = torch.randn(7, 3, MEMORY.hidden_size, device=device)
    torch.testing.assert_close(exported(hidden), layer(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_engines_have_them_where_keys_are_large(monkeypatch):
    model, tokens = build(CONFIG), torch.arange(22).view(2, 11) % 64
    expected = open_engine("eager", model, None)
    assert isinstance(expected.model.model.memories[0].score, FoldedScore)
    monkeypatch.setattr(coarse_keys, "LARGE_KEYS_BYTES", 4 * model.memories[0].score.keys_H2RNK.numel())
    engine = open_engine("eager", model, None)
    assert isinstance(engine.model.model.memories[0].score, CoarseScore)
    (logits, cache), (expected_logits, expected_cache) = engine.prefill(tokens), expected.prefill(tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for token in (5, 9):
        ids = torch.tensor([[token], [token + 1]])
        (logits, cache), (expected_logits, expected_cache) = (
            engine.decode(ids, cache),
            expected.decode(ids, expected_cache),
        )
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
