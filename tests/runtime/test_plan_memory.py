"""Memory of a rank: activations against what autograd keeps, sums against built models, what each choice saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from kept import kept_for_backward

from ultramem import build_model, preset
from ultramem.counts import count
from ultramem.graph.value_table import ValueTable
from ultramem.optim import build_optimizers
from ultramem.runtime.figures.expected import expected_distinct
from ultramem.runtime.plan.activations import activation_bytes
from ultramem.runtime.plan.exchange_memory import cores_of_columns, most_own_slots
from ultramem.runtime.plan.memory import rank_memory
from ultramem.runtime.plan.options import PlanOptions

BATCH, LENGTH = 2, 64
FAMILIES = ["ultramem-tiny", "pkm-tiny", "memory-plus-tiny", "peer-tiny", "ultramem-v2-tiny", "dense-tiny"]


def kept_in_a_step(config):
    """Bytes that autograd keeps for the backward of a step's loss."""
    torch.manual_seed(0)
    model = build_model(config).train()
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))

    def loss():
        output = model(ids)
        return F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()) + output.aux_loss

    return kept_for_backward(model, loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_autograd_keeps(name):
    """In eager float32, where nothing is recomputed; the formula also has the loss's gradient, 4 bytes a logit."""
    config = preset(name)
    tokens = BATCH * LENGTH
    counted = activation_bytes(config, tokens=tokens, sequence_length=LENGTH, element_bytes=4)
    assert counted - 4 * tokens * config.vocab_size == pytest.approx(kept_in_a_step(config), rel=0.002)


def test_dropout_keeps_its_masks():
    """A byte each, where eager mode on a CPU has a float32."""
    plain = preset("ultramem-tiny")
    dropping = dataclasses.replace(plain, dropout=0.1)
    sizes = {"tokens": BATCH * LENGTH, "sequence_length": LENGTH, "element_bytes": 4}
    counted = activation_bytes(dropping, **sizes) - activation_bytes(plain, **sizes)
    assert 4 * counted == kept_in_a_step(dropping) - kept_in_a_step(plain)


def test_checkpointing_keeps_less_and_longer_text_more():
    config = preset("ultramem-1.6b-x12")
    sizes = {"sequence_length": 2048, "element_bytes": 2}
    every = activation_bytes(config, tokens=8192, **sizes)
    few = activation_bytes(config, tokens=8192, **sizes, checkpointing=True)
    # 32 blocks keep neither the inside of attention (7 times 2048, sums of 16 heads) nor that of MLPs, but for one's;
    # the inputs of both stay in float32.
    inside, mlp = 7 * 2048 * 2 + 4 * 16, 2 * 8192 * 2
    assert every - few == 8192 * (32 * (inside + mlp - 2 * 2048 * 2) - mlp)
    assert activation_bytes(config, tokens=16384, **sizes) > 1.9 * every


def options(**changes):
    return PlanOptions(**({"ranks": 1, "tokens_per_rank": 256, "sequence_length": 64} | changes))


def by_name(config, chosen, placement="rows", pooling="home"):
    return {part.name: part.bytes for part in rank_memory(config, chosen, placement, pooling)}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dense-tiny"])
@pytest.mark.parametrize("tables", ["adamw", "lazy_adamw", "row_adagrad"])
def test_weights_and_state_are_those_of_a_model_that_was_trained(name, tables):
    """On one rank: every parameter, its gradient and its optimiser state, after a step; but for steps and schedules."""
    config = preset(name)
    model = build_model(config)
    optimizers = build_optimizers(model, lr=1e-3, tables=tables)
    output = model(torch.randint(0, config.vocab_size, (2, 16)))
    (output.logits.logsumexp(-1).mean() + output.aux_loss).backward()
    rows = {id(each) for module in model.modules() if isinstance(module, ValueTable) for each in module.parameters()}
    found = {"dense": [0, 0], "table": [0, 0]}
    for parameter in model.parameters():
        part = found["table" if id(parameter) in rows else "dense"]
        part[0] += parameter.numel() * 4
    for optimizer in optimizers:
        optimizer.step()
        for parameter, state in optimizer.state.items():
            part = found["table" if id(parameter) in rows else "dense"]
            kept = [each for key, each in state.items() if key not in ("step", "schedule")]
            part[1] += sum(each.numel() * each.element_size() for each in kept)
    counted = by_name(config, options(table_optimizer=tables))
    assert [counted["dense weights"], counted["dense optimiser"]] == found["dense"]
    assert [counted["table weights"], counted["table optimiser"]] == found["table"]
    if tables == "adamw":
        assert counted["table gradients"] == counted["table weights"]
    assert counted["dense gradients"] == counted["dense weights"]
    assert counted["exchange"] == 0


def test_input_rows_have_a_row_state_of_their_own():
    """Where slots are experts, two tables of N rows each keep what an optimiser has once a row."""
    config = preset("peer-tiny")
    state = by_name(config, options(table_optimizer="row_adagrad"))["table optimiser"]
    assert state == 2 * 8 * config.memory.table_rows


def test_shares_of_many_ranks_add_up():
    """Rows and columns cut a table into equal parts; FSDP what is left."""
    config = preset("ultramem-1.6b-x12")
    counts = count(config)
    whole, many = options(table_optimizer="adamw"), options(ranks=64, table_optimizer="adamw")
    alone, rows, columns = by_name(config, whole), by_name(config, many), by_name(config, many, "columns", None)
    assert alone["table weights"] == 4 * counts.sparse
    assert alone["dense weights"] == 4 * (counts.dense + counts.embedding)
    for name in ("table weights", "table gradients", "table optimiser"):
        assert rows[name] == columns[name] == alone[name] // 64
    for name in ("dense weights", "dense gradients", "dense optimiser"):
        assert alone[name] <= 64 * rows[name] < 1.001 * alone[name]  # small weights are padded
    replicas = by_name(config, dataclasses.replace(many, dense="replicate"), "replicate", None)
    assert {name: replicas[name] for name in alone if name.startswith(("table", "dense w", "dense o"))} == {
        name: alone[name] for name in alone if name.startswith(("table", "dense w", "dense o"))
    }


def test_what_grows_and_what_shrinks_with_the_ranks():
    config = preset("ultramem-1.6b-x12")
    plans = [by_name(config, options(ranks=ranks)) for ranks in (2, 8, 64, 1024)]
    for name in ("table weights", "table optimiser"):
        assert [plan[name] for plan in plans] == sorted((plan[name] for plan in plans), reverse=True)
    # At 1024 ranks no dimension of [2,2,2,3584,448] keys divides, so some have a whole head, and all make room for it.
    dense = [plan["dense weights"] for plan in plans]
    keys = 4 * 6 * 2 * 2 * 3584 * 448
    assert dense[0] > dense[1] > dense[2]
    assert keys < dense[3] < keys + dense[2]
    columns = [by_name(config, options(ranks=ranks), "columns", None)["exchange"] for ranks in (2, 8, 64, 1024)]
    assert columns == sorted(columns)  # every rank holds the slots of all
    home = [plan["exchange"] for plan in plans]
    assert len(set(home)) == 1


def test_a_ranks_columns_are_cut_where_cores_end():
    """16 columns of 2 cores: a rank of two has one core's, one of one both; 12 of 2 cores in three are cut by two."""
    memory = preset("ultramem-tiny").memory
    wide = dataclasses.replace(memory, value_dim=16)
    assert [cores_of_columns(wide, ranks) for ranks in (1, 2, 4, 16)] == [2, 1, 1, 1]
    assert cores_of_columns(dataclasses.replace(memory, value_dim=12), 3) == 2


def test_most_own_slots_are_rarely_exceeded():
    """84 slots over 8 ranks, drawn 20000 times: a few tokens at most have more, and some nearly as many."""
    generator = torch.Generator().manual_seed(0)
    own = (torch.randint(0, 8, (20000, 84), generator=generator) == 0).sum(1)
    most = most_own_slots(84, 8, 20000)
    assert (own > most).sum() <= 4
    assert own.max() >= most - 2
    assert most_own_slots(84, 1, 100) == 84


def test_touched_rows_are_what_a_lazy_gradient_costs():
    """64 * 256 * 84 reads of 3.2 M rows by chance touch 1.1 M of each table."""
    config = preset("ultramem-1.6b-x12")
    memory = config.memory
    touched = expected_distinct(64 * 256 * 84, memory.num_values)
    parts = by_name(config, options(ranks=64))
    assert parts["table gradients"] == round(6 * touched / 64 * (4 * 1024 + 8))
    wide = by_name(config, options(ranks=64), "columns", None)
    assert wide["table gradients"] == round(6 * touched * (4 * 16 + 8))
    assert wide["table optimiser"] - parts["table optimiser"] == 4 * 6 * memory.num_values * 63 // 64


def test_bad_numbers_are_named():
    for changes, message in (
        ({"ranks": 0}, r"ranks must be at least 1, got 0"),
        ({"ranks": 12}, r"ranks must be a multiple of ranks_per_node \(8\) beyond one node, got 12"),
        ({"tokens_per_rank": 100}, r"tokens_per_rank must be a multiple of sequence_length \(64\), got 100"),
        ({"dtype": "fp8"}, r"dtype must be one of bf16, fp32, got 'fp8'"),
        ({"network_gbit": 0.0}, r"network_gbit must be a positive number, got 0.0"),
        ({"distinct_rows": 0}, r"distinct_rows must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            options(**changes)
    with pytest.raises(ValueError, match=r"distinct_rows must be in 1\.\.8192 .*, got 8193"):
        rank_memory(preset("ultramem-tiny"), options(ranks=2, distinct_rows=8193), "rows", "home")
    with pytest.raises(ValueError, match=r"memory must not be None"):
        rank_memory(preset("dense-tiny"), options(), "rows", "home")
    with pytest.raises(ValueError, match=r"moe must be None, got 8 experts"):
        activation_bytes(preset("moe-tiny"), tokens=1, sequence_length=1, element_bytes=4)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_what_autograd_keeps(name):
    """But for the inputs of attention and MLPs, which the checkpoints hold themselves, and what runs again."""
    config = preset(name)
    torch.manual_seed(0)
    model = build_model(config).train()
    model.recomputes = True
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    d, layers, with_mlp = config.hidden_size, config.num_layers, config.num_layers - len(config.layers_without_mlp)

    def loss():
        output = model(ids)
        return F.cross_entropy(output.logits.flatten(0, 1), ids.flatten()) + output.aux_loss

    tokens = BATCH * LENGTH
    sizes = {"tokens": tokens, "sequence_length": LENGTH, "element_bytes": 4}
    counted = activation_bytes(config, **sizes, checkpointing=True)
    runs_again = max(7 * d * 4 + 4 * config.num_heads, 2 * 4 * config.inner_size if with_mlp else 0)
    held = layers * 4 * d + with_mlp * 4 * d
    expected = counted - tokens * (4 * config.vocab_size + runs_again)
    kept = kept_for_backward(model, loss)
    assert expected - tokens * held <= kept * 1.005
    assert kept <= expected * 1.005
