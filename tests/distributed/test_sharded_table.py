"""Tables of which every rank holds a part: losses, gradients and bits of a whole table."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh

from ultramem import ModelConfig
from ultramem.graph import build_model
from ultramem.graph.sharded_table import ShardedValueTable
from ultramem.graph.table_shard import TableShard
from ultramem.graph.value_table import ValueTable

WAYS = {
    "rows": {"placement": "rows"},
    "rows, each slot asked for": {"placement": "rows", "deduplicate": False},
    "rows, pooled at the owner": {"placement": "rows", "pool": "owner"},
    "columns": {"placement": "columns"},
}
MEMORIES = [name for name, config in FAMILIES.items() if config.memory is not None]
TOKENS = 8, 6  # of all ranks


def make_batch(vocab_size):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (2, *TOKENS), generator=generator)


def mean_loss(model, inputs, targets):
    output = model(inputs)
    return F.cross_entropy(output.logits.flatten(0, 1), targets.flatten()) + output.aux_loss


def make_models(config: ModelConfig, way, *, sparse):
    """One model with whole tables and one with this rank's parts, of the same weights, in float64."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = []
    for shard in (None, TableShard(mesh=mesh, **way)):
        torch.manual_seed(0)
        models.append(build_model(replace(config, dropout=0.0), dtype=torch.float64, shard=shard).train())
        for module in models[-1].modules():
            if isinstance(module, ValueTable):
                module.sparse_grad = sparse
    return models


def check_gradients(config, way, sparse, compiled):
    whole, parts = make_models(config, way, sparse=sparse)
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, targets = make_batch(config.vocab_size)
    expected = mean_loss(whole, inputs, targets)
    expected.backward()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function = torch.compile(mean_loss, fullgraph=True) if compiled else mean_loss
        loss = function(parts, inputs.chunk(size)[rank], targets.chunk(size)[rank]) / size
        loss.backward()
    torch._dynamo.reset()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=0)
    sharded = {
        f"{prefix}.{name}": module.shard.slices(*shape)
        for prefix, module in parts.named_modules()
        if isinstance(module, ShardedValueTable)
        for name, shape in module.whole_shapes.items()
    }
    assert sharded
    for (name, parameter), reference in zip(parts.named_parameters(), whole.parameters(), strict=True):
        gradient, wanted = parameter.grad, reference.grad
        if name in sharded:
            assert gradient.is_sparse == sparse
            assert gradient.to_dense().shape < wanted.shape
            torch.testing.assert_close(parameter, reference[sharded[name]], rtol=0, atol=0)
            gradient, wanted = gradient.to_dense(), wanted.to_dense()[sharded[name]]
        else:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()), msg=name)


# Each way with each family, and each value of the rest with each of both.
PAIRS = [
    (family, way, (2, 4)[index % 2], index % 4 < 2)
    for index, (family, way) in enumerate(itertools.product(MEMORIES, WAYS))
]


@pytest.mark.parametrize(("family", "way", "size", "sparse"), PAIRS)
def test_losses_and_gradients_are_those_of_a_whole_table(ranks, family, way, size, sparse):
    ranks(size).run(check_gradients, FAMILIES[family], WAYS[way], sparse, False)


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow) if way == "rows, each slot asked for" else way for way in WAYS],
)
def test_compiled_in_one_graph(ranks, way):
    ranks(2).run(check_gradients, FAMILIES["ultramem"], WAYS[way], True, True)


def outputs_of(config, way):
    _, parts = make_models(config, way, sparse=True)
    inputs, _ = make_batch(config.vocab_size)
    with torch.no_grad():
        return parts(inputs.chunk(dist.get_world_size())[dist.get_rank()]).logits


def test_asking_once_for_a_row_changes_no_bit(ranks):
    once, each = (
        ranks(2).run(outputs_of, FAMILIES["ultramem"], {"placement": "rows", "deduplicate": deduplicate})
        for deduplicate in (True, False)
    )
    for ours, theirs in zip(once, each, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def low_precision_error(config, way):
    whole, parts = make_models(config, {**way, "exchange_dtype": torch.bfloat16}, sparse=True)
    inputs, _ = make_batch(config.vocab_size)
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        exact, rounded = whole(inputs).logits.chunk(size)[rank], parts(inputs.chunk(size)[rank]).logits
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", WAYS)
def test_values_that_travel_in_bfloat16_are_rounded_and_no_more(ranks, way):
    for error in ranks(2).run(low_precision_error, FAMILIES["ultramem"], WAYS[way]):
        assert 0 < error < 2**-8


def use_of_rows(config, way):
    whole, parts = make_models(config, way, sparse=True)
    inputs, targets = make_batch(config.vocab_size)
    rank, size = dist.get_rank(), dist.get_world_size()
    tables = [module for model in (whole, parts) for module in model.modules() if isinstance(module, ValueTable)]
    for table in tables:
        table.count_row_use()
    mean_loss(whole, inputs, targets)
    mean_loss(parts, inputs.chunk(size)[rank], targets.chunk(size)[rank])
    expected, counted = (table.row_use_N for table in tables)
    assert int(expected.sum()) > 0
    torch.testing.assert_close(counted, expected[tables[1].shard.slices(len(expected), 1 * size)[0]])


@pytest.mark.parametrize("way", WAYS)
def test_reads_of_rows_are_counted_once_each(ranks, way):
    ranks(2).run(use_of_rows, FAMILIES["ultramem"], WAYS[way])


def state_of(config, way):
    whole, parts = make_models(config, way, sparse=True)
    for name, tensor in parts.state_dict().items():
        full = tensor.full_tensor() if "table" in name else tensor
        torch.testing.assert_close(full, whole.state_dict()[name], rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in parts.named_parameters()}
    saved = parts.state_dict()
    for parameter in parts.parameters():
        parameter.data = torch.zeros_like(parameter)
    parts.load_state_dict(saved)
    for name, parameter in parts.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_the_state_dict_has_whole_tables_as_dtensors(ranks, way):
    ranks(2).run(state_of, FAMILIES["ultramem-v2"], WAYS[way])


def error_of(way, config, size):
    mesh = init_device_mesh("cpu", (size,))
    try:
        build_model(config, shard=TableShard(mesh=mesh, **way))
    except ValueError as error:
        return str(error)
    return None


def test_a_table_that_cannot_be_cut_is_refused(ranks):
    config = FAMILIES["ultramem"]
    odd = replace(config, memory=replace(config.memory, value_dim=18, num_cores=1))
    for message in ranks(4).run(error_of, WAYS["columns"], odd, 4):
        assert message == "value_dim must be a multiple of the 4 ranks that share columns, got 18"
    for message in ranks(4).run(error_of, {"placement": "diagonal"}, config, 4):
        assert message == "placement must be rows or columns, got 'diagonal'"
