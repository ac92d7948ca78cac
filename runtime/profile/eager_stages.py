"""Stages and nodes of eager: operators under the profiler on a CPU, timers around the modules on other devices."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ultramem.machine import synchronize
from ultramem.runtime.profile.arithmetic import EXCHANGE
from ultramem.runtime.profile.measure import Cell
from ultramem.runtime.profile.modules import BETWEEN, COLLECTIVES, TABLE, module_of_path, stage_of_module, stage_of_path
from ultramem.runtime.profile.profiled_calls import CALL, Span, profiled_spans
from ultramem.runtime.profile.schema import StageTimes
from ultramem.runtime.profile.stages import MODULE_KIND, NodeTime, Run, summarize

PROFILED = "PyTorch's profiler: outermost operators, and modules that are stages around them"
TIMED = "timers around the modules"
_MODULE_SPAN = "ultramem::module "


def eager_stages(model: nn.Module, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Of the modules of `model`, which `cell` runs."""
    if device.type == "cpu":
        opened: list[Any] = []

        def before(name: str) -> None:
            # Takes a tenth of the time of torch.profiler.record_function.
            opened.append(torch._C._profiler._RecordFunctionFast(_MODULE_SPAN + name))
            opened[-1].__enter__()

        def after(name: str) -> None:
            opened.pop().__exit__(None, None, None)

        with _hooks(model, before, after):
            spans = profiled_spans(cell.call, repeats, unseen=True)
        return summarize(cell, PROFILED, eager_runs(spans))
    return summarize(cell, TIMED, _timed_runs(model, cell, repeats, device))


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


def _timed_runs(model: nn.Module, cell: Cell, repeats: int, device: torch.device) -> list[Run]:
    """A module is one node, whose work on the device has ended before the next begins."""
    begun: list[int] = []
    nodes: list[NodeTime] = []
    start_ns = 0

    def before(name: str) -> None:
        synchronize(device)
        begun.append(time.perf_counter_ns())

    def after(name: str) -> None:
        synchronize(device)
        begin_ns = begun.pop()
        time_us = (time.perf_counter_ns() - begin_ns) / 1e3
        stages = (stage_of_module(name),)
        nodes.append(NodeTime(name, MODULE_KIND, (name,), stages, (begin_ns - start_ns) / 1e3, time_us, time_us))

    runs = []
    with _hooks(model, before, after):
        for _ in range(repeats):
            nodes.clear()
            synchronize(device)
            start_ns = time.perf_counter_ns()
            cell.call()
            synchronize(device)
            runs.append(Run((time.perf_counter_ns() - start_ns) / 1e3, tuple(nodes)))
    return runs
