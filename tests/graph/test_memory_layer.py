"""UltraMemLayer: every switch, its calibrated start, its state for decoding and its compiled graph."""

from dataclasses import replace

import pytest
import torch

from ultramem import MemoryConfig, UltraMemLayer, ops
from ultramem.graph.init import kept_scores, mean_top_normal

SWITCHES = {
    "default": {},
    "no conv": {"conv_width": 1},
    "no norm": {"qk_norm": "none"},
    "query per head": {"shared_query": False},
    "split ranks": {"rank_layout": "split"},
    "split ranks, query per head": {"rank_layout": "split", "shared_query": False},
    "rank 1 (PKM)": {"rank": 1, "num_cores": 1},
    "rank 3": {"rank": 3},
    "one core": {"num_cores": 1},
    "four cores": {"num_cores": 4},
    "no expansion": {"expansion": 1},
    "expansion 9": {"expansion": 9},
    "two tails": {"candidates": "two_tailed"},
    "stored permutation": {"permutation": "stored"},
    "no permutation": {"permutation": "none"},
    "paper init": {"init": "paper"},
    "no aux loss": {"aux_loss_weight": 0.0},
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_trains_every_parameter(memory_config, switch):
    torch.manual_seed(0)
    layer = UltraMemLayer(replace(memory_config, **switch))
    hidden = torch.randn(2, 7, 32, requires_grad=True)
    output = layer(hidden)
    assert output.shape == hidden.shape
    (output.square().sum() + layer.aux_loss()).backward()
    for name, parameter in [*layer.named_parameters(), ("input", hidden)]:
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_layer_equals_the_equations(memory_config, switch):
    """The whole layer in float64 against a transcription of the paper with an explicit virtual table."""
    torch.manual_seed(1)
    config = replace(memory_config, **switch)
    layer = UltraMemLayer(config).double()
    hidden = torch.randn(1, 6, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = _by_the_equations(layer, config, hidden[0])
        assert torch.allclose(layer(hidden)[0], expected, rtol=1e-6, atol=1e-9)


def _by_the_equations(layer: UltraMemLayer, config: MemoryConfig, x: torch.Tensor) -> torch.Tensor:
    state = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    if config.conv_width > 1:
        weight = state["query.conv_DW"]
        padded = torch.cat([torch.zeros(config.conv_width - 1, 32, dtype=torch.float64), x])
        x = torch.stack([(padded[s : s + config.conv_width] * weight.T).sum(0) for s in range(len(x))])

    def norm(v, name):
        return torch.nn.functional.layer_norm(v, v.shape[-1:], state.get(name)) if config.qk_norm != "none" else v

    query = x @ state["query.proj.weight"].T
    keys = norm(state["score.keys_H2RNK"], "score.norm.weight")
    n, m, physical = config.grid_side, config.top_m, config.num_values
    virtual_table = torch.stack(
        [
            state["table.values_NV"] @ state["expand.weight"][:, p * config.value_dim : (p + 1) * config.value_dim].T
            for p in range(config.expansion)
        ]
    )  # [E,N,d]: only for one core; more cores weight columns before the projection, below
    shuffle = layer.lookup.address_table if config.permutation == "stored" else None
    output = torch.zeros(len(x), 32, dtype=torch.float64)
    for token, q in enumerate(query):
        q = q.view(2, -1, config.rank_key_dim)
        for head in range(config.num_heads):
            sides = []
            for side in range(2):
                rows = []
                for rank in range(config.rank):
                    per_head = 0 if config.shared_query else head
                    index = per_head * config.rank + rank if config.rank_layout == "split" else per_head
                    rows.append(keys[head, side, rank] @ norm(q[side, index], "query.norm.weight"))
                sides.append(torch.stack(rows))
            if config.rank == 1:
                scores, addresses = ops.reference.product_topk(sides[0][None], sides[1][None], m)
                scores = scores[0, 0].unsqueeze(-1)
            else:
                cores = state["select.cores_HCRR"][head]
                left, _, right = torch.linalg.svd(cores.sum(0))
                u, t = left[:, 0], right[0]
                sign = -1.0 if u.sum() + t.sum() < 0 else 1.0
                scores, addresses = ops.reference.tucker_topk(
                    sides[0][None, None],
                    sides[1][None, None],
                    cores[None],
                    (sign * u)[None],
                    (sign * t)[None],
                    m,
                    candidates=config.candidates,
                )
                scores = scores[0, 0]
            assert addresses.max() < n * n
            for score, address in zip(scores, addresses[0, 0], strict=True):
                if config.permutation == "computed":
                    address = ops.permute_addresses(address, config.expansion * physical, config.permutation_seed)
                elif shuffle is not None:
                    address = shuffle[address]
                block, row = divmod(int(address), physical)
                if config.num_cores == 1:
                    output[token] += score[0] * virtual_table[block, row]
                    continue
                columns = score.repeat_interleave(config.value_dim // config.num_cores)
                weight = state["expand.weight"][:, block * config.value_dim : (block + 1) * config.value_dim]
                output[token] += weight @ (columns * state["table.values_NV"][row])
    return output


SIZES = {
    "small": {},
    "wide": {"hidden_size": 128, "value_dim": 64, "key_dim": 48, "knum": 60},
    "many slots": {"top_m": 32, "num_heads": 3, "num_layers": 12},
    "no expansion": {"expansion": 1},
    "two tails": {"candidates": "two_tailed"},
    "PKM": {
        "value_dim": 64, "expansion": 1, "output": "none", "qk_norm": "none", "shared_query": False,
        "score_function": "softmax",
    },
    "experts": {"expert_dim": 24, "expert_project": True},
    "gated": {"output": "gated"},
}  # fmt: skip


# Every size with one core and rank; the smallest with all of them.
CALIBRATED = [("small", rank, cores) for rank, cores in ((1, 1), (2, 1), (2, 4), (3, 2), (4, 2))]
CALIBRATED += [(size, 1, 1) if size == "PKM" else (size, 2, 2) for size in SIZES]


@pytest.mark.parametrize(("size", "rank", "cores"), CALIBRATED)
def test_calibrated_init_keeps_scores_of_mean_one_and_outputs_like_an_mlp(size, rank, cores):
    size = SIZES[size]
    fields = {"hidden_size": 64, "num_layers": 6, "value_dim": 32, "key_dim": 32, "knum": 40, **size}
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = UltraMemLayer(MemoryConfig(**fields, rank=rank, num_cores=cores))
        if layer.config.score_function == "none":  # softmax makes the scores of a head add up to 1 by itself
            summed = kept_scores(layer, samples=2048, seed=seed + 7).sum(-1)  # other queries than the calibration's
            assert summed.mean().item() == pytest.approx(1, rel=0.05)
        with torch.no_grad():
            output = layer(torch.randn(16, 64, layer.config.hidden_size))
        assert output.var().item() * 2 * layer.config.num_layers == pytest.approx(1, rel=0.15)


def test_paper_init_follows_the_closed_rule(memory_config):
    config = replace(memory_config, init="paper", knum=32, value_dim=64)
    layer = UltraMemLayer(config)
    top = mean_top_normal(config.top_m, config.grid_side)
    assert torch.allclose(layer.query.norm.weight, torch.tensor(top**-0.5))
    assert torch.allclose(layer.score.norm.weight, torch.tensor(config.key_dim**-0.5))
    variance = config.expansion / (2 * config.top_m * config.num_heads * config.num_layers)
    assert layer.table.values_NV.var().item() == pytest.approx(variance, rel=0.05)


def test_init_is_a_function_of_the_global_seed(memory_config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(UltraMemLayer(memory_config).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_next_conv_carries_the_layer_across_a_cut(memory_config):
    torch.manual_seed(0)
    layer = UltraMemLayer(memory_config)
    with torch.no_grad():
        layer.query.conv_DW.normal_()
        hidden = torch.randn(2, 9, 32)
        whole = layer(hidden)
        for cut in (1, 2, 5):
            first = layer(hidden[:, :cut])
            second = layer(hidden[:, cut:], layer.next_conv(hidden[:, :cut]))
            assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)


def test_aux_loss_is_the_equation():
    config = MemoryConfig(hidden_size=32, num_layers=1, value_dim=16, key_dim=8, knum=9, rank=3, num_cores=2, top_m=4)
    layer = UltraMemLayer(config)
    with torch.no_grad():
        layer.select.cores_HCRR.normal_()
    singular = torch.linalg.svdvals(layer.select.cores_HCRR.double().sum(1))
    expected = 0.001 / 2 * (singular[:, 1:] - 0.15).clamp_min(0).square().sum()
    assert layer.aux_loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_meta_device_draws_nothing(memory_config):
    with torch.device("meta"):
        layer = UltraMemLayer(memory_config)
    assert all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("expansion", 5, "perfect square"),
        ("expansion", 0, "at least 1"),
        ("num_cores", 3, "divide value_dim"),
        ("top_m", 19, "at most the 18 keys"),
        ("rank_layout", "half", "full, split"),
        ("candidates", "none", "one_tailed, two_tailed"),
        ("permutation_seed", -1, "at least 0"),
        ("knum", 0, "at least 1"),
    ],
)
def test_bad_fields_are_named(memory_config, field, value, rule):
    with pytest.raises(ValueError, match=rf"{field}.*{rule}.*{value}|{field}.*{rule}"):
        replace(memory_config, **{field: value})


def test_row_use_is_counted_in_training_alone(memory_config):
    torch.manual_seed(0)
    layer = UltraMemLayer(memory_config)
    hidden = torch.randn(2, 7, 32)
    layer(hidden)
    assert layer.table.row_use_N is None
    layer.table.count_row_use()
    layer.eval()(hidden)
    assert layer.table.row_use_N.sum() == 0
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(hidden).sum().backward()
    assert layer.table.row_use_N.sum() == 2 * 14 * memory_config.num_slots
    assert "table.row_use_N" not in layer.state_dict()
