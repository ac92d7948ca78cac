"""What instruments cost is measured and taken off: stamps, timers, profiler events; and sums held to plain forwards."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from made_up_profile import make_document
from profile_cases import make_model

from ultramem.runtime.profile.divided_runs import divided
from ultramem.runtime.profile.eager_stages import timed_runs, timer_cost
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.onnx_stamps import Stamp, StampedRun, add_stamps, stamped_runs, stamps_of
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.profiled_calls import event_cost_us
from ultramem.runtime.profile.stage_turns import _CHANGES, TURNS, NotSeparableError, stages_in_turns
from ultramem.runtime.profile.stages import NodeTime, Run
from ultramem.runtime.profile.sums import adds_up, check_sums

CPU = torch.device("cpu")


def node(module: str, time_us: float, *, kind: str = "op", start_us: float = 0.0) -> NodeTime:
    return NodeTime(f"{module}/{kind}", kind, (module,), ("mlp",), start_us, time_us, time_us)


# Stamps


def test_a_node_is_what_lies_between_two_stamps_without_the_dispatch_of_the_second() -> None:
    stamps = [
        Stamp(0, 1000, 1010),  # of an input: nothing is before it
        Stamp(0, 1030, 1040),  # a second one behind it: 20 ns of dispatch alone
        Stamp(1, 1560, 1570),  # 520 ns: a node of 500
        Stamp(2, 1580, 1600),  # 10 ns: less than a dispatch
        Stamp(1, 1620, 1630),  # another output of node 1
    ]
    (run,) = stamped_runs([stamps])
    assert [(each.place, each.start_ns, each.time_ns) for each in run.intervals] == [(1, 1040, 500.0), (2, 1570, 0.0)]
    assert run.stamps_ns == (10 + 10 + 10 + 20 + 10) + 5 * 20
    # Of what came before a node, the stamps are to be taken off its start.
    assert [each.stamps_before_ns for each in run.intervals] == [10 + 10 + 2 * 20, 10 + 10 + 10 + 3 * 20]
    assert stamped_runs([[]]) == [StampedRun((), 0.0)]


def small_model() -> Any:
    """y = split(x + b)[0] * [1] and a copy of x as a second output; a cache goes in and out."""
    from onnx import TensorProto, helper

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "b", "past.0")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("sum", "present.0")]
    nodes = [
        helper.make_node("Add", ["x", "b"], ["sum"], "add"),
        helper.make_node("Split", ["sum"], ["left", "right"], "split", axis=1, num_outputs=2),
        helper.make_node("Mul", ["left", "right"], ["y"], "mul"),
        helper.make_node("Add", ["past.0", "sum"], ["present.0"], "append"),
    ]
    graph = helper.make_graph(nodes, "small", tensors, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ultramem", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_a_stamped_graph_computes_the_same_and_tells_every_node() -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    import numpy as np

    from ultramem.export.onnx_plugin import find_plugin, register

    plugin = find_plugin()
    if plugin.file is None:
        pytest.skip(plugin.problem)
    model, options = small_model(), runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    register(options)

    def session() -> Any:
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    plain = session()
    nodes = add_stamps(model.graph)
    stamped = session()
    assert [each and each.name for each in nodes] == [None, None, "add", "split", "mul", "append"]
    feeds = {name: np.arange(8, dtype=np.float32).reshape(2, 4) + place for place, name in enumerate(("x", "b"))}
    feeds["past.0"] = feeds["x"]
    with stamps_of(plugin.file, 100) as take:
        start_ns = time.perf_counter_ns()
        found = stamped.run(None, feeds)
        end_ns = time.perf_counter_ns()
        stamps = take()
        assert take() == []
    for ours, theirs in zip(found, plain.run(None, feeds), strict=True):
        assert np.array_equal(ours, theirs)
    assert [output.name for output in stamped.get_outputs()] == ["y", "sum", "present.0"]
    assert {stamp.place for stamp in stamps} == set(range(len(nodes)))
    assert all(stamp.entered_ns <= stamp.left_ns for stamp in stamps)
    assert all(before.left_ns <= after.entered_ns for before, after in itertools.pairwise(stamps))
    assert start_ns <= stamps[0].entered_ns
    assert stamps[-1].left_ns <= end_ns
    # The inputs have two stamps each, and so the split's two outputs; nothing that depends on another comes before it.
    assert [stamp.place for stamp in stamps].count(3) == 2
    order = list(dict.fromkeys(stamp.place for stamp in stamps))
    assert order.index(2) < order.index(3) < order.index(4)
    # Without a place to go, stamps are not kept.
    stamped.run(None, feeds)
    with stamps_of(plugin.file, 2) as take:
        assert take() == []
        stamped.run(None, feeds)
        with pytest.raises(RuntimeError, match="room was made for 2"):
            take()


# Timers and the profiler


def test_modules_take_what_timers_say_and_operators_their_share_of_it() -> None:
    timed = [Run(12.0, (node("blocks.0.mlp", 4.0, kind="module"), node("head", 2.0, kind="module")), 2.0)]
    profiled = [
        Run(
            20.0,
            (
                node("model", 4.0),
                node("blocks.0.mlp", 2.0, kind="module", start_us=4.0)._replace(span_us=8.0),  # with its operator
                node("blocks.0.mlp", 6.0, start_us=5.0),
                node("head", 1.0, start_us=15.0),
            ),
        )
    ]
    (run,) = divided(timed, profiled)
    assert (run.wall_us, run.instrument_us, run.sum_us) == (12.0, 2.0, 10.0)
    # 4 of 10 us are left for 11 of 20, 4 of them the operator between.
    assert [each.time_us for each in run.nodes] == pytest.approx([4 * 4 / 11, 1.0, 3.0, 2.0])
    # The operator starts 1 us into its module at a pace of 4/8, the head 3 us behind it at the pace of the rest.
    first_us = 4 * 4 / 11
    assert [each.start_us for each in run.nodes] == pytest.approx(
        [0.0, first_us, first_us + 0.5, first_us + 4.0 + 3 * 4 / 11]
    )


def test_timers_count_the_modules_and_what_they_cost_is_taken_off() -> None:
    model = make_model()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        runs = timed_runs(model, Cell("eager", 1, "prefill", lambda: model(tokens)), 3)
    cost = timer_cost()
    assert 0 <= cost.inside_us < cost.whole_us
    for run in runs:
        # 2 memories of 5 stages, 3 blocks of 2 modules and their norms, embedding, norm and head.
        assert len({each.node for each in run.nodes}) == len(run.nodes) == 2 * 5 + 3 * 4 + 3
        assert 0 < sum(each.time_us for each in run.nodes) < run.wall_us
        assert 0 < run.instrument_us < run.wall_us
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_event_of_the_profiler_costs_something() -> None:
    assert event_cost_us() > 0


# Turns and sums


def test_plain_and_instrumented_forwards_take_turns() -> None:
    calls: list[str] = []
    cell = Cell("eager", 1, "decode", lambda: calls.append("plain"))

    def instrumented(count: int) -> list[Run]:
        calls.append("instrumented")
        return [Run(3e3, (node("head", 1.0),))] * count

    times = stages_in_turns(cell, "a method", instrumented, lambda: {"head/op": Work(3, 4)}, repeats=10, device=CPU)
    assert [name for name, _ in itertools.groupby(calls)] == ["plain", "instrumented"] * (TURNS * _CHANGES)
    assert (times.runs, times.sum_us, len(times.turn_sum_ratios)) == (10, 3e3, TURNS)
    assert times.sum_ratio == 3e3 / times.plain_us > 10
    assert [(row.flops, row.bytes) for row in times.nodes] == [(3, 4)]

    def cannot(count: int) -> list[Run]:
        raise NotSeparableError("for a reason")

    cell.round_us.append([5.0])
    times = stages_in_turns(cell, "a method", cannot, dict, repeats=10, device=CPU)
    assert (times.note, times.rows, times.turn_sum_ratios) == ("for a reason", (), ())


@pytest.mark.parametrize(
    ("ratio", "turns", "expected"),
    [
        (1.09, [1.2, 1.3], True),
        (0.91, [0.8, 0.7], True),
        (1.2, [1.3, 1.05], True),
        (1.2, [1.11, 1.3], False),
        (0.8, [0.7, 0.89], False),
    ],
)
def test_stages_add_up_unless_every_turn_says_otherwise(ratio: float, turns: list[float], expected: bool) -> None:
    assert adds_up({"sum_ratio": ratio, "turn_sum_ratios": turns}) == expected


def test_sums_of_a_profile_are_checked() -> None:
    document = make_document()
    assert check_sums(document) == []
    wrong = document["stages"][1]
    wrong.update(sum_ratio=1.25, turn_sum_ratios=[1.2, 1.31])
    document["stages"][0].update(rows=[], sum_ratio=2.0, turn_sum_ratios=[])  # not told apart: nothing to add up
    (line,) = check_sums(document)
    assert line.startswith(f"compile, {wrong['phase']}, batch 1: stages add up to 1.25 of the forward")
    assert "1.20 to 1.31 in the turns" in line
