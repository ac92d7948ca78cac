"""Figures 1 and 7 measured: a decode step against the batch, of every family at a size that this machine holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ultramem.config import ModelConfig
from ultramem.graph import Transformer, UltraMemLayer, build_model
from ultramem.runtime.engine import Engine, open_engine
from ultramem.runtime.figures.agreement import require_logits
from ultramem.runtime.figures.cases import SECONDS_PER_CELL, Case, Rates, measure_cases
from ultramem.runtime.figures.expected import decode_costs, expected_used
from ultramem.runtime.figures.rates import cycle, random_rows
from ultramem.runtime.figures.schema import Check, MeasuredPoint
from ultramem.runtime.figures.seen_use import used_by
from ultramem.runtime.figures.small_models import CACHED_TOKENS, SMALL, tiny_twin
from ultramem.runtime.profile.measure import Inputs, draw_inputs

MEASURED_BATCHES = {1: (1, 4, 16, 32, 64), 7: (1, 16, 64, 256)}
NEXT_TOKENS = 8
"""Steps with other tokens that a call cycles through."""
ELEMENT_BYTES = 4
"""Everything is measured in float32."""
MOE_BATCHES = (16, 32, 64)
WITHIN = 0.25
ENGINE = "eager"


class _Opened(NamedTuple):
    family: str
    model: Transformer
    engine: Engine
    twin: Engine


def batch_points(
    figure: int,
    rates: Rates,
    device: torch.device,
    *,
    progress: Callable[[str], None] = lambda message: None,
    models: dict[str, ModelConfig] | None = None,
    batches: Sequence[int] | None = None,
    seconds_per_cell: float = SECONDS_PER_CELL,
) -> list[MeasuredPoint]:
    """Time every family at every batch; the families take turns.

    Raises:
        WrongResultError: an engine's logits are not those of the model in float64 within what rounding explains.
    """
    opened = [_open(family, config, device, progress) for family, config in (models or SMALL).items()]
    points = []
    for batch in batches or MEASURED_BATCHES[figure]:
        progress(f"timing decode steps at batch {batch}")
        cases = [_case(each, batch, device) for each in opened]
        points += measure_cases(cases, rates, device, seconds_per_cell=seconds_per_cell)
    return points


def batch_checks(points: Sequence[MeasuredPoint]) -> list[Check]:
    """MoE against UltraMem at batch 16 to 64: the ratio of their times beside what the roofline predicts, and beside
    what overhead, random rows and products of few rows add up to.
    """
    found = {(point.series, point.batch): point for point in points}
    checks = []
    for batch in MOE_BATCHES:
        if ("moe", batch) not in found or ("ultramem", batch) not in found:
            continue
        moe, memory = found["moe", batch], found["ultramem", batch]
        value, predicted = moe.busy_us / memory.busy_us, moe.roofline_us / memory.roofline_us
        name = f"MoE's time over UltraMem's at batch {batch}"
        checks.append(within(name, value, predicted))
        explained = moe.explained_busy_us / memory.explained_busy_us
        checks.append(within(f"{name}, predicted with overhead and measured products", value, explained))
    return checks


def within(name: str, value: float, predicted: float) -> Check:
    """A check that a value is within 25 % of its prediction."""
    low, high = (1 - WITHIN) * predicted, (1 + WITHIN) * predicted
    return Check(name=name, value=value, predicted=predicted, low=low, high=high, met=low <= value <= high)


def _open(family: str, config: ModelConfig, device: torch.device, progress: Callable[[str], None]) -> _Opened:
    progress(f"building {family}")
    model = build_model(config, device=device).eval()
    twin = build_model(tiny_twin(config), device=device).eval()
    engine = open_engine(ENGINE, model, None)
    require_logits(family, model, engine, CACHED_TOKENS)
    return _Opened(family, model, engine, open_engine(ENGINE, twin, None))


def draw_steps(config: ModelConfig, batch: int) -> list[Inputs]:
    """Tokens of the steps, of which the first has the prompt for all."""
    return [
        draw_inputs(config.vocab_size, batch=batch, prompt_tokens=CACHED_TOKENS, seed=seed)
        for seed in range(NEXT_TOKENS)
    ]


def decode_steps(engine: Engine, config: ModelConfig, batch: int) -> Callable[[], object]:
    """A decode step, always after the same cache, with other tokens every time."""
    draws = draw_steps(config, batch)
    _, cache = engine.prefill(draws[0].prompt_BS)
    return cycle([partial(engine.decode, draw.next_B1, cache) for draw in draws])


@torch.no_grad()
def use_in_steps(model: Transformer, batch: int, device: torch.device) -> float:
    """Different experts or rows that a layer touches in such a step."""
    draws = draw_steps(model.config, batch)
    cache = model(draws[0].prompt_BS.to(device)).cache
    return used_by(model, [partial(model, draw.next_B1.to(device), cache=cache) for draw in draws])


def _case(opened: _Opened, batch: int, device: torch.device) -> Case:
    config, memory = opened.model.config, opened.model.config.memory
    twin = tiny_twin(config)
    used = use_in_steps(opened.model, batch, device)
    rows = None
    if memory is not None:
        layer = opened.model.memories[0]
        assert isinstance(layer, UltraMemLayer)
        assert layer.table is not None
        rows = random_rows(layer.table.values_NV.detach(), batch, memory.num_slots, seed=batch)
    return Case(
        series=opened.family,
        engine=ENGINE,
        x=batch,
        batch=batch,
        costs=decode_costs(config, batch=batch, cached_tokens=CACHED_TOKENS, element_bytes=ELEMENT_BYTES),
        used_costs=decode_costs(
            config, batch=batch, cached_tokens=CACHED_TOKENS, element_bytes=ELEMENT_BYTES, used=used or None
        ),
        call=decode_steps(opened.engine, config, batch),
        table_rows=0 if memory is None else memory.num_values,
        row_bytes=0 if memory is None else memory.value_dim * ELEMENT_BYTES,
        experts=0 if config.moe is None else config.moe.num_experts,
        used=used,
        used_expected=expected_used(config, batch),
        experts_per_token=0 if config.moe is None else config.moe.experts_per_token,
        twin=decode_steps(opened.twin, twin, batch),
        twin_costs=decode_costs(twin, batch=batch, cached_tokens=CACHED_TOKENS, element_bytes=ELEMENT_BYTES),
        rows=rows,
        rows_repeats=len(config.parsed_insertions),
    )
