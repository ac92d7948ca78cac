"""A plan: what each placement sends, takes and lasts, the one that is chosen, and what to think of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ultramem.config import ModelConfig
from ultramem.runtime.plan.choose_for_model import choose_for_model
from ultramem.runtime.plan.exchange import Collective, Volume
from ultramem.runtime.plan.exchange_memory import distinct_rows
from ultramem.runtime.plan.measured_rows import MeasuredRows
from ultramem.runtime.plan.memory import (
    MemoryPart,
    num_tables,
    rank_memory,
    require_memory,
    total_bytes,
)
from ultramem.runtime.plan.options import PlanOptions
from ultramem.runtime.plan.placement import Candidate, Choice
from ultramem.runtime.plan.plan_devices import PlanDevice
from ultramem.runtime.plan.step_time import StepTime, step_time

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementPlan:
    """One placement of the tables."""

    volume: Volume
    """Of one lookup; where every rank has the tables, what adds up a step's gradient of one."""
    copies: tuple[Collective, ...]
    """What adds up a step's gradient of one cut table over its copies."""
    refused: str | None
    """Why it cannot be; None if it can."""
    step_bytes: int
    """That a rank sends in a step for all tables."""
    memory: tuple[MemoryPart, ...]
    time: StepTime

    @property
    def memory_bytes(self) -> int:
        return total_bytes(self.memory)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A model on many ranks."""

    name: str
    config: ModelConfig
    options: PlanOptions
    device: PlanDevice
    distinct_rows: int | None
    """That a rank's lookup asks for; None without deduplication."""
    choice: Choice
    """By bytes, among the placements that `options.placement` leaves."""
    placements: tuple[PlacementPlan, ...]
    chosen: PlacementPlan
    advice: tuple[str, ...]
    measured: MeasuredRows | None = None
    """Where `distinct_rows` was counted; None where it was given or is by chance."""


def make_plan(
    name: str,
    config: ModelConfig,
    options: PlanOptions,
    device: PlanDevice,
    measured: MeasuredRows | None = None,
) -> Plan:
    """Plan the training of `config` on `options.ranks` devices.

    Args:
        name: of the model.
        config: its sizes.
        options: how it is trained.
        device: on what.
        measured: where `options.distinct_rows` was counted, if it was.

    Raises:
        ValueError: the model has no table, a number does not fit it, or the placement asked for cannot be.
    """
    from ultramem.runtime.plan.advice import advice_on

    choice = choose_for_model(config, options, wire=options.wire, memory_bytes=int(device.memory_bytes))
    placements = tuple(_placement_plan(config, options, device, candidate) for candidate in choice.candidates)
    plan = Plan(
        name=name,
        config=config,
        options=options,
        device=device,
        distinct_rows=distinct_rows(require_memory(config), options),
        choice=choice,
        placements=placements,
        chosen=_chosen(options, placements, choice),
        advice=(),
        measured=measured,
    )
    return dataclasses.replace(plan, advice=advice_on(plan))


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as a JSON-ready document."""
    return {
        "plan": FORMAT_VERSION,
        "model": plan.name,
        "table_rows": require_memory(plan.config).table_rows,
        "tables": num_tables(plan.config),
        "memory_layers": len(plan.config.parsed_insertions),
        "options": dataclasses.asdict(plan.options),
        "device": dataclasses.asdict(plan.device),
        "distinct_rows": plan.distinct_rows,
        "measured": None if plan.measured is None else plan.measured.to_json(),
        "placement": plan.chosen.volume.placement,
        "pooling": plan.chosen.volume.pooling,
        "reasons": list(plan.choice.reasons),
        "advice": list(plan.advice),
        "placements": [_to_json(each, plan.device) for each in plan.placements],
    }


def _to_json(placement: PlacementPlan, device: PlanDevice) -> dict[str, Any]:
    return {
        "placement": placement.volume.placement,
        "pooling": placement.volume.pooling,
        "refused": placement.refused,
        "collectives": [each._asdict() | {"travels": each.travels} for each in placement.volume.collectives],
        "copies": [each._asdict() for each in placement.copies],
        "lookup_forward_bytes": placement.volume.forward_bytes,
        "lookup_backward_bytes": placement.volume.backward_bytes,
        "step_bytes": placement.step_bytes,
        "memory_bytes": {part.name: part.bytes for part in placement.memory},
        "total_memory_bytes": placement.memory_bytes,
        "fits": placement.memory_bytes <= device.memory_bytes,
        "step_us": placement.time._asdict() | {"total_us": placement.time.total_us},
    }


def _placement_plan(
    config: ModelConfig, options: PlanOptions, device: PlanDevice, candidate: Candidate
) -> PlacementPlan:
    volume, copies = candidate.volume, candidate.copies
    lookups = options.accumulate * len(config.parsed_insertions)
    if volume.placement == "replicate":
        lookups, copies = 0, volume.collectives
    sent = lookups * volume.total_bytes
    return PlacementPlan(
        volume=volume,
        copies=candidate.copies,
        refused=candidate.refused,
        step_bytes=sent + num_tables(config) * sum(each.sent_bytes for each in copies),
        memory=rank_memory(config, options, volume.placement, volume.pooling),
        time=step_time(config, options, device, volume, copies),
    )


def _chosen(options: PlanOptions, placements: tuple[PlacementPlan, ...], choice: Choice) -> PlacementPlan:
    """What was asked for, pooled where that sends least; with "auto", what the bytes say."""
    if options.placement == "auto":
        return next(each for each in placements if each.volume == choice.volume)
    asked = [each for each in placements if each.volume.placement == options.placement]
    # A replica that does not fit is still a plan, with its memory in the table; a cut that does not divide is none.
    if options.placement != "replicate" and all(each.refused for each in asked):
        raise ValueError(f"placement must not be {options.placement!r} here. {asked[0].refused}")
    return min(asked, key=lambda each: each.step_bytes)
