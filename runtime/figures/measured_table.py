"""Figure 6(c) measured: the lookup, a memory layer and a model's decode step as the table grows; MoE beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ultramem.config import ModelConfig
from ultramem.graph import Transformer, build_model
from ultramem.presets import BYTE_VOCABULARY
from ultramem.runtime.engine import open_engine
from ultramem.runtime.figures.agreement import require_logits
from ultramem.runtime.figures.cases import SECONDS_PER_CELL, Case, Rates, measure_cases
from ultramem.runtime.figures.expected import decode_costs, expected_used
from ultramem.runtime.figures.grown_table import HIDDEN, ROW_WIDTH, make_buffer, memory_config, with_table
from ultramem.runtime.figures.measured_batch import decode_steps, use_in_steps, within
from ultramem.runtime.figures.measured_layers import ELEMENT_BYTES, memory_cases, moe_case, twin_calls
from ultramem.runtime.figures.measured_lookup import SERIES as LOOKUP_SERIES
from ultramem.runtime.figures.measured_lookup import lookup_case
from ultramem.runtime.figures.rates import random_rows
from ultramem.runtime.figures.schema import Check, MeasuredPoint
from ultramem.runtime.figures.small_models import CACHED_TOKENS, tiny_twin

STEP_SERIES = "decode step"
FLAT_WITHIN = 1.3
FLAT_ROWS = (2**17, 2**22)
"""Both beyond the caches at 256 numbers a row: 134 MB and 4.3 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What is swept; the defaults take a table of 4.3 GB in float32."""

    rows: tuple[int, ...] = tuple(2**power for power in range(14, 25, 2))
    """Of layers and models: squares."""
    lookup_rows: tuple[int, ...] = tuple(2**power for power in range(14, 25))
    wide_rows: tuple[int, ...] = tuple(2**power for power in range(17, 23))
    """Of the lookup of wider rows."""
    wide: int = 256
    lookup_tokens: int = 64
    slots: int = 32
    layer_tokens: tuple[int, ...] = (1, 64)
    engines: tuple[str, ...] = ("eager", "compile")
    """Of the memory layer."""
    step_batches: tuple[int, ...] = (1, 16)


@torch.no_grad()
def table_points(
    rates: Rates,
    device: torch.device,
    *,
    sweep: Sweep | None = None,
    seconds_per_cell: float = SECONDS_PER_CELL,
    progress: Callable[[str], None] = lambda message: None,
) -> list[MeasuredPoint]:
    """Time everything at every size; the sizes take turns.

    Raises:
        WrongResultError: a result is not that of the same computation in float64.
    """
    sweep = sweep or Sweep()
    timed = partial(measure_cases, rates=rates, device=device, seconds_per_cell=seconds_per_cell)
    numbers = max(max(sweep.rows) * ROW_WIDTH, max(sweep.lookup_rows) * ROW_WIDTH, max(sweep.wide_rows) * sweep.wide)
    progress(f"making a table of {numbers * ELEMENT_BYTES / 1e9:.1f} GB")
    buffer = make_buffer(numbers, device)
    progress("timing lookups")
    lookups = [(rows, ROW_WIDTH) for rows in sweep.lookup_rows] + [(rows, sweep.wide) for rows in sweep.wide_rows]
    cases = [lookup_case(buffer, rows, width, tokens=sweep.lookup_tokens, slots=sweep.slots) for rows, width in lookups]
    points = timed(cases)
    for tokens in sweep.layer_tokens:
        progress(f"timing layers at {tokens} tokens")
        twins = twin_calls(min(sweep.rows), tokens, sweep.engines, device)
        cases = []
        for rows in sweep.rows:
            cases += [*memory_cases(buffer, rows, tokens, twins), moe_case(buffer, rows, tokens)]
        points += timed(cases)
    base = build_model(step_model(min(sweep.rows)), device=device).eval()
    grown = [with_table(base, rows, buffer) for rows in sweep.rows]
    require_logits(STEP_SERIES, grown[0], open_engine("eager", grown[0], None), CACHED_TOKENS)
    for batch in sweep.step_batches:
        progress(f"timing decode steps at batch {batch}")
        points += timed([_step_case(model, batch, device) for model in grown])
    return points


def table_checks(points: Sequence[MeasuredPoint], sweep: Sweep | None = None) -> list[Check]:
    """The lookup is flat from 2^17 to 2^22 rows; a decode step grows with the keys as the roofline says."""
    sweep = sweep or Sweep()
    wide = {
        point.x: point
        for point in points
        if (point.series, point.row_bytes) == (LOOKUP_SERIES, sweep.wide * ELEMENT_BYTES)
    }
    checks = []
    if all(rows in wide for rows in FLAT_ROWS):
        first, last = (wide[rows] for rows in FLAT_ROWS)
        value = last.busy_us / first.busy_us
        checks.append(
            Check(
                name=f"lookup's time at {last.x:,} rows over that at {first.x:,}, {last.row_bytes} bytes a row",
                value=value,
                predicted=last.roofline_us / first.roofline_us,
                low=None,
                high=FLAT_WITHIN,
                met=value <= FLAT_WITHIN,
            )
        )
    for batch in sweep.step_batches:
        steps = [point for point in points if (point.series, point.batch) == (STEP_SERIES, batch)]
        steps.sort(key=lambda point: point.x)
        for point in steps[1:]:
            first = steps[0]
            name = f"decode step's time at {point.x:,} rows over that at {first.x:,}, batch {batch}"
            checks.append(within(name, point.busy_us / first.busy_us, point.roofline_us / first.roofline_us))
    return checks


def step_model(rows: int) -> ModelConfig:
    """100 MB of dense weights, and two memory layers over one table: what grows is their keys."""
    return ModelConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=HIDDEN,
        inner_size=2048,
        num_heads=8,
        num_layers=8,
        dropout=0.0,
        memory=memory_config(rows, 8),
        insertions="2:4/5:7",
    )


def _step_case(model: Transformer, batch: int, device: torch.device) -> Case:
    config, memory, table = model.config, model.config.memory, model.table
    assert memory is not None
    assert table is not None
    twin_config = tiny_twin(config)
    twin = build_model(twin_config, device=device).eval()
    used = use_in_steps(model, batch, device)
    costs = partial(decode_costs, batch=batch, cached_tokens=CACHED_TOKENS, element_bytes=ELEMENT_BYTES)
    return Case(
        series=STEP_SERIES,
        engine="eager",
        x=memory.num_values,
        batch=batch,
        costs=costs(config),
        used_costs=costs(config, used=used),
        call=decode_steps(open_engine("eager", model, None), config, batch),
        table_rows=memory.num_values,
        row_bytes=memory.value_dim * ELEMENT_BYTES,
        used=used,
        used_expected=expected_used(config, batch),
        twin=decode_steps(open_engine("eager", twin, None), twin_config, batch),
        twin_costs=costs(twin_config),
        rows=random_rows(table.values_NV.detach(), batch, memory.num_slots, seed=memory.num_values),
        rows_repeats=len(config.parsed_insertions),
    )
