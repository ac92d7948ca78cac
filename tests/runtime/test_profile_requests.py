"""Requests: when tokens come, what memory and pages they take, what was compiled, which rows they read."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from profile_cases import CONFIG, Eager, make_model, make_profile

from ultramem.runtime.profile import Profile
from ultramem.runtime.profile import memory_watch as watching
from ultramem.runtime.profile.compile_counts import CompileCounts, compile_counts
from ultramem.runtime.profile.measure import draw_inputs
from ultramem.runtime.profile.memory_watch import HIGH_WATER, SAMPLED, UNKNOWN, MemoryWatch
from ultramem.runtime.profile.requests import (
    RequestSamples,
    TimedRequest,
    measure_requests,
    request_record,
    run_request,
)
from ultramem.runtime.profile.rows_touched import rows_touched

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def eager_profile() -> Profile:
    return make_profile()


def test_a_request_decodes_what_the_model_would() -> None:
    model = make_model()
    fed: list[int] = []

    class Watched(Eager):
        def decode(self, input_ids_B1: Any, cache: Any, attention_mask: Any = None) -> tuple[Any, Any]:
            fed.append(input_ids_B1.item())
            assert cache.length == 7 + len(fed) - 1
            return super().decode(input_ids_B1, cache, attention_mask)

    prompt = draw_inputs(CONFIG.vocab_size, batch=1, prompt_tokens=7, seed=0).prompt_BS
    with torch.no_grad():
        timed = run_request(Watched(model), prompt, new_tokens=4, device=CPU)
        tokens = prompt
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert fed == tokens[0, 7:].tolist()
    assert len(timed.gaps_us) == 3
    assert min(timed.ttft_us, *timed.gaps_us) > 0


def test_the_figures_of_a_request() -> None:
    samples = RequestSamples(
        rounds=[
            [TimedRequest(100.0, (10.0, 20.0)), TimedRequest(120.0, (30.0, 30.0))],
            [TimedRequest(200.0, (10.0, 10.0))],
        ],
        recompiles=2,
    )
    with MemoryWatch() as samples.watch:
        pass
    record = request_record("eager", torch.zeros(4, 7), samples, launches_per_step=9, max_abs_difference=2e-6)
    assert (record.batch, record.prompt_tokens, record.new_tokens, record.requests, record.gaps) == (4, 7, 3, 3, 6)
    assert (record.ttft_us, record.tpot_us) == (120.0, 15.0)
    assert (record.gap_p50_us, record.gap_p90_us) == (15.0, 30.0)
    assert record.round_ttft_us == (110.0, 200.0)
    assert record.round_tpot_us == (22.5, 10.0)
    assert record.tokens_per_second == pytest.approx(4 * 3 / 180e-6)
    assert (record.recompiles, record.launches_per_step, record.max_abs_difference) == (2, 9, 2e-6)


def test_requests_take_turns() -> None:
    model, order = make_model(), []

    class Named(Eager):
        def __init__(self, name: str) -> None:
            super().__init__(model)
            self.name = name

        def prefill(self, input_ids_BS: Any, attention_mask_BS: Any = None) -> tuple[Any, Any]:
            order.append(self.name)
            return super().prefill(input_ids_BS, attention_mask_BS)

    found = measure_requests(
        [Named("a"), Named("b")],
        torch.zeros(1, 3, dtype=torch.int64),
        new_tokens=2,
        rounds=2,
        seconds_per_cell=1e-9,
        device=CPU,
    )
    assert order == ["a", "b"] * 4  # the warm-up, two rounds, and the one whose memory is watched
    assert [len(each.rounds) for each in found] == [2, 2]


def test_requests_are_in_the_profile(eager_profile: Profile) -> None:
    assert [(row.engine, row.batch, row.new_tokens) for row in eager_profile.requests] == [
        ("eager", 1, 4), ("eager", 3, 4),
    ]  # fmt: skip
    for row in eager_profile.requests:
        assert row.gap_p50_us <= row.gap_p90_us <= row.gap_p99_us
        assert row.gaps == 3 * row.requests
        assert len(row.round_ttft_us) == len(row.round_tpot_us) == eager_profile.settings.rounds
        (decode,) = [each for each in eager_profile.stages if (each.phase, each.batch) == ("decode", row.batch)]
        assert row.launches_per_step == decode.launches == sum(node.calls for node in decode.nodes)
        assert row.recompiles == 0


def test_preparation_is_split(eager_profile: Profile) -> None:
    (engine,) = eager_profile.engines
    assert engine.prepare_seconds == engine.export_seconds + engine.open_seconds + engine.warm_up_seconds
    assert engine.warm_up_seconds > 0
    assert (engine.graphs, engine.graph_breaks) == (0, 0)


@pytest.mark.parametrize("use_high_water", [True, False])
def test_memory_of_a_block_is_seen_after_it_was_freed(use_high_water: bool) -> None:
    size = 64 * 2**20
    earlier = torch.ones(2 * size // 4)  # a peak of before must not count
    del earlier
    with MemoryWatch(use_high_water=use_high_water) as watch:
        block = torch.ones(size // 4)
        time.sleep(0.05)
        del block
    assert watch.method in ((HIGH_WATER, SAMPLED) if use_high_water else (SAMPLED,))
    assert watch.memory_bytes == pytest.approx(size, rel=0.1)
    # Huge pages hold 2 MiB each.
    assert watch.minor_faults >= size // 2**21
    with MemoryWatch(use_high_water=use_high_water) as watch:
        pass
    assert watch.memory_bytes is not None
    assert watch.memory_bytes < size / 8


def test_memory_without_proc_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(watching, "_PROC", tmp_path)
    with MemoryWatch() as watch:
        pass
    assert (watch.memory_bytes, watch.method) == (None, UNKNOWN)


def test_compiled_graphs_and_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    before = compile_counts()
    compiled = torch.compile(broken, backend="eager")
    compiled(torch.ones(3))
    assert compile_counts().since(before) == CompileCounts(graphs=2, graph_breaks=1, cached_graphs=0)
    compiled(torch.ones(3))
    assert compile_counts().since(before) == CompileCounts(graphs=2, graph_breaks=1, cached_graphs=0)


def test_rows_touched_are_those_that_the_table_was_asked_for() -> None:
    model = make_model()
    inputs = draw_inputs(CONFIG.vocab_size, batch=2, prompt_tokens=5, seed=0)
    found = {(row.phase, row.table): row for row in rows_touched(model, inputs)}
    assert set(found) == {(phase, f"memories.{index}.table") for phase in ("prefill", "decode") for index in range(2)}
    # The table counts its rows in training mode, by its own code.
    for memory in model.memories:
        memory.table.count_row_use()
        memory.table.train()
    with torch.no_grad():
        model(inputs.prompt_BS)
    memory_config = CONFIG.memory
    assert memory_config is not None
    for index, memory in enumerate(model.memories):
        row = found["prefill", f"memories.{index}.table"]
        assert row.rows_touched == (memory.table.row_use_N > 0).sum()
        assert row.reads == memory.table.row_use_N.sum() == 2 * 5 * memory_config.num_slots
        assert row.table_rows == memory_config.table_rows
        assert row.row_bytes == 4 * memory_config.value_dim
        assert found["decode", f"memories.{index}.table"].reads == 2 * memory_config.num_slots
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_shared_table_is_one_record_and_a_dense_model_has_none() -> None:
    memory = dataclasses.replace(CONFIG.memory, table="shared")
    model = make_model(dataclasses.replace(CONFIG, memory=memory))
    inputs = draw_inputs(CONFIG.vocab_size, batch=1, prompt_tokens=2, seed=0)
    prefill, decode = rows_touched(model, inputs)
    assert (prefill.table, prefill.phase, decode.phase) == ("table", "prefill", "decode")
    assert decode.reads == 2 * memory.num_slots  # of both layers
    assert rows_touched(make_model(dataclasses.replace(CONFIG, memory=None, insertions="")), inputs) == []


def test_memory_of_a_gpu_is_what_pytorch_allocates_there(monkeypatch):
    allocated = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(most=allocated["now"]))
    with MemoryWatch(torch.device("cuda")) as watch:
        allocated["most"] = max(allocated["most"], 350)
    assert (watch.memory_bytes, watch.method) == (250, "memory of the GPU in PyTorch's allocator")
    assert watch.minor_faults >= 0
