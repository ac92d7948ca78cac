"""Time by node and by stage: what the ways of measuring share."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ultramem.runtime.profile.arithmetic import ALL_STAGES
from ultramem.runtime.profile.measure import Cell, percentile
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.schema import ModuleRow, NodeRow, StageRow, StageTimes

Key = TypeVar("Key", bound=Hashable)

MODULE_KIND = "module"
"""Kind of a node that is a module's time outside its operators, or the whole of a module: it launches nothing."""


class NodeTime(NamedTuple):
    """One node of one forward."""

    node: str
    kind: str
    modules: tuple[str, ...]
    stages: tuple[str, ...]
    start_us: float
    """From the start of the forward."""
    time_us: float
    """Its own: that of all nodes adds up to at most the wall time."""
    span_us: float
    """From its start to its end."""
    fx_nodes: tuple[str, ...] = ()
    calls: int = 1
    """What it launched on a GPU: kernels, copies and memsets; on a CPU it is one call itself."""


class Run(NamedTuple):
    """One instrumented forward: its wall time, and its nodes in the order of their start."""

    wall_us: float
    nodes: tuple[NodeTime, ...]
    instrument_us: float = 0.0
    """Of the wall time, what the instruments took by a measurement of their own; the nodes are without it."""

    @property
    def sum_us(self) -> float:
        """What the nodes and the framework's own work between them add up to."""
        return self.wall_us - self.instrument_us


class Turn(NamedTuple):
    """Forwards without instruments, and right after them some with."""

    plain_us: Sequence[float]
    runs: Sequence[Run]


class _Times(NamedTuple):
    """Of one node or stage over the runs."""

    time_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    calls: int


def faster_half(times_us: Sequence[float]) -> float:
    """Mean of the faster half, the least disturbed ones."""
    kept = sorted(times_us)[: (len(times_us) + 1) // 2]
    return sum(kept) / len(kept)


def summarize(cell: Cell, method: str, turns: Sequence[Turn]) -> StageTimes:
    """Rows by stage and by node; bytes, FLOPs and parity are for whoever knows them (`with_roofs`).

    Times are the mean of the faster half of the runs, so that rows and rest add up to their sum; percentiles are those
    of all runs. The plain forwards that the sum is held to are reduced in the same way.
    """
    by_speed = sorted((run for turn in turns for run in turn.runs), key=lambda run: run.sum_us)
    kept = by_speed[: (len(by_speed) + 1) // 2]
    sum_us = faster_half([run.sum_us for run in by_speed])
    plain_us = faster_half([each for turn in turns for each in turn.plain_us])
    stage_times = _times(by_speed, len(kept), lambda node: node.stages)
    order = sorted(stage_times, key=lambda stages: (len(stages) > 1, [ALL_STAGES.index(stage) for stage in stages]))
    explained_us = sum(times.time_us for times in stage_times.values())
    rows = tuple(_stage_row(stages, stage_times[stages], order) for stages in order)
    return StageTimes(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        method=method,
        runs=len(by_speed),
        plain_us=plain_us,
        instrumented_us=sum(run.wall_us for run in kept) / len(kept),
        instrument_us=sum(run.instrument_us for run in kept) / len(kept),
        sum_us=sum_us,
        sum_ratio=sum_us / plain_us,
        turn_sum_ratios=tuple(
            faster_half([run.sum_us for run in turn.runs]) / faster_half(turn.plain_us) for turn in turns
        ),
        fastest_us=by_speed[0].wall_us,
        max_abs_difference=0.0,
        rows=rows,
        modules=_module_rows(by_speed, len(kept)),
        nodes=_node_rows(by_speed, len(kept)),
        launches=sum(row.calls for row in rows),
        unattributed_us=sum_us - explained_us,
        coverage=explained_us / sum_us,
        note="",
    )


def with_work(times: StageTimes, work: Mapping[str, Work]) -> StageTimes:
    """`times` with bytes and FLOPs of the nodes that have some, by name."""
    nodes = tuple(
        dataclasses.replace(row, **work[row.node]._asdict()) if row.node in work else row for row in times.nodes
    )
    return dataclasses.replace(times, nodes=nodes)


def not_separable(cell: Cell, note: str) -> StageTimes:
    """The whole, and why it cannot be divided."""
    plain_us = percentile(cell.samples_us, 0.5)
    return StageTimes(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        method="not separable",
        runs=0,
        plain_us=plain_us,
        instrumented_us=plain_us,
        instrument_us=0.0,
        sum_us=plain_us,
        sum_ratio=1.0,
        turn_sum_ratios=(),
        fastest_us=plain_us,
        max_abs_difference=0.0,
        rows=(),
        modules=(),
        nodes=(),
        launches=0,
        unattributed_us=plain_us,
        coverage=0.0,
        note=note,
    )


def _stage_row(stages: tuple[str, ...], times: _Times, all_rows: Sequence[tuple[str, ...]]) -> StageRow:
    return StageRow(
        stages=stages,
        **times._asdict(),
        is_whole=not any(set(stages) & set(other) for other in all_rows if other != stages),
        flops=None,
        bytes=None,
        flops_per_byte=None,
        bandwidth_share=None,
        compute_share=None,
    )


def _module_rows(by_speed: Sequence[Run], kept: int) -> tuple[ModuleRow, ...]:
    """Single modules first, in the order in which they run; nodes that do not say theirs are in none."""
    stages = {node.modules: node.stages for run in by_speed for node in run.nodes if node.modules}
    times = _times(by_speed, kept, lambda node: node.modules)
    return tuple(
        ModuleRow(
            modules=modules,
            stages=stages[modules],
            **times[modules]._asdict(),
            is_whole=not any(set(modules) & set(other) for other in stages if other != modules),
            flops=None,
            bytes=None,
            flops_per_byte=None,
            bandwidth_share=None,
            compute_share=None,
        )
        for modules in sorted(stages, key=len)
    )


def _node_rows(by_speed: Sequence[Run], kept: int) -> tuple[NodeRow, ...]:
    """In the order of the fastest run; a node that did not run in that one stands at the end."""

    def key(node: NodeTime) -> tuple[str, tuple[str, ...]]:
        return node.node, node.modules

    first: dict[tuple[str, tuple[str, ...]], NodeTime] = {}
    for run in by_speed:
        for node in run.nodes:
            first.setdefault(key(node), node)
    times = _times(by_speed, kept, key)
    in_fastest = {key(node) for node in by_speed[0].nodes}
    return tuple(
        NodeRow(
            node=node.node,
            kind=node.kind,
            modules=node.modules,
            fx_nodes=node.fx_nodes,
            stages=node.stages,
            **times[name]._asdict(),
            fastest_start_us=node.start_us if name in in_fastest else by_speed[0].sum_us,
            fastest_span_us=node.span_us if name in in_fastest else 0.0,
            flops=None,
            bytes=None,
            flops_per_byte=None,
            bandwidth_share=None,
            compute_share=None,
        )
        for name, node in first.items()
    )


def _times(by_speed: Sequence[Run], kept: int, key: Callable[[NodeTime], Key]) -> dict[Key, _Times]:
    """Over the runs, the fastest first, of the nodes that have the same key; the mean is that of the `kept` first."""
    per_run: dict[Key, list[float]] = defaultdict(lambda: [0.0] * len(by_speed))
    launches: dict[Key, int] = defaultdict(int)
    for index, run in enumerate(by_speed):
        for node in run.nodes:
            per_run[key(node)][index] += node.time_us
            launches[key(node)] += node.calls if node.kind != MODULE_KIND else 0
    return {
        name: _Times(
            time_us=sum(times_us[:kept]) / kept,
            p50_us=percentile(times_us, 0.5),
            p90_us=percentile(times_us, 0.9),
            p99_us=percentile(times_us, 0.99),
            calls=round(launches[name] / len(by_speed)),
        )
        for name, times_us in per_run.items()
    }
