"""Profiles of models that several ranks run together."""

import time

import pytest
import torch.distributed as dist
from families import FAMILIES
from torch.distributed.device_mesh import init_device_mesh

from ultramem.graph import build_model
from ultramem.graph.table_shard import TableShard
from ultramem.machine import Machine
from ultramem.runtime.distributed.ranks import Ranks
from ultramem.runtime.profile import profile, stage_costs, to_json
from ultramem.runtime.profile.in_step import in_step
from ultramem.runtime.profile.inductor_kernels import _kernel_stages_of

MACHINE = Machine(
    device="made up",
    cores=2,
    threads=1,
    last_level_cache_bytes=None,
    read_bytes_per_second=1e10,
    copy_bytes_per_second=1e10,
    gemm_flops_per_second=1e11,
    system="Linux",
    python="3.11",
    versions={},
    cpu_flags="avx2",
)
PROMPT = 8


def profiled(config, placement):
    """The document of this rank; the clock of the second one runs three times as fast."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = TableShard(placement=placement, mesh=init_device_mesh("cpu", (size,)), tokens="same")
    model = build_model(config, shard=shard).eval()
    clock = time.perf_counter
    if rank:
        time.perf_counter = lambda: 3 * clock()
    try:
        with in_step(Ranks(rank=rank, size=size)):
            found = profile(
                model,
                ["eager"],
                batches=(2,),
                prompt_tokens=PROMPT,
                new_tokens=3,
                seconds_per_cell=0.1,
                machine=MACHINE,
            )
    finally:
        time.perf_counter = clock
    return to_json(found)


@pytest.mark.parametrize("placement", ["rows", "columns"])
def test_the_exchange_is_a_stage_and_ranks_measure_in_step(ranks, placement):
    config = FAMILIES["ultramem"]
    documents = ranks(2).run(profiled, config, placement)
    samples = [[each["samples"] for each in document["latency"]] for document in documents]
    assert samples[0] == samples[1]
    document = documents[0]
    assert (document["model"]["ranks"], document["model"]["table_placement"]) == (2, placement)
    width = config.memory.expansion * config.memory.value_dim * 4
    for times, tokens in zip(document["stages"], (2 * PROMPT, 2), strict=True):
        rows = {row["stages"][0]: row for row in times["rows"]}
        assert rows["exchange"]["time_us"] > 0
        assert rows["exchange"]["bytes"] == tokens * width * (1 if placement == "rows" else 0.5)
        names = [node["node"] for node in times["nodes"]]
        assert "memories.0.exchange/_c10d_functional::wait_tensor" in names
        collective = "all_reduce" if placement == "rows" else "all_gather_into_tensor"
        assert f"memories.0.lookup/_c10d_functional::{collective}" in names
    assert [each["table_rows"] for each in document["row_use"]] == [config.memory.table_rows] * 2


def test_arithmetic_of_a_rank():
    config = FAMILIES["peer"]
    memory = config.memory
    whole = {each.stage: each for each in stage_costs(config, batch=2, new_tokens=3)}
    for placement, sums in (("rows", 2), ("columns", 1)):
        part = {each.stage: each for each in stage_costs(config, batch=2, new_tokens=3, ranks=4, placement=placement)}
        sent = 6 * 4 * (sums * memory.expansion * memory.value_dim + 2 * memory.num_slots) * 3 // 4
        assert part["exchange"].total_bytes == sent * len(config.parsed_insertions)
        assert part["lookup"].row_bytes == whole["lookup"].row_bytes // 4
        assert part.keys() - whole.keys() == {"exchange"}
        assert part["expand"] == whole["expand"]


def test_collectives_alone_are_the_exchange_of_a_compiled_graph():
    traced = ("lookup", "exchange")  # what a collective reads has its traces, too
    assert _kernel_stages_of("torch.ops._c10d_functional.all_reduce_.default", traced) == ("exchange",)
    assert _kernel_stages_of("torch.ops.ultramem_native.lookup_reduce.default", traced) == ("lookup",)
    assert _kernel_stages_of("cpp_fused_add_1", ("exchange", "expand")) == ("expand",)
