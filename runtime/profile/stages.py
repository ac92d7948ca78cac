"""Time by stage: which module is which stage, what the ways of measuring share, and eager's own way."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ultramem.machine import synchronize
from ultramem.runtime.profile.arithmetic import STAGES
from ultramem.runtime.profile.measure import Cell, percentile
from ultramem.runtime.profile.schema import StageRow, StageTimes

# A table is a layer's own or the model's, and its time is part of the lookup that calls it.
_TABLE = re.compile(r"(?:^|\.)table(?=\.|$)")
# Where the stages are in the model: the module's path, behind any prefix that a wrapper adds.
_PATHS = (
    (re.compile(r"(?:^|\.)memories\.\d+\.(query|score|select|lookup|expand)(?=\.|$)"), None),
    (_TABLE, "lookup"),
    (re.compile(r"(?:^|\.)blocks\.\d+\.(attention|mlp)(?=\.|$)"), None),
    (re.compile(r"(?:^|\.)head(?=\.|$)"), "head"),
    (re.compile(r"(?:^|\.)(?:blocks\.\d+\.(?:attention_norm|mlp_norm)|norm|embedding)(?=\.|$)"), "other"),
)


class Run(NamedTuple):
    """One instrumented forward: its wall time, and the time of each set of stages."""

    wall_us: float
    stage_us: dict[tuple[str, ...], float]


def stage_of_path(path: str) -> str | None:
    """The stage that the module at `path` belongs to; None if it belongs to none."""
    for pattern, stage in _PATHS:
        match = pattern.search(path)
        if match:
            return stage or match.group(1)
    return None


def in_order(stages: Iterable[str]) -> tuple[str, ...]:
    """Each stage once, in the order in which the model runs them."""
    return tuple(sorted(set(stages), key=STAGES.index))


def summarize(cell: Cell, method: str, runs: Sequence[Run]) -> StageTimes:
    """Mean of the faster half of the runs, the least disturbed ones: rows and rest add up to the wall time."""
    kept = sorted(runs, key=lambda run: run.wall_us)[: (len(runs) + 1) // 2]
    wall_us = sum(run.wall_us for run in kept) / len(kept)
    total_us: dict[tuple[str, ...], float] = defaultdict(float)
    for run in kept:
        for stages, stage_us in run.stage_us.items():
            total_us[stages] += stage_us / len(kept)
    order = sorted(total_us, key=lambda stages: (len(stages) > 1, [STAGES.index(stage) for stage in stages]))
    explained_us = sum(total_us.values())
    return StageTimes(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        method=method,
        wall_us=wall_us,
        rows=tuple(StageRow(stages=stages, time_us=total_us[stages]) for stages in order),
        unattributed_us=wall_us - explained_us,
        coverage=explained_us / wall_us,
        note="",
    )


def not_separable(cell: Cell, note: str) -> StageTimes:
    """The whole, and why it cannot be divided."""
    wall_us = percentile(cell.samples_us, 0.5)
    return StageTimes(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        method="not separable",
        wall_us=wall_us,
        rows=(),
        unattributed_us=wall_us,
        coverage=0.0,
        note=note,
    )


def eager_stages(model: nn.Module, cell: Cell, *, repeats: int, device: torch.device) -> StageTimes:
    """Hooks around the modules that are stages."""
    started: list[float] = []
    stage_us: dict[tuple[str, ...], float] = defaultdict(float)

    def before(module: nn.Module, args: Any) -> None:
        synchronize(device)
        started.append(time.perf_counter_ns())

    def after_stage(stage: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            synchronize(device)
            stage_us[(stage,)] += (time.perf_counter_ns() - started.pop()) / 1e3

        return after

    handles = []
    for path, module in model.named_modules():
        stage = stage_of_path(path)
        # The outermost module of a stage holds its children's time, and a lookup that of its table.
        if stage is not None and stage_of_path(path.rpartition(".")[0]) is None and not _TABLE.search(path):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after_stage(stage))]
    runs = []
    try:
        for _ in range(repeats):
            stage_us.clear()
            start = time.perf_counter_ns()
            cell.call()
            synchronize(device)
            runs.append(Run((time.perf_counter_ns() - start) / 1e3, dict(stage_us)))
    finally:
        for handle in handles:
            handle.remove()
    return summarize(cell, "timers around the modules", runs)
