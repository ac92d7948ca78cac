"""Profiles: arithmetic against real modules, percentiles, agreement, stages, and a measurement end to end."""

from __future__ import annotations

import dataclasses
import json
import statistics
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd.profiler import record_function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ultramem
from ultramem.config import MemoryConfig, ModelConfig
from ultramem.runtime.profile import (
    MEMORY_STAGES,
    STAGES,
    Machine,
    Profile,
    WrongLogitsError,
    check_document,
    measure_machine,
    print_profile,
    profile,
    stage_costs,
    to_json,
)
from ultramem.runtime.profile.inductor_stages import Kernel, kernel_stages, packaged_kernels, stages_of_traces
from ultramem.runtime.profile.measure import Cell, measure_cells, percentile
from ultramem.runtime.profile.onnx_stages import stage_runs
from ultramem.runtime.profile.stages import Run, stage_of_path, summarize
from ultramem.runtime.profile.units import bytes_text, number_text, share_text, time_text

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    inner_size=80,
    num_heads=2,
    num_layers=3,
    dropout=0.0,
    memory=MemoryConfig(hidden_size=32, num_layers=3, value_dim=16, key_dim=12, knum=9, top_m=4),
    insertions="1:2/2:3",
)
MACHINE = Machine(
    device="a processor",
    cores=2,
    threads=1,
    last_level_cache_bytes=2**25,
    read_bytes_per_second=2e10,
    copy_bytes_per_second=1e10,
    gemm_flops_per_second=5e10,
    system="Linux",
    python="3.12",
    versions={"torch": "2.13"},
    cpu_flags="AVX2",
)


class Eager:
    name = "eager"

    def __init__(self, model: ultramem.Transformer) -> None:
        self.model = model

    def prefill(self, input_ids_BS: Any, attention_mask_BS: Any = None) -> tuple[Any, Any]:
        output = self.model(input_ids_BS, attention_mask=attention_mask_BS)
        return output.logits, output.cache

    def decode(self, input_ids_B1: Any, cache: Any, attention_mask: Any = None) -> tuple[Any, Any]:
        output = self.model(input_ids_B1, cache=cache, attention_mask=attention_mask)
        return output.logits, output.cache


class Wrong(Eager):
    """Right in prefill, wrong in one logit of the decode step."""

    name = "wrong"

    def decode(self, input_ids_B1: Any, cache: Any, attention_mask: Any = None) -> tuple[Any, Any]:
        logits, cache = super().decode(input_ids_B1, cache, attention_mask)
        logits[0, 0, 0] += 1e-3
        return logits, cache


class Nan(Eager):
    name = "nan"

    def prefill(self, input_ids_BS: Any, attention_mask_BS: Any = None) -> tuple[Any, Any]:
        logits, cache = super().prefill(input_ids_BS, attention_mask_BS)
        return logits * torch.nan, cache


def make_model(config: ModelConfig = CONFIG) -> ultramem.Transformer:
    torch.manual_seed(0)
    return ultramem.build_model(config).eval()


def make_profile(*engines: Any, **settings: Any) -> Profile:
    model = make_model()
    return profile(
        model,
        engines or [Eager(model)],
        name="tiny",
        **{"batches": (1, 3), "prompt_tokens": 7, "decode_steps": 12, "seconds_per_cell": 0.05, **settings},
        machine=MACHINE,
    )


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


def test_eager_stages_add_up_to_the_wall_time(eager_profile: Profile) -> None:
    for times in eager_profile.stages:
        assert [row.stages for row in times.rows] == [(stage,) for stage in STAGES]
        assert all(row.time_us > 0 for row in times.rows)
        assert times.unattributed_us > 0
        assert sum(row.time_us for row in times.rows) + times.unattributed_us == pytest.approx(times.wall_us)
        assert times.coverage == pytest.approx(1 - times.unattributed_us / times.wall_us)


def test_hooks_are_gone_after_a_profile() -> None:
    model = make_model()
    make_profile(Eager(model), batches=(1,))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_json_is_versioned_and_comes_back_from_a_file(eager_profile: Profile) -> None:
    document = to_json(eager_profile)
    assert (document["kind"], document["format_version"]) == ("ultramem-profile", 1)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["latency"][0]["p50_us"] == eager_profile.latency[0].p50_us
    assert document["machine"]["bytes_per_second"] == 2e10
    assert check_document(document) == document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "kind 'ultramem-profile', got None"),
        ({"kind": "other"}, "kind 'ultramem-profile', got 'other'"),
        ({"kind": "ultramem-profile", "format_version": 99}, "format_version 1, got 99"),
    ],
)
def test_a_foreign_document_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_document(document)


def test_terminal_table(eager_profile: Profile) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  # closed with the console
    with console.file:
        print_profile(eager_profile, console)
        text = console.export_text()
    for row in eager_profile.latency:
        assert time_text(row.p50_us) in text
    assert "lookup" in text


def test_machine_is_measured() -> None:
    machine = measure_machine(array_bytes=2**20, gemm_size=64)
    assert machine.bytes_per_second == max(machine.read_bytes_per_second, machine.copy_bytes_per_second) > 0
    assert machine.gemm_flops_per_second > 0
    assert machine.versions["torch"].startswith(torch.__version__.partition("+")[0])


# Stages


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("memories.0.query", "query"),
        ("model.memories.1.query.proj", "query"),
        ("memories.0.expand", "expand"),
        ("blocks.2.attention.qkv", "attention"),
        ("blocks.2.attention_norm", "other"),
        ("blocks.0.mlp", "mlp"),
        ("blocks.0.mlp_norm", "other"),
        ("head", "head"),
        ("embedding", "other"),
        ("norm", "other"),
        ("blocks.0", None),
        ("memories.0", None),
        ("", None),
    ],
)
def test_stage_of_a_module_path(path: str, stage: str | None) -> None:
    assert stage_of_path(path) == stage


def test_rows_are_the_mean_of_the_faster_half() -> None:
    cell = Cell("compile", 1, "decode", lambda: None)
    runs = [Run(10.0, {("mlp",): 4.0, ("score", "select"): 2.0}), Run(14.0, {("mlp",): 6.0}), Run(900.0, {})]
    times = summarize(cell, "a method", runs)
    assert (times.wall_us, times.unattributed_us) == (12.0, 6.0)
    assert [(row.stages, row.time_us) for row in times.rows] == [(("mlp",), 5.0), (("score", "select"), 1.0)]


def model_traces() -> dict[str, str]:
    """The stack trace of one operator of each kind in an exported model, as Inductor keeps them."""
    with torch.no_grad():
        exported = torch.export.export(make_model(), (torch.zeros(2, 5, dtype=torch.int64),))
    traces = {}
    for node in exported.graph.nodes:
        trace = node.meta.get("stack_trace")
        if node.op == "call_function" and trace is not None:
            traces[f"{node.target}@{list(node.meta['nn_module_stack'].values())[-1][0]}"] = trace
    return traces


def test_a_stack_trace_belongs_to_the_stage_of_its_module() -> None:
    traces = model_traces()
    assert len(traces) > 30
    found = set()
    for key, trace in traces.items():
        stage = stage_of_path(key.rpartition("@")[2]) or "other"
        assert stages_of_traces([trace]) == (stage,), key
        found.add(stage)
    assert found == set(STAGES)


def test_a_kernel_over_several_stages_keeps_them_all() -> None:
    traces = list(model_traces().items())
    chosen = [trace for key, trace in traces if stage_of_path(key.rpartition("@")[2]) in ("mlp", "score")]
    assert stages_of_traces(chosen) == ("score", "mlp")


def profiled_cell() -> Cell:
    weight = torch.ones(8, 8)

    def call() -> None:
        weight.cumsum(0)  # the engine's own, outside the graph
        with record_function("## Call CompiledFxGraph abc ##"):
            (weight @ weight).topk(2)

    return Cell("compile", 1, "decode", call, round_us=[[5.0]])


def test_profiler_events_follow_the_compiled_kernels() -> None:
    kernels = [Kernel("aten.matmul", ("mlp",)), Kernel("torch.ops.aten.topk.default", ("select",))]
    times = kernel_stages(profiled_cell(), [[Kernel("extern_kernels.bmm", ("head",))], kernels], repeats=3)
    assert [row.stages for row in times.rows] == [("select",), ("mlp",)]
    assert 0 < times.coverage <= 1


@pytest.mark.parametrize(
    ("graphs", "note"),
    [([], "compiled without COMPILE_OPTIONS"), ([[Kernel("extern_kernels.bmm", ("head",))]], "not, one for one")],
)
def test_what_cannot_be_divided_is_reported_whole(graphs: list[list[Kernel]], note: str) -> None:
    times = kernel_stages(profiled_cell(), graphs, repeats=3)
    assert (times.rows, times.method, times.wall_us, times.unattributed_us) == ((), "not separable", 5.0, 5.0)
    assert note in times.note


def test_kernels_of_a_package(tmp_path: Path) -> None:
    (head,) = [trace for key, trace in model_traces().items() if key.endswith("linear.default@head")]
    information = {
        "cpp_fused_add_0:10": {"stack_traces": []},
        "aoti_torch_cpu_mm_out:9": {"stack_traces": [head]},
    }
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/model/kernel_information.json", json.dumps(information))
    assert packaged_kernels(tmp_path / "model.pt2") == [
        [Kernel("aoti_torch_cpu_mm_out", ("head",)), Kernel("cpp_fused_add_0", ("other",))]
    ]


def test_onnx_node_times_go_to_the_run_they_are_in() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
        {"cat": "Node", "name": "matmul_kernel_time", "ts": 110, "dur": 20},
        {"cat": "Node", "name": "cast_kernel_time", "ts": 135, "dur": 5},
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 40},
        {"cat": "Node", "name": "matmul_kernel_time", "ts": 210, "dur": 30},
    ]
    runs = stage_runs(events, {"matmul": "mlp"})
    assert runs == [Run(50, {("mlp",): 20.0}), Run(40, {("mlp",): 30.0})]


@pytest.mark.slow
def test_every_engine_shows_its_stages(tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    model = make_model()
    found = profile(
        model,
        ["eager", "compile", "onnx", "aoti"],
        batches=(1, 2),
        prompt_tokens=7,
        decode_steps=10,
        seconds_per_cell=0.05,
        artifact_folder=tmp_path,
        machine=MACHINE,
    )
    assert len(found.stages) == 16
    for times in found.stages:
        assert times.rows, times
        covered = {stage for row in times.rows for stage in row.stages}
        assert covered == set(STAGES), (times.engine, times.batch, times.phase, covered)
        assert 0 < times.coverage <= 1


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
