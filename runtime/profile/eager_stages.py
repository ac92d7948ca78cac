"""Stages and nodes of eager on a CPU: timers around the modules, and the operators in them by the profiler.

The profiler writes a record of each of a thousand operators, most of them inside of others, which takes a third of the
time of a decode step. Timers around the thirty modules that are stages take little. So they say how long a module
takes, and the profiler, in forwards of its own, how that divides among the module's operators.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ultramem.runtime.profile.arithmetic import EXCHANGE
from ultramem.runtime.profile.divided_runs import divided
from ultramem.runtime.profile.eager_work import eager_work
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import BETWEEN, COLLECTIVES, TABLE, module_of_path, stage_of_module, stage_of_path
from ultramem.runtime.profile.operator_work import Work
from ultramem.runtime.profile.profiled_calls import CALL, Span, profiled_spans
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import stages_in_turns
from ultramem.runtime.profile.stages import MODULE_KIND, NodeTime, Run

METHOD = (
    "timers around the modules that are stages, their measured cost taken off; a module's time is divided among its "
    "operators as in forwards under PyTorch's profiler"
)
_MODULE_SPAN = "ultramem::module "
_COST_CALLS, _COST_REPEATS = 100, 20
_WARM_UP = 5

Forward = Callable[..., Any]


class TimerCost(NamedTuple):
    """What a timer around a module costs."""

    inside_us: float
    """Of the time that it measures."""
    whole_us: float


def eager_stages(model: nn.Module, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Of the modules of `model`, which `cell` runs on a CPU."""

    def instrumented(count: int) -> list[Run]:
        return divided(timed_runs(model, cell, count), eager_runs(_profiled(model, cell, count)))

    def work() -> dict[str, Work]:
        with module_spans(model):
            return eager_work(cell.call, lambda spans: eager_runs(spans)[0].nodes)

    return stages_in_turns(cell, METHOD, instrumented, work, repeats=repeats, device=device)


def _profiled(model: nn.Module, cell: Cell, repeats: int) -> list[Span]:
    with module_spans(model):
        return profiled_spans(cell.call, repeats, unseen=True)


def module_spans(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """In here the profiler sees an event around each module that is a stage."""

    def wrapped(name: str, forward: Forward) -> Forward:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Takes a tenth of the time of torch.profiler.record_function.
            with torch._C._profiler._RecordFunctionFast(_MODULE_SPAN + name):
                return forward(*args, **kwargs)

        return recorded

    return _around_modules(model, wrapped)


def eager_runs(spans: Iterable[Span]) -> list[Run]:
    """Each call in the profiler's events: the outermost operators, and what modules take beyond theirs."""
    calls: list[tuple[float, list[NodeTime]]] = []
    names: Counter[str] = Counter()
    start_us = operator_end = module_end = float("-inf")
    module, place = BETWEEN, 0
    for span in sorted(spans, key=lambda span: (span.start_us, -span.time_us)):
        end_us = span.start_us + span.time_us
        if span.name == CALL:
            start_us = span.start_us
            names.clear()
            calls.append((span.time_us, []))
        elif span.name.startswith(_MODULE_SPAN):
            module, module_end, place = span.name.removeprefix(_MODULE_SPAN), end_us, len(calls[-1][1])
            calls[-1][1].append(_node(module, MODULE_KIND, module, span, start_us))
        elif "::" in span.name and span.start_us >= operator_end and calls:
            operator_end = end_us
            nodes = calls[-1][1]
            inside = module if span.start_us < module_end else BETWEEN
            if inside != BETWEEN:  # what its operators leave is the module's own
                nodes[place] = nodes[place]._replace(time_us=nodes[place].time_us - span.time_us)
            name = f"{inside}/{span.name}"
            names[name] += 1
            number = f" {names[name]}" if names[name] > 1 else ""
            nodes.append(_node(name + number, span.name, inside, span, start_us))
    return [Run(wall_us, tuple(nodes)) for wall_us, nodes in calls]


def _node(name: str, kind: str, module: str, span: Span, call_start_us: float) -> NodeTime:
    return NodeTime(
        node=name,
        kind=kind,
        modules=(module,),
        stages=(EXCHANGE if kind.startswith(COLLECTIVES) else stage_of_module(module),),
        start_us=span.start_us - call_start_us,
        time_us=span.time_us,
        span_us=span.time_us,
    )


@contextlib.contextmanager
def _around_modules(model: nn.Module, wrapped: Callable[[str, Forward], Forward]) -> Iterator[None]:
    """Put `wrapped(path, forward)` in the place of the forward of each module that is a stage.

    Not by hooks: a module that has some is called in a slower way, which takes longer than the timer.
    """
    changed = []
    for path, module in model.named_modules():
        stage = stage_of_path(path)
        # The outermost module of a stage holds its children's time, and a lookup that of its table.
        if stage is not None and stage_of_path(path.rpartition(".")[0]) is None and not TABLE.search(path):
            object.__setattr__(module, "forward", wrapped(module_of_path(path) or path, module.forward))
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            object.__delattr__(module, "forward")


def timed_runs(model: nn.Module, cell: Cell, repeats: int) -> list[Run]:
    """A module is one node."""
    cost = timer_cost()
    return [_without_cost(run, cost) for run in _timed(model, cell.call, repeats)]


def _timed(model: nn.Module, call: Callable[[], object], repeats: int) -> list[Run]:
    ended: list[tuple[str, int, int]] = []
    now = time.perf_counter_ns

    def wrapped(name: str, forward: Forward) -> Forward:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_ns = now()
            result = forward(*args, **kwargs)
            ended.append((name, start_ns, now()))
            return result

        return timed

    runs = []
    with _around_modules(model, wrapped):
        for _ in range(_WARM_UP):
            call()
        for _ in range(repeats):
            ended.clear()
            start_ns = time.perf_counter_ns()
            call()
            end_ns = time.perf_counter_ns()
            nodes = (_timed_node(name, first_ns - start_ns, last_ns - first_ns) for name, first_ns, last_ns in ended)
            runs.append(Run((end_ns - start_ns) / 1e3, tuple(nodes)))
    return runs


def _timed_node(name: str, start_ns: int, time_ns: int) -> NodeTime:
    return NodeTime(name, MODULE_KIND, (name,), (stage_of_module(name),), start_ns / 1e3, time_ns / 1e3, time_ns / 1e3)


def timer_cost() -> TimerCost:
    """Of a timer around a module that does nothing: calls of it with the timer and without."""
    module = nn.Identity()
    model = nn.ModuleDict({"head": module})  # by its name a stage

    def call() -> None:
        for _ in range(_COST_CALLS):
            module(None)

    plain_us: list[float] = []
    runs: list[Run] = []
    for _ in range(_COST_REPEATS):  # in turns: a machine changes its speed
        start_ns = time.perf_counter_ns()
        call()
        plain_us.append((time.perf_counter_ns() - start_ns) / 1e3 / _COST_CALLS)
        runs += _timed(model, call, 1)
    plain, whole = min(plain_us), min(run.wall_us / _COST_CALLS for run in runs)  # as undisturbed as they come
    inside = statistics.median(node.time_us for run in runs for node in run.nodes)
    return TimerCost(max(0.0, inside - plain), max(0.0, whole - plain))


def _without_cost(run: Run, cost: TimerCost) -> Run:
    nodes = tuple(
        node._replace(
            start_us=node.start_us - index * cost.whole_us,
            time_us=max(0.0, node.time_us - cost.inside_us),
            span_us=max(0.0, node.span_us - cost.inside_us),
        )
        for index, node in enumerate(run.nodes)
    )
    return Run(run.wall_us, nodes, cost.whole_us * len(run.nodes))
