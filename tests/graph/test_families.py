"""Every model family: against its equations in float64, cached decoding, one compiled graph, weights on disk."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from families import as_pkm
from torch.overrides import TorchFunctionMode

import ultramem
from ultramem import MemoryConfig, MoEConfig, UltraMemLayer
from ultramem.graph.value_table import ValueTable
from ultramem.graph.weights import save_weights, write_config

ULTRAMEM = MemoryConfig(hidden_size=32, num_layers=3, value_dim=16, key_dim=8, knum=9, top_m=5)
PKM = as_pkm(ULTRAMEM)
MEMORIES = {
    "pkm": (PKM, "2:2", False),
    "pkm projected, with biases": (
        replace(PKM, expansion=4, output="project", project_bias=True, permutation="computed"),
        "1:2",
        False,
    ),
    "memory-plus": (replace(PKM, table="shared", output="gated", init="memory_plus"), "1:1/3:3", True),
    "peer": (replace(PKM, expert_dim=32), "2:2", True),
    "ultramem": (ULTRAMEM, "1:2/3:3", False),
    "ultramem, more candidates, rms": (replace(ULTRAMEM, candidate_ratio=1.7, qk_norm="rms"), "1:2", False),
    "ultramem-v2": (
        replace(ULTRAMEM, expert_dim=12, expert_project=True, table="windows", table_layers=3, window_share=0.5),
        "1:1/2:2/3:3",
        False,
    ),
    "ultramem-v2 without activation": (
        replace(
            ULTRAMEM, expert_dim=12, expert_project=True, expert_activation="none", table="windows", table_layers=2
        ),
        "1:1/2:2",
        False,
    ),
}


def _config(model_config, family):
    if family == "moe":
        return replace(model_config, memory=None, insertions="", moe=MoEConfig(num_experts=5), inner_size=24)
    if family == "dense":
        return replace(model_config, memory=None, insertions="")
    memory, insertions, replaces = MEMORIES[family]
    return replace(model_config, memory=memory, insertions=insertions, replace_mlp=replaces)


FAMILIES = ("dense", "moe", *MEMORIES)


@pytest.fixture(params=FAMILIES)
def model(request, model_config):
    torch.manual_seed(0)
    model = ultramem.build_model(_config(model_config, request.param)).eval()
    with torch.no_grad():
        for memory in model.memories:
            if memory.query.conv_DW is not None:
                memory.query.conv_DW.normal_()
    return model


def test_counts_are_those_of_the_built_model(model):
    counts = ultramem.count(model.config)
    assert counts.total_with_embeddings == sum(parameter.numel() for parameter in model.parameters())
    tables = [each for each in model.modules() if isinstance(each, ValueTable)]
    rows = sum(parameter.numel() for table in tables for parameter in table.parameters())
    experts = sum(block.mlp.up_EDI.numel() + block.mlp.down_EID.numel() for block in model.blocks if model.config.moe)
    assert counts.sparse == rows + experts
    assert len(tables) == (len({id(each) for each in tables}) if model.config.memory else 0)


def test_cached_decoding_equals_the_full_forward(model):
    tokens = torch.randint(0, 61, (3, 12))
    with torch.no_grad():
        single = model(tokens).logits
        exact = model.double()(tokens).logits
        output = model(tokens[:, :5])
        pieces = [output.logits]
        for position in range(5, 12):
            output = model(tokens[:, position : position + 1], cache=output.cache)
            pieces.append(output.logits)
    assert (torch.cat(pieces, 1) - exact).abs().max() <= 1e-6 * exact.abs().max()  # the singular pair is float32
    assert (single - exact).abs().max() < 1e-3 * exact.abs().max()


def test_every_parameter_is_trained(model):
    model.train()
    output = model(torch.randint(0, 61, (4, 16)))
    (output.logits.square().mean() + output.aux_loss).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["moe", "pkm projected, with biases", "memory-plus", "peer", "ultramem-v2"])
def test_one_graph_gives_the_eager_gradients(model_config, family):
    torch.manual_seed(0)
    model = ultramem.build_model(_config(model_config, family))
    tokens = torch.randint(0, 61, (5, 7))  # sizes that no other axis has, which the compiler would take for the same

    def loss(tokens):
        output = model(tokens)
        return F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()) + output.aux_loss

    loss(tokens).backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(tokens).backward()
    for name, parameter in model.named_parameters():
        scale = eager[name].abs().max()
        assert (parameter.grad - eager[name]).abs().max() <= 1e-4 * scale, name
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.randint(0, 61, (11, 13)))


def test_weights_round_trip(model, tmp_path):
    write_config(tmp_path, model.config)
    save_weights(model, tmp_path)
    loaded = ultramem.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    tokens = torch.randint(0, 61, (1, 5))
    with torch.no_grad():  # not to the bit: sums depend on how memory happens to be aligned
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_works_on_the_meta_device(model):
    with torch.device("meta"):
        built = ultramem.build_model(model.config)
    assert {name: each.shape for name, each in built.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }


def _slots(layer, hidden_TD):
    """Virtual block, physical row and scores of every slot, from the oracles."""
    config = layer.config
    query = layer.query(hidden_TD.unsqueeze(0))
    row, col = layer.score(query)
    if config.rank == 1:
        kept = ultramem.ops.reference.product_topk(row.squeeze(2), col.squeeze(2), config.top_m)
        scores, addresses = kept.scores.unsqueeze(-1), kept.addresses
    else:
        cores = layer.select.cores_HCRR
        left, _, right = torch.linalg.svd(cores.sum(1))
        u, t = left[:, :, 0], right[:, 0]
        sign = torch.where(u.sum(1) + t.sum(1) < 0, -1.0, 1.0).unsqueeze(1)
        kept = ultramem.ops.reference.tucker_topk(row, col, cores, u * sign, t * sign, config.num_candidates)
        scores, addresses = kept.scores[:, :, : config.top_m], kept.addresses[:, :, : config.top_m]
    if config.score_function == "softmax":
        scores = scores.exp() / scores.exp().sum(2, keepdim=True)
    addresses = addresses.flatten(1)
    if config.permutation == "computed":
        addresses = ultramem.ops.permute_addresses(addresses, config.expansion * config.num_values, 0)
    return addresses // config.num_values, addresses % config.num_values, scores.flatten(1, 2)


# The index of a layer matters for windows of a shared table alone.
LAYERS = [
    (family, index) for family in MEMORIES for index in ((0, 1) if MEMORIES[family][0].table == "windows" else (0,))
]


@pytest.mark.parametrize(("family", "index"), LAYERS)
def test_a_layer_equals_its_equations(family, index):
    """SPEC of each family, slot by slot in float64, with the virtual rows written out."""
    torch.manual_seed(index)
    config = MEMORIES[family][0]
    layer = UltraMemLayer(config, index=index).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("bias", "block_bias_ED")):
                parameter.normal_()
    x = torch.randn(6, 32, dtype=torch.float64)
    table = layer.table
    with torch.no_grad():
        blocks, rows, scores = _slots(layer, x)
        expected = torch.zeros(6, 32, dtype=torch.float64)
        for token in range(6):
            pooled = torch.zeros(config.expansion, config.value_dim, dtype=torch.float64)
            score_sums = torch.zeros(config.expansion, dtype=torch.float64)
            for block, row, score in zip(blocks[token], rows[token], scores[token], strict=True):
                if config.table == "windows":
                    row = (row + index * config.knum**2) % (config.table_layers * config.knum**2)
                if config.expert_dim:
                    inner = layer.lookup.expert_query(x[token]) @ table.experts_NP[row]
                    score = score * (F.gelu(inner) if config.expert_activation == "gelu" else inner)
                pooled[block] += score.repeat_interleave(config.value_dim // config.num_cores) * table.values_NV[row]
                score_sums[block] += score.sum()
            if config.output == "none":
                expected[token] = pooled[0]
            elif config.output == "gated":
                gate = x[token] @ layer.expand.gate.weight.T + layer.expand.gate.bias
                expected[token] = layer.expand.out(pooled.flatten() * gate * torch.sigmoid(gate))
            else:
                expected[token] = layer.expand.weight @ pooled.flatten()
                if config.project_bias:
                    expected[token] += score_sums @ layer.expand.block_bias_ED
        assert torch.allclose(layer(x.unsqueeze(0))[0], expected, rtol=1e-6, atol=1e-8)


def test_layers_share_one_table(model_config):
    for family in ("memory-plus", "ultramem-v2"):
        model = ultramem.build_model(_config(model_config, family))
        assert model.table is not None
        assert all(memory.table is None for memory in model.memories)
        groups = {group["name"]: group["params"] for group in ultramem.param_groups(model, lr=1.0)}
        assert {id(each) for each in groups["values"]} == {id(each) for each in model.table.parameters()}


def test_experts_equal_a_loop_over_tokens_and_drop_none():
    """Also: the balance loss is E times its weight when every token goes to one expert with certainty."""
    from ultramem.graph.moe import MoE

    torch.manual_seed(0)
    moe = MoE(MoEConfig(num_experts=5, experts_per_token=2), 32, 24)
    moe.reset_parameters(residual_layers=3)
    moe.double()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    output, loss = moe(x)
    with torch.no_grad():
        for token in range(9):
            logits = moe.router(x[0, token])
            best = logits.topk(2)
            gates = best.values.softmax(0)
            expected = sum(
                gate * (F.gelu(x[0, token] @ moe.up_EDI[expert]) @ moe.down_EID[expert])
                for gate, expert in zip(gates, best.indices, strict=True)
            )
            assert torch.allclose(output[0, token], expected, atol=1e-7)  # gates are float32
        assert loss.item() > 0
    skewed = MoE(MoEConfig(num_experts=5, experts_per_token=1), 32, 24)
    skewed.reset_parameters(residual_layers=3)
    with torch.no_grad():
        skewed.router.weight.zero_()
        skewed.router.weight[2] = 1.0
    assert skewed(torch.ones(1, 9, 32)).balance_loss.item() == pytest.approx(0.05)  # all to one of five: weight * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "none"}, "output must not be 'none' unless"),
        ({"project_bias": True, "output": "gated"}, "project_bias needs output 'project'"),
        ({"expert_dim": 5}, r"expert_dim must be hidden_size \(32\) without expert_project, got 5"),
        ({"expert_project": True}, "expert_project needs an expert_dim"),
        ({"window_share": 0.5}, "table must be 'windows'"),
        ({"candidate_ratio": 0.5}, "candidate_ratio must be at least 1, got 0.5"),
        ({"candidate_ratio": 4.0}, "top_m must be at most the 18 keys of a side, got 20"),
        ({"qk_norm": "batch"}, "qk_norm must be one of layer, rms, none"),
    ],
)
def test_bad_memory_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ULTRAMEM, **changes)


def test_bad_placements_are_named(model_config):
    config = _config(model_config, "memory-plus")
    with pytest.raises(ValueError, match="insertions must write where they read"):
        replace(config, insertions="1:2")
    with pytest.raises(ValueError, match="insertions must name each layer once"):
        replace(config, insertions="1:1/1:1")
    with pytest.raises(ValueError, match=r"memory\.table_layers must be the 2 layers of insertions, got 3"):
        replace(_config(model_config, "ultramem-v2"), insertions="1:1/2:2")
    with pytest.raises(ValueError, match="experts_per_token must be at most num_experts"):
        MoEConfig(num_experts=1)


class ExplicitDevices(TorchFunctionMode):
    """Refuses to draw with a generator where a default device would decide on which device: it may be another's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.rand, torch.randn, torch.randint, torch.randperm) and kwargs.get("generator") is not None:
            assert "device" in kwargs, func
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_built_under_any_default_device(family, model_config):
    with ExplicitDevices():
        ultramem.build_model(_config(model_config, family))
