"""Stages and nodes of eager: timers around the modules, and on a CPU the operators in them by the profiler.

The profiler writes a record of each of a thousand operators, most of them inside of others, which takes a third of a
decode step as long as the step itself. Timers around the thirty modules that are stages take a fiftieth of it. So they
say how long a module takes, and the profiler, in forwards of its own, how that divides among the module's operators.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ultramem.machine import synchronize
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import BETWEEN, TABLE, module_of_path, stage_of_module, stage_of_path
from ultramem.runtime.profile.profiled_calls import CALL, Span, profiled_spans
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stage_turns import stages_in_turns
from ultramem.runtime.profile.stages import MODULE_KIND, NodeTime, Run, faster_half

TIMED = "timers around the modules that are stages, their measured cost taken off"
PROFILED = f"{TIMED}; a module's time is divided among its operators as in forwards under PyTorch's profiler"
_MODULE_SPAN = "ultramem::module "
_COST_CALLS = 100


class HookCost(NamedTuple):
    """What a timer around a module costs."""

    inside_us: float
    """Of the time that it measures."""
    whole_us: float


def eager_stages(model: nn.Module, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Of the modules of `model`, which `cell` runs."""

    def instrumented(count: int) -> list[Run]:
        timed = timed_runs(model, cell, count, device)
        return timed if device.type != "cpu" else divided(timed, eager_runs(_profiled(model, cell, count)))

    return stages_in_turns(
        cell, PROFILED if device.type == "cpu" else TIMED, instrumented, repeats=repeats, device=device
    )


def divided(timed: Sequence[Run], profiled: Sequence[Run]) -> list[Run]:
    """The profiled runs at the pace of the timed ones, module by module.

    A module's operators, and what it does outside of them, add up to its time in the timed runs; so do the operators
    between the modules and what is outside of everything, to what the timed runs have left.
    """
    timed_us, profiled_us = _module_times(timed), _module_times(profiled)
    sum_us = faster_half([run.sum_us for run in timed])
    instrument_us = faster_half([run.wall_us for run in timed]) - sum_us
    wall_us = faster_half([run.wall_us for run in profiled])
    rest_us = max(0.0, sum_us - sum(timed_us.values()))
    paces = {module: time_us / profiled_us[module] for module, time_us in timed_us.items()}
    paces[BETWEEN] = rest_us / (wall_us - sum(profiled_us.values()))
    return [_at_pace(run, paces, sum_us / wall_us, instrument_us) for run in profiled]


def _at_pace(run: Run, paces: Mapping[str, float], overall: float, instrument_us: float) -> Run:
    nodes = tuple(
        node._replace(
            start_us=node.start_us * overall,
            time_us=node.time_us * paces[node.modules[0]],
            span_us=node.span_us * paces[node.modules[0]],
        )
        for node in run.nodes
    )
    in_modules_us = sum(node.time_us for node in run.nodes if node.modules[0] != BETWEEN)
    sum_us = sum(node.time_us for node in nodes if node.modules[0] != BETWEEN)
    sum_us += (run.wall_us - in_modules_us) * paces[BETWEEN]
    return Run(sum_us + instrument_us, nodes, instrument_us)


def _module_times(runs: Sequence[Run]) -> dict[str, float]:
    """Of each module: the mean over the faster half of the runs."""
    by_speed = sorted(runs, key=lambda run: run.sum_us)
    kept = by_speed[: (len(runs) + 1) // 2]
    found: dict[str, float] = defaultdict(float)
    for run in kept:
        for node in run.nodes:
            if node.modules[0] != BETWEEN:
                found[node.modules[0]] += node.time_us / len(kept)
    return found


def _profiled(model: nn.Module, cell: Cell, repeats: int) -> list[Span]:
    opened: list[Any] = []

    def before(name: str) -> None:
        # Takes a tenth of the time of torch.profiler.record_function.
        opened.append(torch._C._profiler._RecordFunctionFast(_MODULE_SPAN + name))
        opened[-1].__enter__()

    def after(name: str) -> None:
        opened.pop().__exit__(None, None, None)

    with _hooks(model, before, after):
        return profiled_spans(cell.call, repeats, unseen=True)


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
        stages=(stage_of_module(module),),
        start_us=span.start_us - call_start_us,
        time_us=span.time_us,
        span_us=span.time_us,
    )


@contextlib.contextmanager
def _hooks(model: nn.Module, before: Callable[[str], object], after: Callable[[str], object]) -> Iterator[None]:
    """Call `before` and `after` with the path of each module that is a stage, around its forward."""
    handles = []
    for path, module in model.named_modules():
        stage = stage_of_path(path)
        # The outermost module of a stage holds its children's time, and a lookup that of its table.
        if stage is not None and stage_of_path(path.rpartition(".")[0]) is None and not TABLE.search(path):
            name = module_of_path(path) or path

            def enter(module: nn.Module, args: Any, _name: str = name) -> None:
                before(_name)

            def leave(module: nn.Module, args: Any, output: Any, _name: str = name) -> None:
                after(_name)

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timed_runs(model: nn.Module, cell: Cell, repeats: int, device: torch.device) -> list[Run]:
    """A module is one node, whose work on the device has ended before the next begins."""
    cost = hook_cost(device)
    return [_without_cost(run, cost) for run in _timed(model, cell.call, repeats, device)]


def _timed(model: nn.Module, call: Callable[[], object], repeats: int, device: torch.device) -> list[Run]:
    begun: list[int] = []
    ended: list[tuple[str, int, int]] = []

    def before(name: str) -> None:
        synchronize(device)
        begun.append(time.perf_counter_ns())

    def after(name: str) -> None:
        synchronize(device)
        ended.append((name, begun.pop(), time.perf_counter_ns()))

    runs = []
    with _hooks(model, before, after):
        for _ in range(repeats):
            ended.clear()
            synchronize(device)
            start_ns = time.perf_counter_ns()
            call()
            synchronize(device)
            end_ns = time.perf_counter_ns()
            nodes = (_timed_node(name, first_ns - start_ns, last_ns - first_ns) for name, first_ns, last_ns in ended)
            runs.append(Run((end_ns - start_ns) / 1e3, tuple(nodes)))
    return runs


def _timed_node(name: str, start_ns: int, time_ns: int) -> NodeTime:
    return NodeTime(
        name, MODULE_KIND, (name,), (stage_of_module(name),), start_ns / 1e3, time_ns / 1e3, time_ns / 1e3
    )


def hook_cost(device: torch.device) -> HookCost:
    """Of a timer around a module that does nothing: calls of it with the timer and without."""
    module = nn.Identity()
    model = nn.ModuleDict({"head": module})  # by its name a stage

    def call() -> None:
        for _ in range(_COST_CALLS):
            module(None)

    plain_us = []
    for _ in range(5):
        start_ns = time.perf_counter_ns()
        call()
        plain_us.append((time.perf_counter_ns() - start_ns) / 1e3 / _COST_CALLS)
    runs = _timed(model, call, 5, device)
    plain, whole = statistics.median(plain_us), statistics.median(run.wall_us / _COST_CALLS for run in runs)
    inside = statistics.median(node.time_us for run in runs for node in run.nodes)
    return HookCost(max(0.0, inside - plain), max(0.0, whole - plain))


def _without_cost(run: Run, cost: HookCost) -> Run:
    nodes = tuple(
        node._replace(
            start_us=node.start_us - index * cost.whole_us,
            time_us=max(0.0, node.time_us - cost.inside_us),
            span_us=max(0.0, node.span_us - cost.inside_us),
        )
        for index, node in enumerate(run.nodes)
    )
    return Run(run.wall_us, nodes, cost.whole_us * len(run.nodes))
