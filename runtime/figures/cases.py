"""One measured call each with what explains its time: the same call of a tiny twin, and as many random rows.

The three take turns in the same rounds. Of each, the time in which this process had the processor is kept beside the
wall time, so that what other processes took is a part of the explanation and not of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ultramem.runtime.figures.devices import Roofs
from ultramem.runtime.figures.expected import roofline_us
from ultramem.runtime.figures.rates import expert_product_rate, product_rate, read_rate
from ultramem.runtime.figures.schema import EXPLAINED_WITHIN, MeasuredPoint, ProductRate, ReadRate
from ultramem.runtime.figures.watched import Watched
from ultramem.runtime.profile.arithmetic import StageCost
from ultramem.runtime.profile.measure import Cell, measure_cells, percentile
from ultramem.runtime.profile.schema import DECODE
from ultramem.runtime.profile.units import bytes_text, number_text, time_text

ROUNDS = 5
SECONDS_PER_CELL = 2.0
MAX_SAMPLES = 100
WORTH_NAMING = 0.1
"""Share of the difference below which a part of it is not named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A call to time, its arithmetic, and what its time is compared with."""

    series: str
    engine: str
    x: int
    batch: int
    costs: tuple[StageCost, ...]
    """By the expected use of experts and rows."""
    used_costs: tuple[StageCost, ...]
    """By the use that was seen."""
    call: Callable[[], object]
    table_rows: int = 0
    row_bytes: int = 0
    experts: int = 0
    used: float = 0.0
    used_expected: float = 0.0
    experts_per_token: int = 0
    twin: Callable[[], object] | None = None
    """The same call with next to nothing to do: of a model of tiny widths, or on a table that caches hold."""
    twin_is: str = "on a model of tiny widths"
    twin_costs: tuple[StageCost, ...] = ()
    rows: Callable[[], object] | None = None
    """As many random rows of as large a table."""
    rows_repeats: int = 1
    """How many such reads a call makes: memory layers."""


@dataclass(slots=True)
class Timed:
    """A cell of the profile's, and what it calls."""

    cell: Cell
    watched: Watched

    @property
    def busy_us(self) -> float:
        """Median time with the processor; threads beside each other count once."""
        return min(percentile(self.cell.samples_us, 0.5), percentile(self.watched.cpu_us, 0.5))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What was measured of the machine."""

    roofs: Roofs
    reads: tuple[ReadRate, ...]
    products: tuple[ProductRate, ...]


def measure_cases(
    cases: Sequence[Case],
    rates: Rates,
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    seconds_per_cell: float = SECONDS_PER_CELL,
) -> list[MeasuredPoint]:
    """Time all of them in turn (A B A B)."""

    def timed(case: Case, call: Callable[[], object]) -> Timed:
        watched = Watched(call)
        return Timed(Cell(case.engine, case.batch, DECODE, watched), watched)

    own = [timed(case, case.call) for case in cases]
    twins = [None if case.twin is None else timed(case, case.twin) for case in cases]
    rows = [None if case.rows is None else timed(case, case.rows) for case in cases]
    trios = list(zip(own, twins, rows, strict=True))
    measure_cells(
        [each.cell for trio in trios for each in trio if each is not None],
        rounds=rounds,
        seconds_per_cell=seconds_per_cell,
        max_samples=MAX_SAMPLES,
        device=device,
    )
    return [summarize(case, *trio, rates) for case, trio in zip(cases, trios, strict=True)]


def summarize(case: Case, own: Timed, twin: Timed | None, rows: Timed | None, rates: Rates) -> MeasuredPoint:
    """The record of a case from the samples of its call, of its twin's and of its random rows'."""
    samples = own.cell.samples_us
    medians = [percentile(samples_us, 0.5) for samples_us in own.cell.round_us]
    p50_us = percentile(samples, 0.5)
    predicted_us = roofline_us(case.costs, rates.roofs)
    overhead_us = 0.0
    if twin is not None:
        overhead_us = max(0.0, twin.busy_us - roofline_us(case.twin_costs, rates.roofs))
    parts = Parts(
        overhead_us=overhead_us,
        rows_us=0.0 if rows is None else case.rows_repeats * rows.busy_us,
        dense_us=_dense_us(case, rates),
        waiting_us=p50_us - own.busy_us,
    )
    return MeasuredPoint(
        series=case.series,
        engine=case.engine,
        x=case.x,
        batch=case.batch,
        table_rows=case.table_rows,
        row_bytes=case.row_bytes,
        experts=case.experts,
        used=case.used,
        used_expected=case.used_expected,
        samples=len(samples),
        p25_us=percentile(samples, 0.25),
        p50_us=p50_us,
        p75_us=percentile(samples, 0.75),
        round_p50_low_us=min(medians),
        round_p50_high_us=max(medians),
        flops=sum(cost.flops for cost in case.costs),
        total_bytes=sum(cost.total_bytes for cost in case.costs),
        roofline_us=predicted_us,
        ratio=p50_us / predicted_us,
        **parts._asdict(),
        explained_us=sum(parts),
        reason=_reason(case, rates, p50_us, predicted_us, parts),
    )


class Parts(NamedTuple):
    """What explains a time, each part measured by itself."""

    overhead_us: float
    rows_us: float
    dense_us: float
    waiting_us: float


def value_row_bytes(case: Case) -> int:
    """Bytes of value rows that the case was seen to read."""
    return sum(cost.row_bytes for cost in case.used_costs if cost.stage == "lookup")


def _step_bytes(case: Case) -> int:
    return sum(cost.total_bytes for cost in case.used_costs)


def _dense_us(case: Case, rates: Rates) -> float:
    """All but value rows, at the rate of reading as many bytes as a step does and of products of so few rows."""
    bytes_per_second = read_rate(rates.reads, _step_bytes(case))
    seconds = 0.0
    for cost in case.used_costs:
        moved = cost.total_bytes - (cost.row_bytes if cost.stage == "lookup" else 0)
        rate = product_rate(rates.products, case.batch)
        if cost.stage == "mlp" and case.experts:
            rate = expert_product_rate(rates.products, case.batch, case.experts_per_token / case.experts)
        seconds += max(moved / bytes_per_second, cost.flops / rate)
    return 1e6 * seconds


def _reason(case: Case, rates: Rates, p50_us: float, predicted_us: float, parts: Parts) -> str:
    """Why the time is not within 1.5 times the prediction, in the parts that were measured."""
    ratio = p50_us / predicted_us
    if 1 / EXPLAINED_WITHIN <= ratio <= EXPLAINED_WITHIN:
        return ""
    rows_roof_us = 1e6 * value_row_bytes(case) / rates.roofs.bytes_per_second
    dense_roof_us = roofline_us(case.used_costs, rates.roofs) - rows_roof_us
    texts = (
        (parts.waiting_us, f"other processes had the processor for {time_text(parts.waiting_us)}"),
        (parts.overhead_us, f"the same call takes {time_text(parts.overhead_us)} {case.twin_is}"),
        (
            parts.rows_us - rows_roof_us,
            f"rows at random places take {time_text(parts.rows_us)}, as embedding_bag reads them, where as many bytes "
            f"in a row would take {time_text(rows_roof_us)}",
        ),
        (
            parts.dense_us - dense_roof_us,
            f"the rest takes {time_text(parts.dense_us)} instead of {time_text(dense_roof_us)} at the rates measured "
            f"for reading {bytes_text(_step_bytes(case))} and products of {number_text(_product_rows(case), 2)} rows",
        ),
    )
    difference_us = p50_us - predicted_us
    named = [text for part_us, text in texts if part_us / difference_us >= WORTH_NAMING]
    explained_us = sum(parts)
    off = p50_us / explained_us
    total = f"together {time_text(explained_us)} of {time_text(p50_us)}"
    if not named:
        return f"not explained: waiting, overhead, random rows and the rest come to {time_text(explained_us)}"
    text = "; ".join([*named, total])
    if 1 / EXPLAINED_WITHIN <= off <= EXPLAINED_WITHIN:
        return text
    return f"not explained in full: {text}"


def _product_rows(case: Case) -> float:
    """Of an expert that is used, in the mean, where there are experts."""
    return case.batch * case.experts_per_token / case.used if case.experts else float(case.batch)
