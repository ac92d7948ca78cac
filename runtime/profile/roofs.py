"""What the machine's roofs say of a forward and of its stages: arithmetic, and shares of bandwidth and GEMM rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ultramem.graph import Transformer
from ultramem.graph.sharded_table import shard_of
from ultramem.machine import Machine
from ultramem.runtime.profile.arithmetic import stage_costs
from ultramem.runtime.profile.measure import Cell, percentile
from ultramem.runtime.profile.modules import stage_of_module
from ultramem.runtime.profile.schema import (
    DECODE,
    PREFILL,
    Latency,
    ModuleRow,
    NodeRow,
    Settings,
    StageArithmetic,
    StageRow,
    StageTimes,
)

Row = TypeVar("Row", StageRow, ModuleRow, NodeRow)


def stage_arithmetic(model: Transformer, machine: Machine, settings: Settings) -> tuple[StageArithmetic, ...]:
    """Bytes, FLOPs and the shortest possible time of every stage, batch and phase."""
    found = []
    shard = shard_of(model)
    ranks, placement = (1, None) if shard is None else (shard.ranks, shard.placement)
    for batch in settings.batches:
        for phase in (PREFILL, DECODE):
            new, cached = (settings.prompt_tokens, 0) if phase == PREFILL else (1, settings.prompt_tokens)
            size = model.embedding.weight.element_size()
            for cost in stage_costs(
                model.config,
                batch=batch,
                new_tokens=new,
                cached_tokens=cached,
                element_bytes=size,
                ranks=ranks,
                placement=placement,
            ):
                memory_s = cost.total_bytes / machine.bytes_per_second
                compute_s = cost.flops / machine.gemm_flops_per_second
                found.append(
                    StageArithmetic(
                        batch=batch,
                        phase=phase,
                        total_bytes=cost.total_bytes,
                        roofline_us=1e6 * max(memory_s, compute_s),
                        **cost._asdict(),
                    )
                )
    return tuple(found)


def latency_of(
    cell: Cell,
    arithmetic: Sequence[StageArithmetic],
    machine: Machine,
    settings: Settings,
    *,
    max_abs_difference: float,
) -> Latency:
    """Percentiles of a cell, its shares of the measured roofs, and the engine's parity error."""
    samples = cell.samples_us
    p50_us = percentile(samples, 0.5)
    rounds = {share: tuple(percentile(round_us, share) for round_us in cell.round_us) for share in (0.5, 0.9, 0.99)}
    costs = _costs(cell.batch, cell.phase, arithmetic).values()
    new, cached = (settings.prompt_tokens, 0) if cell.phase == PREFILL else (1, settings.prompt_tokens)
    return Latency(
        engine=cell.engine,
        batch=cell.batch,
        phase=cell.phase,
        new_tokens=new,
        cached_tokens=cached,
        samples=len(samples),
        p50_us=p50_us,
        p90_us=percentile(samples, 0.9),
        p99_us=percentile(samples, 0.99),
        min_us=min(samples),
        round_p50_low_us=min(rounds[0.5]),
        round_p50_high_us=max(rounds[0.5]),
        round_p50_us=rounds[0.5],
        round_p90_us=rounds[0.9],
        round_p99_us=rounds[0.99],
        tokens_per_second=cell.batch * new / p50_us * 1e6,
        bandwidth_share=sum(cost.total_bytes for cost in costs) / p50_us * 1e6 / machine.bytes_per_second,
        compute_share=sum(cost.flops for cost in costs) / p50_us * 1e6 / machine.gemm_flops_per_second,
        max_abs_difference=max_abs_difference,
    )


def with_roofs(
    times: StageTimes,
    arithmetic: Sequence[StageArithmetic],
    machine: Machine,
    *,
    modules_of_stages: Mapping[str, int],
    max_abs_difference: float,
) -> StageTimes:
    """`times` with bytes and FLOPs of stages and modules, shares of the roofs, and the engine's parity error."""
    costs = _costs(times.batch, times.phase, arithmetic)
    rows = tuple(_row_with_roofs(row, costs, machine) for row in times.rows)
    modules = tuple(_module_with_roofs(row, costs, machine, modules_of_stages) for row in times.modules)
    nodes = tuple(_node_with_roofs(row, machine) for row in times.nodes)
    return dataclasses.replace(times, rows=rows, modules=modules, nodes=nodes, max_abs_difference=max_abs_difference)


def _node_with_roofs(row: NodeRow, machine: Machine) -> NodeRow:
    return row if row.flops is None or row.bytes is None else _with_rates(row, row.flops, row.bytes, machine)


def _module_with_roofs(
    row: ModuleRow, costs: Mapping[str, StageArithmetic], machine: Machine, modules_of_stages: Mapping[str, int]
) -> ModuleRow:
    # What is outside of the modules whose work is counted, or is fused over parts of several, has no arithmetic.
    stages = [stage_of_module(module) for module in row.modules]
    if (not row.is_whole and len(row.modules) > 1) or any(stage not in modules_of_stages for stage in stages):
        return row
    flops = sum(costs[stage].flops // modules_of_stages[stage] for stage in stages)
    size = sum(costs[stage].total_bytes // modules_of_stages[stage] for stage in stages)
    return _with_rates(row, flops, size, machine)


def _row_with_roofs(row: StageRow, costs: Mapping[str, StageArithmetic], machine: Machine) -> StageRow:
    # What is fused over parts of stages computes some share of their FLOPs that arithmetic does not know.
    if not row.is_whole and len(row.stages) > 1:
        return row
    flops = sum(costs[stage].flops for stage in row.stages)
    size = sum(costs[stage].total_bytes for stage in row.stages)
    return _with_rates(row, flops, size, machine)


def _with_rates(row: Row, flops: int, size: int, machine: Machine) -> Row:
    seconds = row.time_us / 1e6
    return dataclasses.replace(
        row,
        flops=flops,
        bytes=size,
        flops_per_byte=flops / size if size else None,
        bandwidth_share=size / seconds / machine.bytes_per_second if seconds else None,
        compute_share=flops / seconds / machine.gemm_flops_per_second if seconds else None,
    )


def _costs(batch: int, phase: str, arithmetic: Sequence[StageArithmetic]) -> dict[str, StageArithmetic]:
    return {cost.stage: cost for cost in arithmetic if (cost.batch, cost.phase) == (batch, phase)}
