"""Weights of the authors' layer, made up from the specification: into ours and back, and the same function."""

from dataclasses import replace

import pytest
import torch

from ultramem import UltraMemLayer
from ultramem.export.authors import authors_config, export_authors_layer, import_authors_layer

D, K, V, KNUM, H, R, C, E, TOP_M = 24, 10, 12, 7, 2, 2, 3, 4, 5
N, ROWS = 2 * KNUM, KNUM**2
EPS = 1e-5


def released_state(*, signs=(1, 1), seed=0, rank=R):
    """Weights by the released layer's own rule of initialisation; the stored pair of each head has the given sign."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    cores = [torch.rand(H, rank, rank, generator=generator) for _ in range(C)]
    left, _, right = torch.linalg.svd(sum(cores).double())
    sign = torch.tensor(signs, dtype=torch.float64).view(1, H, 1, 1)
    u, v = left[None, :, None, :, 0], right[None, :, None, 0, :]
    toward = torch.sign(u.sum(-1, keepdim=True) + v.sum(-1, keepdim=True)) * sign
    return {
        "query_proj.weight": normal(2 * K, D, std=K**-0.5),
        "keys": normal(H, 2, N, K, rank, std=K**-0.5),
        "values_for_look_up": normal(ROWS, V, std=0.02),
        "values_proj.weight": normal(D, E * V, std=(E * V) ** -0.5),
        "query_norm.weight": torch.full((K,), K**-0.33),
        "keys_norm.weight": torch.full((K,), K**-0.33) * (1 + 0.1 * torch.rand(K, generator=generator)),
        **{f"tucker_core.{core}": cores[core] for core in range(C)},
        "shuffle_index": torch.randperm(E * ROWS, generator=generator),
        "tucker_core_u": (u * toward).float(),
        "tucker_core_v": (v * toward).float(),
    }


def released_forward(state, hidden_TD, norm):
    """The released layer by its equations, one token and one slot at a time, in float64."""
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    def normed(x, weight):
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    output = []
    for hidden in hidden_TD.double():
        projected = state["query_proj.weight"] @ hidden
        sides = [normed(projected[side * K : (side + 1) * K], state["query_norm.weight"]) for side in (0, 1)]
        pooled = torch.zeros(E, V, dtype=torch.float64)
        for head in range(H):
            keys = state["keys"][head]  # [2,N,K,R]
            row, col = (
                torch.stack([normed(key, state["keys_norm.weight"]) @ sides[side] for key in keys[side].unbind(-1)])
                for side in (0, 1)
            )
            rows = (state["tucker_core_u"][0, head, 0] @ row).topk(TOP_M).indices.tolist()
            cols = (state["tucker_core_v"][0, head, 0] @ col).topk(TOP_M).indices.tolist()
            cells = []
            for i in rows:
                for j in cols:
                    scores = [float(row[:, i] @ state[f"tucker_core.{c}"][head] @ col[:, j]) for c in range(C)]
                    cells.append((sum(scores), i * N + j, scores))
            for _, address, scores in sorted(cells, reverse=True)[:TOP_M]:
                virtual = int(state["shuffle_index"][address])
                value = state["values_for_look_up"][virtual % ROWS]
                pooled[virtual // ROWS] += value * torch.tensor(scores).double().repeat_interleave(V // C)
        output.append(state["values_proj.weight"] @ pooled.flatten())
    return torch.stack(output)


def config_of(state, norm="rms"):
    return authors_config(state, top_m=TOP_M, num_layers=4, norm=norm, norm_eps=EPS)


def same_bits(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def test_sizes_are_read_off_the_weights():
    config = config_of(released_state())
    assert (config.hidden_size, config.key_dim, config.value_dim, config.knum) == (D, K, V, KNUM)
    assert (config.num_heads, config.rank, config.num_cores, config.expansion) == (H, R, C, E)
    assert (config.qk_norm, config.qk_norm_eps, config.permutation, config.conv_width) == ("rms", EPS, "stored", 1)


@pytest.mark.parametrize(("norm", "rank"), [("rms", 2), ("rms", 3), ("layer", 2)])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (-1, -1)])
def test_the_imported_layer_computes_what_theirs_does(signs, norm, rank):
    state = released_state(signs=signs, rank=rank)
    config = config_of(state, norm)
    layer = UltraMemLayer(config)
    layer.load_state_dict(import_authors_layer(state, config).weights)
    hidden_BSD = torch.randn(3, 11, D, generator=torch.Generator().manual_seed(1))
    expected = released_forward(state, hidden_BSD.flatten(0, 1), norm).view(3, 11, D)
    with torch.no_grad():
        single = layer(hidden_BSD)
        exact = layer.double()(hidden_BSD.double())
    assert (exact - expected).abs().max() <= 1e-6 * expected.abs().max()  # the singular pair is float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_sign_of_the_stored_pair_matters():
    """Without it the layer would read other rows: the test above could not pass by chance."""
    state, other = released_state(signs=(1, 1)), released_state(signs=(-1, 1))
    hidden_TD = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(released_forward(state, hidden_TD, "rms"), released_forward(other, hidden_TD, "rms"))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theirs_comes_back_bit_for_bit(signs, dtype):
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in released_state(signs=signs).items()
    }
    config = config_of(state)
    imported = import_authors_layer(state, config)
    assert same_bits(export_authors_layer(imported.weights, config, imported.singular_pair), state)


def test_ours_comes_back_bit_for_bit():
    config = config_of(released_state())
    weights = UltraMemLayer(config).state_dict()
    exported = export_authors_layer(weights, config)
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == {
        name: tuple(tensor.shape) for name, tensor in released_state().items()
    }
    assert same_bits(import_authors_layer(exported, config).weights, weights)


def test_a_pair_that_was_never_set_is_taken_as_it_is():
    state = released_state()
    state |= {name: torch.zeros_like(state[name]) for name in ("tucker_core_u", "tucker_core_v")}
    config = config_of(state)
    imported = import_authors_layer(state, config)
    assert same_bits(export_authors_layer(imported.weights, config, imported.singular_pair), state)


def test_nothing_is_shared_with_what_was_given():
    state = released_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in import_authors_layer(state, config_of(state)).weights.values():
        tensor.zero_()
    assert same_bits(state, before)


def changed(**tensors):
    return lambda state: state | tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "keys"}, r"the layer's weights lack keys, got "),
        (lambda state: {k: v for k, v in state.items() if k != "tucker_core.1"}, "lack tucker_core.1, got "),
        (lambda state: state | {"query_norm.bias": torch.zeros(K)}, "unknown weights query_norm.bias, accepted: "),
        (lambda state: state | {"keys": torch.zeros(H, 2, N, R, K)}, r"keys must have shape \(2, 2, 14, 10, 2\), got"),
        (changed(shuffle_index=torch.zeros(E * ROWS, dtype=torch.int64)), r"must hold each of 0..195 once"),
        (changed(shuffle_index=torch.randperm(E * ROWS).int()), "shuffle_index must be int64, got torch.int32"),
        (changed(tucker_core_u=torch.tensor([1.0, -1.0]).expand(1, H, 1, R)), "leading singular pair of the cores"),
    ],
)
def test_what_is_not_their_layer_is_refused_by_name(change, message):
    state = released_state()
    with pytest.raises(ValueError, match=message):
        import_authors_layer(change(state), config_of(state))


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"permutation": "computed"}, "permutation must be 'stored' as in the authors' layer, got 'computed'"),
        ({"conv_width": 4}, "conv_width must be 1 as in the authors' layer, got 4"),
        ({"qk_norm": "none"}, "qk_norm must be 'rms' or 'layer' as in the authors' layer, got 'none'"),
        ({"rank": 1, "num_cores": 1}, "rank must be at least 2 as in the authors' layer, got 1"),
    ],
)
def test_another_kind_of_layer_is_refused_by_its_switch(switch, message):
    config = replace(config_of(released_state()), **switch)
    for convert in (import_authors_layer, export_authors_layer):
        with pytest.raises(ValueError, match=message):
            convert({}, config)


def test_a_lookup_of_sizes_names_what_is_missing():
    with pytest.raises(ValueError, match=r"the layer's weights lack .*query_proj.weight.*, got nothing"):
        config_of({})
