"""The model of time: collectives and stages by hand, what hides and what does not, what is measured or assumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ultramem import preset
from ultramem.runtime.plan import Wire, columns, lookup_shape, replicate, rows_at_home
from ultramem.runtime.plan.dense_share import dense_share
from ultramem.runtime.plan.memory import dense_parameters
from ultramem.runtime.plan.options import Group, PlanOptions
from ultramem.runtime.plan.placement import part_added_up
from ultramem.runtime.plan.plan_devices import (
    MEASURED_BYTES_PER_SECOND,
    MEASURED_FLOPS_PER_SECOND,
    PLAN_DEVICES,
    Links,
    PlanDevice,
    collective_us,
    plan_device,
)
from ultramem.runtime.plan.step_time import step_time
from ultramem.runtime.profile.arithmetic import MEMORY_STAGES, stage_costs

CONFIG = preset("ultramem-1.6b-x12")
LINKS = Links(
    node_bytes_per_second=400e9, network_bytes_per_second=50e9, base_us=8, node_us=3, network_us=14, source="made up"
)
DEVICE = PlanDevice(
    name="made-up", label="a device", flops_per_second=8e14, bytes_per_second=3e12, memory_bytes=80e9, links=LINKS,
    source="made up",
)  # fmt: skip
BENCHMARKS = Path(__file__).parents[2] / "benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json"


def options(**changes):
    return PlanOptions(**({"ranks": 64} | changes))


def shape_of(chosen):
    return lookup_shape(CONFIG.memory, chosen.tokens_per_rank)


def time_of(volume_of, **changes):
    chosen = options(**changes)
    return step_time(CONFIG, chosen, DEVICE, volume_of(shape_of(chosen), chosen.ranks, chosen.wire))


def test_a_node_talks_over_its_own_links():
    """8 ranks of one node: an all-to-all is one step, a ring takes 7, an all-reduce 14."""
    one_node = Group(8, 8)
    assert collective_us("all_to_all", 4 * 10**8, one_node, LINKS) == pytest.approx(8 + 3 + 1000)
    assert collective_us("all_gather", 4 * 10**8, one_node, LINKS) == pytest.approx(8 + 7 * 3 + 1000)
    assert collective_us("all_reduce", 4 * 10**8, one_node, LINKS) == pytest.approx(8 + 14 * 3 + 1000)


def test_across_nodes_the_network_binds():
    """64 ranks of 8: 56 of 63 parts of an all-to-all cross the network; a ring crosses 7 times, over 8 links."""
    assert collective_us("all_to_all", 63 * 10**6, Group(64, 8), LINKS) == pytest.approx(8 + 14 + 56e6 / 50e9 * 1e6)
    assert collective_us("reduce_scatter", 4 * 10**8, Group(64, 8), LINKS) == pytest.approx(8 + 56 * 3 + 7 * 14 + 1000)
    assert collective_us("all_gather", 5 * 10**7, Group(64, 1), LINKS) == pytest.approx(8 + 63 * 14 + 1000)


def test_copies_of_a_table_are_neighbours_and_their_parts_are_not():
    """64 ranks on nodes of 8: a copy a node, a copy on two nodes, two copies a node."""
    for copies, table, parts in (
        (8, (8, 8), (8, 1)),
        (4, (16, 8), (4, 1)),
        (16, (4, 4), (16, 2)),
        (1, (64, 8), (1, 1)),
    ):
        chosen = options(table_copies=copies)
        assert (chosen.table_group, chosen.copy_group) == (table, parts)
    with pytest.raises(ValueError, match=r"table_copies must divide the 64 ranks, got 3"):
        options(table_copies=3)
    with pytest.raises(ValueError, match=r"table_copies must give each copy whole nodes of 8 ranks or an equal part"):
        options(ranks=48, table_copies=4)


def test_nothing_sent_takes_no_time():
    assert collective_us("all_gather", 0, Group(64, 8), LINKS) == 0
    assert collective_us("all_gather", 10, Group(1, 1), LINKS) == 0


def test_compute_is_three_forwards():
    """A forward by its stages' roofs, and a backward of twice that; of attention and MLPs four with checkpointing."""
    costs = stage_costs(CONFIG, batch=4, new_tokens=2048, element_bytes=2)
    seconds = {each.stage: max(each.flops / 8e14, each.total_bytes / 3e12) for each in costs}
    dense_us = 1e6 * sum(time for stage, time in seconds.items() if stage not in MEMORY_STAGES)
    memory_us = 1e6 * sum(seconds[stage] for stage in MEMORY_STAGES)
    time = time_of(columns)
    assert (time.dense_us, time.memory_us) == (pytest.approx(3 * dense_us), pytest.approx(3 * memory_us))
    again = time_of(columns, activation_checkpointing=True, accumulate=2)
    again_us = 1e6 * (seconds["attention"] + seconds["mlp"])
    assert again.dense_us == pytest.approx(2 * (3 * dense_us + again_us))
    assert again.memory_us == pytest.approx(6 * memory_us)


def test_a_dense_optimiser_moves_the_whole_share():
    """Seven float32 numbers for each parameter of a rank's share; a lazy one only rows that were touched."""
    every = time_of(columns, table_optimizer="adamw").optimizer_us
    tables = 6 * CONFIG.memory.num_values * 1024
    assert every == pytest.approx(1e6 * 28 * (tables / 64 + dense_share(CONFIG, 64)) / 3e12)
    few = {"tokens_per_rank": 64, "sequence_length": 64}
    lazy, adagrad = (
        time_of(columns, table_optimizer=name, **few).optimizer_us for name in ("lazy_adamw", "row_adagrad")
    )
    assert adagrad < lazy < every / 3


def test_what_travels_is_hidden_by_skipped_layers():
    """Without overlap all of an exchange is in the open; with it, less; where nothing is skipped, more again."""
    bare, hidden = (time_of(rows_at_home, overlap=overlap) for overlap in (False, True))
    assert bare.exposed_exchange_us == pytest.approx(bare.exchange_us)
    assert 0 < hidden.exposed_exchange_us < bare.exposed_exchange_us
    assert hidden.exchange_us == bare.exchange_us
    assert bare.dense_collectives_us == hidden.dense_collectives_us

    chosen = options()
    close = dataclasses.replace(CONFIG, insertions="7:7/12:12/17:17/22:22/27:27/32:32")
    volume = rows_at_home(shape_of(chosen), 64, chosen.wire)
    assert step_time(close, chosen, DEVICE, volume).exposed_exchange_us > hidden.exposed_exchange_us


def test_numbers_and_scores_are_waited_for():
    """In a node the columns themselves arrive in time; the all-gathers before and the reduce-scatter after do not."""
    chosen = options(ranks=8)
    volume = columns(shape_of(chosen), 8, chosen.wire)
    waited = [each for each in volume.collectives if not each.travels]
    assert [each.payload for each in waited] == ["indices", "scores", "gradients of scores"]
    time = step_time(CONFIG, chosen, DEVICE, volume)
    waited_us = sum(collective_us(each.kind, each.sent_bytes, chosen.table_group, LINKS) for each in waited)
    assert time.exposed_exchange_us == pytest.approx(6 * waited_us)
    assert time.exchange_us > time.exposed_exchange_us


def test_a_step_is_the_sum_of_what_nothing_hides():
    time = time_of(rows_at_home)
    compute = time.dense_us + time.memory_us + time.optimizer_us
    assert time.total_us == compute + time.exposed_exchange_us + time.copies_us + time.dense_collectives_us
    assert time.total_us < compute + time.exchange_us + time.dense_collectives_us


def test_copies_add_up_once_a_step():
    """Replicas all of a table, copies their part: table by table, after all micro-batches."""
    chosen = options(accumulate=3)
    volume = replicate(shape_of(chosen), 64, chosen.wire)
    time = step_time(CONFIG, chosen, DEVICE, volume, volume.collectives)
    (one,) = volume.collectives
    assert time.copies_us == pytest.approx(6 * collective_us("all_reduce", one.sent_bytes, Group(64, 8), LINKS))
    assert time.exchange_us == 0
    assert time_of(columns, accumulate=2).exchange_us == pytest.approx(2 * time_of(columns).exchange_us)

    chosen = options(table_copies=8)
    shape = shape_of(chosen)
    copies = part_added_up(shape, "columns", 8, 8, chosen.wire, 10**5)
    time = step_time(CONFIG, chosen, DEVICE, columns(shape, 8, chosen.wire), copies)
    expected_us = sum(collective_us(each.kind, each.sent_bytes, Group(8, 1), LINKS) for each in copies)
    assert time.copies_us == pytest.approx(6 * expected_us)


def test_dense_weights_are_gathered_for_each_forward_and_gradients_reduced_once():
    size, group = 4 * dense_parameters(CONFIG), Group(64, 8)
    share = 63 * 4 * dense_share(CONFIG, 64)
    gather, scatter = (collective_us(kind, share, group, LINKS) for kind in ("all_gather", "reduce_scatter"))
    assert time_of(columns, accumulate=3).dense_collectives_us == pytest.approx(3 * gather + scatter)
    pieces = -(-size // 2**25)
    whole = collective_us("all_reduce", 2 * (size - size // 64), group, LINKS)
    latency = collective_us("all_reduce", 1, group, LINKS)
    copied = time_of(columns, dense="replicate", accumulate=3).dense_collectives_us
    assert copied == pytest.approx(whole + (pieces - 1) * latency, rel=1e-5)


def test_one_rank_waits_for_nobody():
    time = time_of(rows_at_home, ranks=1)
    assert time.exchange_us == time.dense_collectives_us == 0


def test_rates_are_those_of_the_committed_benchmarks():
    machines = [row["machine"] for row in json.loads(BENCHMARKS.read_text())["rows"]]
    assert any(each["bytes_per_second"] == pytest.approx(MEASURED_BYTES_PER_SECOND, rel=0.005) for each in machines)
    for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        rates = [each["flops_per_second"][dtype] for each in machines]
        assert any(rate == pytest.approx(MEASURED_FLOPS_PER_SECOND[name], rel=0.005) for rate in rates)


def test_devices_and_the_network_as_given():
    h100, h200 = (plan_device(name, options()) for name in ("h100", "h200"))
    assert h200.bytes_per_second / h100.bytes_per_second == pytest.approx(4.8 / 3.35)
    assert (h100.memory_bytes, h200.memory_bytes) == (80e9, 141e9)
    assert h100.links.network_bytes_per_second == 400e9 / 8
    assert plan_device("h100", options(network_gbit=100.0)).links.network_bytes_per_second == 100e9 / 8
    with pytest.raises(ValueError, match=r"device must be one of h100, h200, cpu, got 'tpu'"):
        plan_device("tpu", options())
    with pytest.raises(ValueError, match=r"network_gbit must be given with device cpu"):
        plan_device("cpu", options())
    here = plan_device("cpu", options(ranks=2, network_gbit=10.0))
    assert here.links.node_bytes_per_second == 10e9 / 8
    assert here.flops_per_second > 1e9
    assert here.name in PLAN_DEVICES


def test_indices_of_eight_bytes_take_longer():
    wide = Wire(index_bytes=8)
    chosen = options()
    narrow_us, wide_us = (
        step_time(CONFIG, chosen, DEVICE, columns(shape_of(chosen), 64, wire)).exchange_us for wire in (Wire(), wide)
    )
    assert wide_us > narrow_us
