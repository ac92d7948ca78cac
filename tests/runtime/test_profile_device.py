"""Nodes on a GPU: which one launched what the device ran, how long it took, and what the profiler costs the host."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_decode_step import GRAPHS, recorded_call, recorded_events
from made_up_profile import make_document
from profile_cases import CONFIG, make_model
from shown_page import Page

from ultramem.graph import build_model
from ultramem.ops._registration import bodies_only
from ultramem.runtime.engine import CompiledEngine
from ultramem.runtime.profile import STAGES, Profile, device_cost, device_stages, print_profile, profile, to_json
from ultramem.runtime.profile.chrome_trace import chrome_trace
from ultramem.runtime.profile.device_calls import Activity, DeviceCall, Event, device_calls
from ultramem.runtime.profile.device_cost import HostCost, earlier_without
from ultramem.runtime.profile.device_owners import eager_owners, kernel_launches, kernel_owners
from ultramem.runtime.profile.device_runs import added_us, device_run
from ultramem.runtime.profile.device_stages import kernel_device_stages
from ultramem.runtime.profile.eager_stages import eager_runs, module_spans
from ultramem.runtime.profile.eager_work import eager_work
from ultramem.runtime.profile.inductor_stages import COMPILED_GRAPH
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import stage_of_module
from ultramem.runtime.profile.profiled_calls import CALL, CPU, Span, kineto_events, profiled_spans
from ultramem.runtime.profile.stage_turns import NotSeparableError
from ultramem.runtime.profile.stages import NodeTime
from ultramem.runtime.profile.triton_events import named_triton_kernels
from ultramem.runtime.report import render_profile

FREE = HostCost(0.0, 0.0)
DECODE_GRAPH = GRAPHS[1]


def never() -> Any:
    raise AssertionError("nothing is replayed")


def in_graph(events: list[Event]) -> list[Event]:
    """What the device ran for the compiled graph, by the calls of the CUDA API in the graph's span."""
    (graph,) = (event for event in events if event.name.startswith(COMPILED_GRAPH))
    launches = {
        event.correlation
        for event in events
        if event.name.startswith("cu") and graph.start_ns < event.start_ns < graph.start_ns + graph.time_ns
    }
    return [event for event in events if event.on_device and event.correlation in launches]


# A recorded step


def test_each_compiled_kernel_has_the_time_of_what_it_launched() -> None:
    call = recorded_call("compile")
    run = device_run(call, kernel_owners(call, GRAPHS, never), FREE)
    kernels = [node for node in run.nodes if not node.modules]
    assert [node.kind for node in kernels] == [kernel.name for kernel in DECODE_GRAPH]
    assert [node.node for node in kernels] == [f"{index} {kernel.name}" for index, kernel in enumerate(DECODE_GRAPH)]
    assert all(node.time_us > 0 for node in kernels)
    of_graph = in_graph(recorded_events("compile"))
    assert len(kernels) == 61
    assert sum(node.calls for node in kernels) == len(of_graph) == 63
    assert sum(node.time_us for node in kernels) == pytest.approx(sum(each.time_ns for each in of_graph) / 1e3)
    # A product that copies its operand first has both.
    assert [node.calls for node in kernels if node.kind == "extern_kernels.bmm"] == [2, 2]
    # The engine's own: inputs to the device, logits back.
    own = [node for node in run.nodes if node.modules]
    assert {node.kind for node in own} == {"Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pageable)"}
    assert [(node.modules, node.stages) for node in own] == [(("model",), ("other",))] * 5
    assert sum(node.time_us for node in run.nodes) == pytest.approx(173.665)
    assert run.wall_us == 2163.172
    assert [node.start_us for node in run.nodes] == sorted(node.start_us for node in run.nodes)


def test_a_replayed_graph_is_mapped_to_its_kernels_one_for_one() -> None:
    launches = kernel_launches(recorded_call("compile"), GRAPHS)
    assert launches.kernels is DECODE_GRAPH
    call = recorded_call("replay")
    run = device_run(call, kernel_owners(call, GRAPHS, lambda: launches), FREE)
    kernels = [node for node in run.nodes if not node.modules]
    assert [node.kind for node in kernels] == [kernel.name for kernel in DECODE_GRAPH]
    assert [node.calls for node in kernels] == [len(each) for each in launches.activities]
    # Attention looks at all columns that there is room for: the longest four.
    longest = sorted(kernels, key=lambda node: -node.time_us)[:4]
    assert {node.kind for node in longest} == {"torch.ops.aten._scaled_dot_product_efficient_attention.default"}
    for name in ("topk_kernel_0", "lookup_reduce_kernel_1"):
        times_us = [node.time_us for node in kernels if node.kind == name]
        assert times_us == pytest.approx([6.8, 6.8] if name == "topk_kernel_0" else [2.4, 2.4], rel=0.01)
    assert sum(node.time_us for node in run.nodes) == pytest.approx(sum(each.time_us for each in call.activities))


def without_one(call: DeviceCall, name: str) -> DeviceCall:
    place = next(place for place, activity in enumerate(call.activities) if activity.name == name)
    return call._replace(activities=call.activities[:place] + call.activities[place + 1 :])


def test_a_replayed_graph_that_is_another_is_refused() -> None:
    launches = kernel_launches(recorded_call("compile"), GRAPHS)
    call = recorded_call("replay")
    with pytest.raises(NotSeparableError, match="ran 62 activities on the device, and without being replayed 63"):
        kernel_owners(without_one(call, "topk_kernel"), GRAPHS, lambda: launches)
    renamed = tuple(
        each._replace(name="another_kernel") if each.name == "topk_kernel" else each for each in call.activities
    )
    with pytest.raises(NotSeparableError, match=r"'another_kernel' on the device where.*'12 topk_kernel_0' runs"):
        kernel_owners(call._replace(activities=renamed), GRAPHS, lambda: launches)


def test_a_step_without_one_of_its_kernels_is_refused() -> None:
    call = recorded_call("compile")
    missing = call._replace(
        spans=tuple(Span("cudaNothing", *span[1:]) if span.name == "topk_kernel_0" else span for span in call.spans)
    )
    with pytest.raises(NotSeparableError, match="not, one for one, those of a compiled graph"):
        kernel_owners(missing, GRAPHS, never)


def test_what_the_device_ran_has_a_launch() -> None:
    events = recorded_events("compile")
    lost = next(event for event in events if event.name == "cuLaunchKernel")
    with pytest.raises(NotSeparableError, match="no launch of 1 of the activities"):
        device_calls(event for event in events if event is not lost)


def test_eagers_operators_have_their_kernels_module_by_module() -> None:
    """The step was recorded without spans of modules: here two stand around operators that were."""
    events = recorded_events("eager")
    topk = next(event for event in events if event.name == "ultramem::tucker_topk")
    linear = next(event for event in events if event.name == "aten::linear")
    around = [
        event._replace(name=f"ultramem::module {module}", start_ns=event.start_ns - 1, time_ns=event.time_ns + 2)
        for event, module in ((topk, "memories.0.select"), (linear, "blocks.0.attention"))
    ]
    (call,) = device_calls([*events, *around])
    run = device_run(call, eager_owners(call), FREE)
    assert sum(node.calls for node in run.nodes) == len(call.activities) == 185
    assert sum(node.time_us for node in run.nodes) == pytest.approx(sum(each.time_us for each in call.activities))
    nodes = {node.node: node for node in run.nodes}
    select = nodes["memories.0.select/ultramem::tucker_topk"]
    assert (select.kind, select.modules, select.stages) == (
        "ultramem::tucker_topk", ("memories.0.select",), ("select",),
    )  # fmt: skip
    assert select.time_us == pytest.approx(6.8, rel=0.05)
    assert nodes["blocks.0.attention/aten::linear"].stages == ("attention",)
    assert nodes["model/ultramem::tucker_topk"].calls == 1  # the other layer's
    assert nodes["model/aten::scaled_dot_product_attention"].calls == 6  # padding of the mask, and attention
    assert not any("view" in node.kind for node in run.nodes)  # launches nothing


# Small ones


def make_call(spans: list[tuple[str, float, float]], activities: list[tuple[float, float, int]]) -> DeviceCall:
    """Spans are (name, start, time), activities (start, time, place of the launch), of a forward of 100 us."""
    return DeviceCall(
        100.0, tuple(Span(*each) for each in spans), tuple(Activity("kernel", *each) for each in activities)
    )


def test_what_a_module_launches_itself_is_a_node_by_the_kernels_name() -> None:
    call = make_call(
        [("ultramem::module head", 10.0, 20.0), ("cuLaunchKernel", 12.0, 1.0), ("cuLaunchKernel", 14.0, 1.0),
         ("aten::mm", 20.0, 5.0), ("cudaLaunchKernel", 21.0, 1.0), ("cuLaunchKernel", 40.0, 1.0)],
        [(20.0, 1.0, 1), (22.0, 2.0, 2), (30.0, 3.0, 4), (50.0, 4.0, 5)],
    )  # fmt: skip
    run = device_run(call, eager_owners(call), FREE)
    assert [(node.node, node.stages, node.time_us) for node in run.nodes] == [
        ("head/kernel", ("head",), 1.0),
        ("head/kernel 2", ("head",), 2.0),
        ("head/aten::mm", ("head",), 3.0),
        ("model/kernel", ("other",), 4.0),
    ]


def node(name: str) -> NodeTime:
    return NodeTime(name, "op", ("head",), ("head",), 0.0, 0.0, 0.0)


def test_time_that_streams_share_is_the_first_ones() -> None:
    launches: list[tuple[str, float, float]] = [("cudaLaunchKernel", 0.0, 1.0)] * 4
    activities = [(10.0, 10.0, 0), (15.0, 10.0, 1), (17.0, 3.0, 2), (40.0, 5.0, 3)]
    call = make_call(launches, activities)
    assert added_us(call.activities) == [10.0, 5.0, 0.0, 5.0]
    run = device_run(call, {0: node("a"), 1: node("b"), 2: node("c"), 3: node("a")}, FREE)
    assert [(each.node, each.start_us, each.time_us, each.span_us, each.calls) for each in run.nodes] == [
        ("a", 10.0, 15.0, 35.0, 2),
        ("b", 15.0, 5.0, 10.0, 1),
        ("c", 17.0, 0.0, 3.0, 1),
    ]
    assert (run.wall_us, run.instrument_us) == (100.0, 0.0)


COST = HostCost(1.0, 2.0, 0.5)


def test_a_device_that_waits_for_the_host_would_begin_earlier_by_all_that_it_cost() -> None:
    call = make_call(
        [("aten::a", 0.0, 20.0), ("cudaLaunchKernel", 10.0, 2.0), ("aten::b", 30.0, 20.0),
         ("cudaLaunchKernel", 40.0, 2.0), ("cudaDeviceSynchronize", 50.0, 4.0)],
        [(15.0, 3.0, 1), (45.0, 3.0, 3)],
    )  # fmt: skip
    assert earlier_without(COST, call) == ((1.0 + 2.0, 2 * (1.0 + 2.0)), 2 * (1.0 + 2.0) + 1.0)


def test_a_device_that_is_behind_hides_what_the_host_pays() -> None:
    """As with a replayed graph, or long kernels: what is launched after the first only waits for the device."""
    call = make_call(
        [("aten::a", 0.0, 5.0), ("cudaGraphLaunch", 1.0, 2.0), ("aten::b", 10.0, 20.0), ("cudaLaunchKernel", 12.0, 2.0),
         ("cudaDeviceSynchronize", 50.0, 45.0)],
        [(8.0, 40.0, 1), (48.0, 20.0, 1), (70.0, 20.0, 3)],
    )  # fmt: skip
    before = 1.0 + 2.0 + 2 * 0.5
    assert earlier_without(COST, call) == ((before, before, before), before)


def test_the_host_saves_no_more_than_the_device_was_idle() -> None:
    """The copy waits for the device, and the device never for long for the host."""
    dear = HostCost(50.0, 50.0)
    call = make_call(
        [("cudaLaunchKernel", 0.0, 1.0), ("aten::a", 2.0, 30.0), ("cudaMemcpyAsync", 20.0, 76.0)],
        [(4.0, 90.0, 0), (94.5, 0.5, 2)],
    )
    earlier = earlier_without(dear, call)
    assert earlier.starts_us == (4.0, 4.0)
    assert earlier.end_us == 4.0
    idle_us = call.wall_us - sum(added_us(call.activities))
    assert earlier.end_us <= idle_us
    for engine in ("eager", "compile", "replay"):
        recorded = recorded_call(engine)
        found = earlier_without(dear, recorded)
        assert found.end_us <= recorded.wall_us - sum(added_us(recorded.activities))
        starts_us = [
            activity.start_us - saved_us
            for activity, saved_us in zip(recorded.activities, found.starts_us, strict=True)
        ]
        assert starts_us == sorted(starts_us)
        assert starts_us[0] >= 0


def test_costs_of_a_recorded_step_are_those_of_its_events() -> None:
    """It is bound by its host: nearly nothing is hidden."""
    call = recorded_call("eager")
    launches = len({activity.launch for activity in call.activities})
    cost_us = (len(call.spans) - launches) * 0.5 + launches * 1.5
    assert earlier_without(HostCost(0.5, 1.5), call).end_us == pytest.approx(cost_us, rel=0.01)


# Ops of this package


def test_bodies_have_the_names_of_their_ops_and_those_their_work() -> None:
    """On a GPU a body launches kernels, which are told by the op around them."""
    model = make_model()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad(), module_spans(model):
        with bodies_only(named=True):
            (run,) = eager_runs(profiled_spans(lambda: model(tokens), 1))
        work = eager_work(lambda: model(tokens), lambda spans: eager_runs(spans)[0].nodes, unseen=False)
    ops = [each.node for each in run.nodes if each.kind.startswith("ultramem::")]
    assert ops == [
        f"memories.{layer}.{stage}/ultramem::{op}"
        for layer in range(2)
        for stage, op in (("select", "tucker_topk"), ("lookup", "lookup_reduce"))
    ]
    assert all(work[name].flops > 0 and work[name].bytes > 0 for name in ops)
    assert {each.node for each in run.nodes if each.kind != "module"} == set(work)


# Turns, with what was recorded in the place of a GPU


class Replaying:
    name = "compile"
    is_plain = False

    @contextmanager
    def plain_steps(self) -> Iterator[None]:
        self.is_plain = True
        yield
        self.is_plain = False


@pytest.fixture
def recorded_device(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    """An engine whose forwards are the recorded step's: replayed, and in `plain_steps` not."""
    engine = Replaying()

    def profiled(calls: Any, repeats: int, device: torch.device) -> list[DeviceCall]:
        return [recorded_call("compile" if engine.is_plain else "replay")] * repeats

    monkeypatch.setattr(device_stages, "profiled_device_calls", profiled)
    monkeypatch.setattr(device_stages, "host_cost", lambda device, *, replays: HostCost(0.5, 1.5, 0.5 * replays))
    return engine


def test_stages_of_a_replayed_step(recorded_device: Replaying) -> None:
    cell = Cell("compile", 1, "decode", lambda: None, round_us=[[5.0]])
    times = kernel_device_stages(cell, recorded_device, GRAPHS, repeats=10, device=CPU)  # type: ignore[arg-type]
    assert (times.note, times.runs, times.launches) == ("", 10, 77)
    assert {stage for row in times.rows for stage in row.stages} == {*STAGES} - {"head"}  # unknown to torch 2.11
    assert times.instrumented_us == pytest.approx(616.683)
    assert 0 < times.instrument_us < 0.5 * 100 + 77 * 2
    assert times.unattributed_us == pytest.approx(616.683 - times.instrument_us - 253.983)
    assert next(row.calls for row in times.rows if row.stages == ("select",)) == 2
    unknown = [[kernel for kernel in graph if kernel.name != "topk_kernel_0"] for graph in GRAPHS]
    times = kernel_device_stages(cell, recorded_device, unknown, repeats=10, device=CPU)  # type: ignore[arg-type]
    assert (times.rows, times.note) == ((), "the kernels that ran are not, one for one, those of a compiled graph")
    times = kernel_device_stages(cell, object(), GRAPHS, repeats=10, device=CPU)  # type: ignore[arg-type]
    assert "no way of running it kernel by kernel" in times.note
    times = kernel_device_stages(cell, recorded_device, [], repeats=10, device=CPU)  # type: ignore[arg-type]
    assert "COMPILE_OPTIONS" in times.note


def test_a_recorded_step_is_shown(recorded_device: Replaying) -> None:
    document = make_document()
    (times,) = [
        each
        for each in document["stages"]
        if (each["engine"], each["phase"], each["batch"]) == ("compile", "decode", 1)
    ]
    cell = Cell("compile", 1, "decode", lambda: None)
    found = kernel_device_stages(cell, recorded_device, GRAPHS, repeats=10, device=CPU)  # type: ignore[arg-type]
    times.update(json.loads(json.dumps(dataclasses.asdict(found))))
    page = Page(render_profile(document))
    assert "topk_kernel_0" in page.text
    assert "device time of the kernels that each launched" in page.text
    events = [event for event in chrome_trace(document)["traceEvents"] if event["name"].endswith("topk_kernel_0")]
    assert [event["dur"] for event in events] == pytest.approx([6.848, 6.817])


def test_a_triton_kernel_has_an_event_of_its_name_and_is_launched_as_without_a_profiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.runtime import triton_heuristics

    launcher = triton_heuristics.CachingAutotuner
    profiled = []

    def launch(self: Any, number: int, *, stream: int) -> int:
        profiled.append(triton_heuristics.autograd_profiler._is_profiler_enabled)
        return number + stream

    monkeypatch.setattr(launcher, "run", launch)
    kernel = object.__new__(launcher)
    kernel.inductor_meta = {"kernel_name": "triton_poi_fused_0"}
    with named_triton_kernels():
        spans = profiled_spans(lambda: kernel.run(1, stream=2), 3)
    assert [span.name for span in spans if span.name != CALL] == ["triton_poi_fused_0"] * 3
    assert not any(profiled)
    assert kernel.run(1, stream=2) == 3
    assert launcher.run is launch
    assert triton_heuristics.autograd_profiler is torch.autograd.profiler


def test_what_a_record_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def profiled(calls: Any, repeats: int, device: torch.device) -> list[DeviceCall]:
        events = kineto_events(calls, repeats)
        return device_calls(
            Event(each.name(), False, each.start_ns(), each.duration_ns(), each.correlation_id()) for each in events
        )

    monkeypatch.setattr(device_cost, "profiled_device_calls", profiled)
    cost = device_cost.host_cost(CPU, replays=False)
    assert 0 < cost.event_us < 100
    assert 0 <= cost.launch_us < 100
    assert cost.graph_node_us == 0


# On a GPU


@pytest.fixture(scope="module")
def gpu_profile() -> Profile:
    torch.manual_seed(0)
    model = build_model(CONFIG, device="cuda").eval()
    replaying = CompiledEngine(model, replay=True)
    replaying.name = "replay"
    return profile(
        model,
        ["eager", "compile", replaying],
        batches=(1, 3),
        prompt_tokens=7,
        new_tokens=4,
        decode_steps=20,
        seconds_per_cell=0.2,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_stage_has_its_time_on_a_gpu(gpu_profile: Profile) -> None:
    assert len(gpu_profile.stages) == 3 * 2 * 2
    for times in gpu_profile.stages:
        where = (times.engine, times.batch, times.phase)
        assert times.rows, (*where, times.note)
        assert times.method.startswith("device time of the kernels that each launched")
        assert {stage for row in times.rows for stage in row.stages} == set(STAGES), where
        assert all(row.time_us > 0 for row in times.rows), where
        assert sum(node.time_us for node in times.nodes) + times.unattributed_us == pytest.approx(times.sum_us), where
        assert times.launches == sum(node.calls for node in times.nodes) > 0
        assert times.unattributed_us > 0, where
        assert len({node.node for node in times.nodes}) == len(times.nodes), where
        if times.engine == "eager":
            assert all(node.stages == (stage_of_module(*node.modules),) for node in times.nodes)
    names = {
        times.engine: [node.node for node in times.nodes if not node.node.startswith("model/")]
        for times in gpu_profile.stages
        if (times.phase, times.batch) == ("decode", 1)
    }
    assert "memories.0.select/ultramem::tucker_topk" in names["eager"]
    assert all(any("topk_kernel" in name for name in names[engine]) for engine in ("compile", "replay"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stages_on_a_gpu_add_up_to_a_plain_forward(gpu_profile: Profile) -> None:
    ratios = {(times.engine, times.batch, times.phase): times.sum_ratio for times in gpu_profile.stages}
    assert {where: ratio for where, ratio in ratios.items() if not 0.75 <= ratio <= 1.25} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_profile_of_a_gpu_is_shown(gpu_profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(json.dumps(to_json(gpu_profile)))
    assert [times["engine"] for times in document["stages"]][:3] == ["eager", "compile", "replay"]
    print_profile(gpu_profile)
    assert "tucker_topk" in capsys.readouterr().out
    assert "tucker_topk" in Page(render_profile(document)).text
    assert len(chrome_trace(document)["traceEvents"]) > sum(len(times["nodes"]) for times in document["stages"]) // 2
