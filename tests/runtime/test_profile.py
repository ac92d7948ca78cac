"""Profiles: arithmetic against real modules, percentiles, agreement, and a measurement end to end."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from typing import Any

import pytest
import torch
from profile_cases import CONFIG, Eager, Nan, Wrong, make_model, make_profile
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ultramem
from ultramem.runtime.profile import (
    MEMORY_STAGES,
    STAGES,
    Profile,
    WrongLogitsError,
    check_document,
    measure_machine,
    print_profile,
    stage_costs,
    to_json,
)
from ultramem.runtime.profile.measure import Cell, measure_cells, percentile
from ultramem.runtime.profile.modules import stage_of_path
from ultramem.runtime.profile.units import bytes_text, number_text, share_text, time_text


@pytest.fixture(scope="module")
def eager_profile() -> Profile:
    return make_profile()


# Arithmetic


def test_weight_and_row_bytes_are_those_of_the_modules() -> None:
    with torch.device("meta"):
        model = ultramem.build_model(CONFIG)
    expected: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        stage = stage_of_path(name)
        assert stage is not None, name
        expected[stage] += parameter.numel() * 4
    # A batch this large touches every value row and every embedding row.
    costs = {cost.stage: cost for cost in stage_costs(CONFIG, batch=64, new_tokens=8)}
    assert {stage: cost.weight_bytes + cost.row_bytes for stage, cost in costs.items()} == expected
    assert tuple(costs) == STAGES


@pytest.mark.parametrize(("batch", "new_tokens"), [(2, 1), (3, 5)])
def test_matmul_flops_are_those_that_torch_counts(batch: int, new_tokens: int) -> None:
    # Without the convolution, which is not a matrix product to torch's counter.
    memory = dataclasses.replace(CONFIG.memory, conv_width=1)
    config = dataclasses.replace(CONFIG, memory=memory)
    model, cached = make_model(config), 6
    with torch.no_grad():
        cache = model(torch.zeros(batch, cached, dtype=torch.int64)).cache
        # torch counts no fused attention on a CPU: take the one that is made of matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=8) as counter:
            model(torch.zeros(batch, new_tokens, dtype=torch.int64), cache=cache)
    counted: dict[str, int] = defaultdict(int)
    for path, flops in counter.get_flop_counts().items():
        path = path.removeprefix("Transformer.")
        stage = stage_of_path(path)
        if stage is not None and stage_of_path(path.rpartition(".")[0]) is None:
            counted[stage] += sum(flops.values())
    costs = stage_costs(config, batch=batch, new_tokens=new_tokens, cached_tokens=cached)
    flops = {cost.stage: cost.flops for cost in costs}
    # torch counts a product with every position, the arithmetic only those that a token may see.
    unseen = batch * new_tokens * (new_tokens - 1) // 2
    flops["attention"] += CONFIG.num_layers * 4 * CONFIG.hidden_size * unseen
    same = ("query", "score", "expand", "attention", "mlp", "head")
    assert {stage: counted[stage] for stage in same} == {stage: flops[stage] for stage in same}


def test_rows_read_are_at_most_the_table() -> None:
    assert CONFIG.memory is not None
    row_bytes, slots = CONFIG.memory.value_dim * 4, CONFIG.memory.num_slots
    lookup = {
        batch: next(cost for cost in stage_costs(CONFIG, batch=batch, new_tokens=1) if cost.stage == "lookup")
        for batch in (1, 2, 1000)
    }
    layers = 2
    assert lookup[1].row_bytes == layers * slots * row_bytes
    assert lookup[2].row_bytes == layers * 2 * slots * row_bytes
    assert lookup[1000].row_bytes == layers * CONFIG.memory.num_values * row_bytes


def test_decode_reads_the_cache_and_prefill_only_writes_it() -> None:
    def cache_bytes(new_tokens: int, cached_tokens: int) -> int:
        costs = stage_costs(CONFIG, batch=2, new_tokens=new_tokens, cached_tokens=cached_tokens)
        return next(cost.cache_bytes for cost in costs if cost.stage == "attention")

    key_and_value = 2 * CONFIG.hidden_size * 4 * CONFIG.num_layers
    assert cache_bytes(5, 0) == 2 * 5 * key_and_value
    assert cache_bytes(1, 5) == 2 * 6 * key_and_value


def test_a_dense_model_has_no_memory_stages() -> None:
    dense = dataclasses.replace(CONFIG, memory=None, insertions="")
    assert not {cost.stage for cost in stage_costs(dense, batch=1, new_tokens=4)} & set(MEMORY_STAGES)


# Measurement


def test_percentiles() -> None:
    samples = [float(value) for value in range(1, 102)]
    assert [percentile(samples[::-1], share) for share in (0, 0.5, 0.9, 0.99, 1)] == [1, 51, 91, 100, 101]
    assert percentile([3.0, 1.0], 0.5) == statistics.median([3.0, 1.0])
    with pytest.raises(ValueError, match="0 samples"):
        percentile([], 0.5)


def test_engines_take_turns() -> None:
    calls: list[str] = []
    cells = [Cell(name, 1, "decode", lambda name=name: calls.append(name)) for name in "ab"]
    measure_cells(cells, rounds=3, seconds_per_cell=1.0, max_samples=6, device=torch.device("cpu"))
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns == ["a", "b"] * 4  # the warm-up, and three rounds
    assert [len(cell.samples_us) for cell in cells] == [6, 6]


@pytest.mark.parametrize("engine", [Wrong, Nan])
def test_wrong_logits_are_refused(engine: type[Eager]) -> None:
    model = make_model()
    with pytest.raises(WrongLogitsError, match=rf"'{engine.name}' disagrees with eager.*nothing is reported"):
        make_profile(Eager(model), engine(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, "batches must be different sizes of at least 1"),
        ({"batches": (0,)}, "batches must be different sizes of at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be in 1..4095, got 0"),
        ({"new_tokens": 1}, "new_tokens must be in 2..4089 after 7 tokens of 4096 positions, got 1"),
        ({"prompt_tokens": 4000, "new_tokens": 97}, "new_tokens must be in 2..96 after 4000 tokens"),
        ({"decode_steps": 0}, "decode_steps must be at least 1, got 0"),
        ({"seconds_per_cell": 0.0}, "seconds_per_cell must be positive, got 0.0"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_profile(**settings)


def test_exported_engines_need_a_folder() -> None:
    with pytest.raises(ValueError, match="artifact_folder must be given for engine 'aoti'"):
        make_profile("aoti")


def test_eager_end_to_end(eager_profile: Profile) -> None:
    assert [(row.phase, row.batch) for row in eager_profile.latency] == [
        ("prefill", 1), ("decode", 1), ("prefill", 3), ("decode", 3),
    ]  # fmt: skip
    for row in eager_profile.latency:
        assert 0 < row.min_us <= row.p50_us <= row.p90_us <= row.p99_us
        assert row.samples >= 5
        costs = [cost for cost in eager_profile.arithmetic if (cost.phase, cost.batch) == (row.phase, row.batch)]
        moved = sum(cost.total_bytes for cost in costs)
        assert row.bandwidth_share == pytest.approx(moved / (row.p50_us * 1e-6) / 2e10)
    (engine,) = eager_profile.engines
    assert engine.max_abs_difference == 0
    assert 0 < engine.tolerance < 1e-4


def test_json_is_versioned_and_comes_back_from_a_file(eager_profile: Profile) -> None:
    document = to_json(eager_profile)
    assert (document["kind"], document["format_version"]) == ("ultramem-profile", 5)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["latency"][0]["p50_us"] == eager_profile.latency[0].p50_us
    assert document["machine"]["bytes_per_second"] == 2e10
    assert check_document(document) == document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "kind 'ultramem-profile', got None"),
        ({"kind": "other"}, "kind 'ultramem-profile', got 'other'"),
        ({"kind": "ultramem-profile", "format_version": 99}, "format_version 5, got 99"),
    ],
)
def test_a_foreign_document_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_document(document)


def test_terminal_table(eager_profile: Profile) -> None:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  # closed with the console
    with console.file:
        print_profile(eager_profile, console)
        text = console.export_text()
    for row in eager_profile.latency:
        assert time_text(row.p50_us) in text
    assert "lookup" in text
    for request in eager_profile.requests:
        assert time_text(request.ttft_us) in text
        assert time_text(request.gap_p99_us) in text
    assert "memories.0.table" in text


def test_machine_is_measured() -> None:
    machine = measure_machine(array_bytes=2**20, gemm_size=64)
    assert machine.bytes_per_second == max(machine.read_bytes_per_second, machine.copy_bytes_per_second) > 0
    assert machine.gemm_flops_per_second > 0
    assert machine.versions["torch"].startswith(torch.__version__.partition("+")[0])


# Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (time_text(0.01234), "0.0123 µs"),
        (time_text(999.6), "1.00 ms"),
        (time_text(1234.5), "1.23 ms"),
        (time_text(2.5e6), "2.50 s"),
        (bytes_text(9.4996e6), "9.50 MB"),
        (bytes_text(12), "12.0 B"),
        (number_text(12345.6), "12,300"),
        (number_text(0), "0"),
        (share_text(0.0123), "1.2 %"),
        (share_text(0.5), "50 %"),
        (share_text(1.26), "126 %"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected
