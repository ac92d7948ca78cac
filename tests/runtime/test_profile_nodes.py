"""Stages and nodes: which module a path, trace, kernel or node belongs to, and times that add up."""

from __future__ import annotations

import inspect
import json
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from profile_cases import MACHINE, Eager, make_model, make_profile
from torch.autograd.profiler import record_function

from ultramem.export.program import FlatModel, example_inputs
from ultramem.graph import fold_for_inference
from ultramem.graph.coarse_keys import CoarseScore, CoarseSelect
from ultramem.graph.fold_values import ProjectedOutput
from ultramem.graph.transformer import Cache
from ultramem.runtime.profile import STAGES, Profile, profile
from ultramem.runtime.profile.arithmetic import modules_of_stages
from ultramem.runtime.profile.eager_stages import eager_runs
from ultramem.runtime.profile.inductor_kernels import Kernel, _kernels, modules_of_graph, packaged_kernels
from ultramem.runtime.profile.inductor_stages import _same_name, kernel_stages
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import module_of_path, module_of_stack, stage_of_path
from ultramem.runtime.profile.profiled_calls import CALL, Span
from ultramem.runtime.profile.roofs import stage_arithmetic, with_roofs
from ultramem.runtime.profile.stack_traces import stages_of_traces
from ultramem.runtime.profile.stage_turns import TURNS
from ultramem.runtime.profile.stages import NodeTime, Run, Turn, summarize

CPU = torch.device("cpu")


def node(name: str, time_us: float, *stages: str, start_us: float = 0.0, kind: str = "op") -> NodeTime:
    return NodeTime(name, kind, (f"module of {name}",), stages, start_us, time_us, time_us)


def make_cell(engine: str = "compile") -> Cell:
    return Cell(engine, 1, "decode", lambda: None, round_us=[[5.0]])


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


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("model.memories.1.query.proj", "memories.1.query"),
        ("blocks.2.attention_norm", "blocks.2.attention_norm"),
        ("L['self'].model.blocks[0].mlp.up", "blocks.0.mlp"),
        ("L['flat']._modules['model']._modules['memories']._modules['3'].lookup", "memories.3.lookup"),
        ("memories.0", "memories.0"),
        ("memories.0.query.norm", "memories.0.query"),
        ("model.norm", "norm"),
        ("head", "head"),
        ("blocks.0", None),
        ("", None),
    ],
)
def test_module_of_a_path(path: str, module: str | None) -> None:
    assert module_of_path(path) == module


def test_a_table_belongs_to_the_lookup_that_calls_it() -> None:
    assert module_of_stack(["", "memories.1", "memories.1.lookup", "table"]) == "memories.1.lookup"
    assert module_of_stack(["", "memories.1", "memories.1.lookup", "memories.0.table"]) == "memories.1.lookup"
    assert module_of_stack(["", "blocks.0"]) == "model"


def test_rows_are_the_mean_of_the_faster_half() -> None:
    runs = [
        Run(10.0, (node("a", 4.0, "mlp"), node("b", 2.0, "score", "select"))),
        Run(14.0, (node("a", 5.0, "mlp"), node("c", 1.0, "mlp"))),
        Run(900.0, ()),
    ]
    times = summarize(make_cell(), "a method", [Turn([4.0, 6.0, 800.0], runs[:1]), Turn([7.0], runs[1:])])
    assert (times.sum_us, times.unattributed_us, times.fastest_us, times.runs) == (12.0, 6.0, 10.0, 3)
    assert (times.plain_us, times.sum_ratio, times.turn_sum_ratios) == (5.0, 2.4, (2.0, 2.0))
    assert [(row.stages, row.time_us, row.p50_us) for row in times.rows] == [
        (("mlp",), 5.0, 4.0),
        (("score", "select"), 1.0, 0.0),
    ]
    assert [(row.node, row.time_us) for row in times.nodes] == [("a", 4.5), ("b", 1.0), ("c", 0.5)]


def test_calls_are_counted_and_modules_launch_nothing() -> None:
    nodes = (node("a", 1.0, "mlp"), node("a", 1.0, "mlp"), node("m", 1.0, "mlp", kind="module"))
    times = summarize(make_cell(), "a method", [Turn([4.0], [Run(4.0, nodes)])])
    assert [(row.node, row.calls, row.time_us) for row in times.nodes] == [("a", 2, 2.0), ("m", 0, 1.0)]
    assert times.launches == times.rows[0].calls == 2


def test_roofs_of_a_row_are_its_stages_arithmetic() -> None:
    measured = make_profile(batches=(1,))
    costs = {
        cost.stage: cost
        for cost in stage_arithmetic(make_model(), MACHINE, measured.settings)
        if cost.phase == "decode"
    }
    runs = [
        Run(10.0, (node("a", 2.0, "mlp"), node("b", 2.0, "score", "select"), node("c", 1.0, "attention", "head"),
                   node("d", 1.0, "head")))
    ]  # fmt: skip
    times = with_roofs(
        summarize(make_cell(), "", [Turn([10.0], runs)]),
        tuple(costs.values()),
        MACHINE,
        modules_of_stages={},
        max_abs_difference=0.5,
    )
    assert times.max_abs_difference == 0.5
    rows = {row.stages: row for row in times.rows}
    assert rows["mlp",].is_whole
    assert rows["mlp",].flops == costs["mlp"].flops
    assert rows["mlp",].bandwidth_share == pytest.approx(costs["mlp"].total_bytes / 2e-6 / 2e10)
    whole = rows["score", "select"]
    assert whole.is_whole
    assert whole.bytes == costs["score"].total_bytes + costs["select"].total_bytes
    assert whole.flops_per_byte == pytest.approx((costs["score"].flops + costs["select"].flops) / whole.bytes)
    # What is fused over parts of stages has no arithmetic of its own; the other part has an upper bound.
    assert (rows["attention", "head"].is_whole, rows["attention", "head"].flops) == (False, None)
    assert (rows["head",].is_whole, rows["head",].flops) == (False, costs["head"].flops)


def test_roofs_of_a_module_are_its_part_of_the_stage(eager_profile: Profile) -> None:
    """Two memories, three blocks with an MLP each, and a head."""
    (times,) = [each for each in eager_profile.stages if (each.phase, each.batch) == ("decode", 3)]
    stages = {row.stages[0]: row for row in times.rows}
    modules = {row.modules[0]: row for row in times.modules}
    for name, number in (("memories.1.lookup", 2), ("blocks.2.mlp", 3), ("blocks.0.attention", 3), ("head", 1)):
        row, stage = modules[name], stages[name.rpartition(".")[2]]
        assert row.is_whole
        assert row.stages == stage.stages
        assert (row.flops, row.bytes) == (stage.flops // number, stage.bytes // number)
        assert row.flops_per_byte == row.flops / row.bytes
        assert row.bandwidth_share == pytest.approx(row.bytes / (row.time_us * 1e-6) / 2e10)
        own = [node for node in times.nodes if node.modules == (name,)]
        assert row.time_us == pytest.approx(sum(node.time_us for node in own))
        assert row.calls == sum(node.calls for node in own)
    assert (modules["model"].flops, modules["blocks.0.mlp_norm"].bytes) == (None, None)
    assert sum(row.time_us for row in times.modules) == pytest.approx(sum(row.time_us for row in times.rows))


def test_modules_that_are_fused_in_part_have_no_arithmetic() -> None:
    measured = make_profile(batches=(1,))
    costs = [cost for cost in measured.arithmetic if cost.phase == "decode"]
    nodes = [
        NodeTime("a", "op", modules, ("mlp",), 0.0, 2.0, 2.0)
        for modules in (("blocks.0.mlp",), ("blocks.0.mlp", "head"), ("blocks.1.mlp", "blocks.2.mlp"), ())
    ]
    times = summarize(make_cell(), "", [Turn([10.0], [Run(10.0, tuple(nodes))])])
    found = with_roofs(
        times, costs, MACHINE, modules_of_stages=modules_of_stages(make_model().config), max_abs_difference=0.0
    ).modules
    mlp = next(cost for cost in costs if cost.stage == "mlp")
    assert [(row.modules, row.is_whole, row.flops) for row in found] == [
        (("blocks.0.mlp",), False, mlp.flops // 3),
        (("blocks.0.mlp", "head"), False, None),
        (("blocks.1.mlp", "blocks.2.mlp"), True, 2 * (mlp.flops // 3)),
    ]


# Eager


@pytest.fixture(scope="module")
def eager_profile() -> Profile:
    return make_profile()


def test_eager_stages_add_up_to_the_wall_time(eager_profile: Profile) -> None:
    for times in eager_profile.stages:
        assert [row.stages for row in times.rows] == [(stage,) for stage in STAGES]
        assert all(row.time_us > 0 for row in times.rows)
        assert times.unattributed_us > 0
        assert sum(row.time_us for row in times.rows) + times.unattributed_us == pytest.approx(times.sum_us)
        assert sum(node.time_us for node in times.nodes) + times.unattributed_us == pytest.approx(times.sum_us)
        assert times.coverage == pytest.approx(1 - times.unattributed_us / times.sum_us)


def test_eager_nodes_name_their_modules(eager_profile: Profile) -> None:
    (times,) = [each for each in eager_profile.stages if (each.phase, each.batch) == ("decode", 1)]
    modules = {module for row in times.nodes for module in row.modules}
    expected = {module_of_path(name) for name, _ in make_model().named_modules()} - {None, "memories.0", "memories.1"}
    assert modules == {*expected, "model"}
    kinds = [row.kind for row in times.nodes if row.modules == ("head",) and row.kind != "module"]
    assert kinds == ["aten::linear"]
    assert len({row.node for row in times.nodes}) == len(times.nodes)


def test_eager_operators_are_the_outermost_of_their_module() -> None:
    spans = [
        Span(CALL, 100.0, 50.0),
        Span("aten::add", 101.0, 2.0),
        Span("ultramem::module head", 110.0, 20.0),
        Span("aten::linear", 112.0, 10.0),
        Span("aten::mm", 113.0, 8.0),
        Span("aten::linear", 125.0, 3.0),
        Span("aten::add", 140.0, 4.0),
        Span(CALL, 200.0, 10.0),
    ]
    first, second = eager_runs(reversed(spans))
    assert (first.wall_us, second) == (50.0, Run(10.0, ()))
    assert [(each.node, each.stages, each.start_us, each.time_us, each.span_us) for each in first.nodes] == [
        ("model/aten::add", ("other",), 1.0, 2.0, 2.0),
        ("head", ("head",), 10.0, 7.0, 20.0),
        ("head/aten::linear", ("head",), 12.0, 10.0, 10.0),
        ("head/aten::linear 2", ("head",), 25.0, 3.0, 3.0),
        ("model/aten::add 2", ("other",), 40.0, 4.0, 4.0),
    ]


def test_nothing_is_left_in_the_model_after_a_profile() -> None:
    model = make_model()
    make_profile(Eager(model), batches=(1,))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not torch.autograd.profiler._is_profiler_enabled


# Generated kernels


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
    kernels = [
        Kernel("aten.matmul", ("mlp",), ("blocks.0.mlp",), ("linear",)),
        Kernel("torch.ops.aten.topk.default", ("select",)),
    ]
    times = kernel_stages(profiled_cell(), [[Kernel("extern_kernels.bmm", ("head",))], kernels], repeats=3, device=CPU)
    assert [row.stages for row in times.rows] == [("select",), ("mlp",)]
    assert 0 < times.coverage <= 1
    first, second = times.nodes
    assert (first.kind, first.modules, first.fx_nodes) == ("aten.matmul", ("blocks.0.mlp",), ("linear",))
    assert 0 <= first.fastest_start_us < second.fastest_start_us < times.fastest_us


@pytest.mark.parametrize(
    ("graphs", "note"),
    [([], "compiled without COMPILE_OPTIONS"), ([[Kernel("extern_kernels.bmm", ("head",))]], "not, one for one")],
)
def test_what_cannot_be_divided_is_reported_whole(graphs: list[list[Kernel]], note: str) -> None:
    times = kernel_stages(profiled_cell(), graphs, repeats=3, device=CPU)
    assert (times.rows, times.method, times.sum_us, times.unattributed_us) == ((), "not separable", 5.0, 5.0)
    assert note in times.note


@pytest.mark.parametrize(
    ("event", "kernel", "same"),
    [
        ("graph_0_cpp_fused_add_0", "cpp_fused_add_0", True),
        ("aten::mm", "extern_kernels.mm", True),
        ("aten::topk", "torch.ops.aten.topk.default", True),
        ("ultramem_native::lookup_reduce", "torch.ops.ultramem_native.lookup_reduce.default", True),
        ("ultramem_native::lookup_dot", "torch.ops.ultramem_native.lookup_reduce.default", False),
        ("other::topk", "torch.ops.aten.topk.default", False),
        ("aoti_torch_cpu_mm_out", "aoti_torch_cpu_mm_out", True),
    ],
)
def test_an_event_is_its_kernel(event: str, kernel: str, same: bool) -> None:
    assert _same_name(event, kernel) == same


def test_a_folded_score_is_a_score() -> None:
    folded = FlatModel(fold_for_inference(make_model()))
    with torch.no_grad():
        exported = torch.export.export(folded, example_inputs(make_model()))
    (trace, *_) = [
        node.meta["stack_trace"]
        for node in exported.graph.nodes
        if str(node.target).startswith("aten.einsum") and "memories" in str(node.meta["nn_module_stack"])
    ]
    assert stages_of_traces([trace]) == ("score",)


def test_a_kernel_whose_trace_names_no_stage_is_its_modules() -> None:
    """Traces of torch 2.11 underline no call: the head's line is the norm's too."""
    line = '  File "transformer.py", line 236, in decode_in_place\n    return self.head(self.norm(hidden_B1D)), convs\n'
    modules = {"logits": "head", "layer_norm": "norm", "query": "memories.0.query"}
    kernels = _kernels(
        {key: [line] for key in ("extern_kernels.mm:1", "triton_per_fused_native_layer_norm_0:2", "aten.mm:3")},
        {"extern_kernels.mm:1": ["logits"], "triton_per_fused_native_layer_norm_0:2": ["layer_norm"],
         "aten.mm:3": ["logits", "query"]},
        modules,
        {},
    )  # fmt: skip
    assert [(kernel.stages, kernel.modules) for kernel in kernels] == [
        (("head",), ("head",)),
        (("other",), ("norm",)),
        (("other",), ()),
    ]


@pytest.mark.parametrize(
    ("cls", "stage"),
    [(CoarseScore, "score"), (CoarseSelect, "select"), (ProjectedOutput, "expand"), (Cache, "other")],
)
def test_what_stands_in_for_a_stage_is_that_stage(cls: type, stage: str) -> None:
    lines, first = inspect.getsourcelines(cls)
    place = f'  File "{inspect.getsourcefile(cls)}", line {first + len(lines) - 1}, in forward'
    assert stages_of_traces([f"{place}\n    return x"]) == (stage,)


def test_kernels_of_a_package(tmp_path: Path) -> None:
    with torch.no_grad():
        exported = torch.export.export(make_model(), (torch.zeros(2, 5, dtype=torch.int64),))
    modules = modules_of_graph(exported.graph)
    head = next(node for node in exported.graph.nodes if modules.get(node.name) == "head")
    information = {
        "cpp_fused_add_0:10": {"stack_traces": [], "pre_grad_nodes": []},
        "aoti_torch_cpu_mm_out:9": {"stack_traces": [head.meta["stack_trace"]], "pre_grad_nodes": [head.name]},
    }
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/decode/kernel_information.json", json.dumps(information))
    assert packaged_kernels(tmp_path / "model.pt2", {"decode": modules}) == [
        [
            Kernel("aoti_torch_cpu_mm_out", ("head",), ("head",), (head.name,)),
            Kernel("cpp_fused_add_0", ("other",)),
        ]
    ]
    # Without the graph the stages are known all the same.
    assert [kernel.stages for kernel in packaged_kernels(tmp_path / "model.pt2")[0]] == [("head",), ("other",)]


# All engines


@pytest.mark.slow
def test_every_engine_shows_its_stages_and_modules(tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    model = make_model()
    found = profile(
        model,
        ["eager", "compile", "onnx", "aoti"],
        batches=(1, 2),
        prompt_tokens=7,
        new_tokens=4,
        decode_steps=10,
        seconds_per_cell=0.05,
        artifact_folder=tmp_path,
        machine=MACHINE,
    )
    assert len(found.stages) == 16
    # Modules that hold weights of their own: no lowering can leave one out.
    weighty = {module_of_path(name.rpartition(".")[0]) for name, _ in model.named_parameters() if "table" not in name}
    weighty |= {f"memories.{index}.lookup" for index in range(2)}
    for times in found.stages:
        assert times.rows, times
        covered = {stage for row in times.rows for stage in row.stages}
        assert covered == set(STAGES), (times.engine, times.batch, times.phase, covered)
        assert times.coverage > 0
        modules = {module for row in times.nodes for module in row.modules}
        # ONNX Runtime fuses norms with what is before them, and its name for that is no module's.
        expected = {module for module in weighty if module and not (times.engine == "onnx" and "norm" in module)}
        assert expected <= modules, (times.engine, times.batch, times.phase, expected - modules)
        assert times.launches == sum(row.calls for row in times.nodes)
        explained_us = sum(row.time_us for row in times.nodes)
        assert explained_us == pytest.approx(sum(row.time_us for row in times.rows))
        assert explained_us + times.unattributed_us == pytest.approx(times.sum_us)
        assert times.instrumented_us - times.instrument_us == pytest.approx(times.sum_us)
        assert (times.sum_ratio, len(times.turn_sum_ratios)) == (times.sum_us / times.plain_us, TURNS)
    flops = defaultdict(list)
    for times in found.stages:
        assert all(row.bytes is not None for row in times.nodes if row.kind != "module"), (times.engine, times.phase)
        if times.engine != "aoti":  # selects by standard operators, whose comparisons are no FLOPs
            flops[times.batch, times.phase].append(sum(row.flops or 0 for row in times.nodes))
    assert all(len(each) == 3 and len(set(each)) == 1 for each in flops.values()), flops
    for request in found.requests:
        assert request.recompiles == 0
        assert request.launches_per_step
    assert [engine.graph_breaks for engine in found.engines] == [0, 0, 0, 0]
    with zipfile.ZipFile(tmp_path / "aoti/model.pt2") as package:
        sources = [package.read(name).decode() for name in package.namelist() if name.endswith(".wrapper.cpp")]
    # Code that is for a profile does not read its kernels' stack traces, or a launch would take longer than a kernel.
    assert sources
    assert not any('File "' in source for source in sources)
