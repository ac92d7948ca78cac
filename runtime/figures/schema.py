"""What a figure holds, and its JSON form. The field names are the keys of the JSON; units are in the names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ultramem.machine import Machine
from ultramem.runtime.figures.devices import Roofs
from ultramem.runtime.versioned_document import check_version, plain

FORMAT_VERSION = 1
KIND = "ultramem-figure"
FIGURES = (1, 6, 7)
EXPLAINED_WITHIN = 1.5
"""A measurement and a prediction that differ by less need no explanation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is computed: one decode step, one new token a sequence."""

    caption: str
    """The paper's, in our words."""
    cached_tokens: tuple[int, ...]
    element_bytes: int
    vocab_size: int
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticPoint:
    """One decode step of one model by arithmetic."""

    family: str
    size: str
    model: str
    batch: int
    cached_tokens: int
    sparse_ratio: float
    """Sparse parameters for one of the dense model of this size."""
    parameters: int
    """Without embedding and head, as the paper counts."""
    flops: int
    weight_bytes: int
    row_bytes: int
    cache_bytes: int
    activation_bytes: int
    total_bytes: int
    sparse_bytes: int
    """Experts or value rows among them."""
    roofline_us: float
    """The sum over stages of the longer of moving and computing."""
    resident_bytes: int
    """All weights and the cache of keys and values."""
    fits: bool | None
    """Whether those fit into the device's memory; None where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A statement of the paper against this arithmetic."""

    paper: str
    quantity: str
    """What `value` is."""
    value: float | None
    """None where there is no such value."""
    low: float
    high: float | None
    """The statement holds here if `value` lies between; None: no upper bound."""
    agrees: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredPoint:
    """One measured call beside what the measured roofs predict, and beside what explains the difference."""

    series: str
    """A family, or what is swept over the table: "lookup", "memory layer", "MoE layer", "decode step"."""
    engine: str
    x: int
    """Batch (Figures 1 and 7) or rows of the table (Figure 6)."""
    batch: int
    table_rows: int
    row_bytes: int
    experts: int
    used: float
    """Different experts or rows that a layer touched, mean over layers and inputs."""
    used_expected: float
    samples: int
    p25_us: float
    p50_us: float
    p75_us: float
    round_p50_low_us: float
    round_p50_high_us: float
    flops: int
    total_bytes: int
    roofline_us: float
    """From the expected use and the measured roofs: what was predicted before anything was timed."""
    ratio: float
    """p50_us / roofline_us."""
    overhead_us: float
    """Time of the same call of a model of tiny widths, or on a table that caches hold, over its own roofline."""
    rows_us: float
    """Time in which embedding_bag reads as many random rows of as large a table."""
    dense_us: float
    """The other stages at the rates that were measured for their sizes: reading so many bytes, products of so few
    rows."""
    waiting_us: float
    """Wall time in which the process did not have the processor; the three before it are without."""
    explained_us: float
    """overhead + rows + dense + waiting."""
    reason: str
    """Why ratio is not within 1.5 of 1, as far as the measurements say; empty where it is."""

    @property
    def busy_us(self) -> float:
        """The median without the time of other processes: what checks compare, and p50_us where nothing else runs."""
        return self.p50_us - self.waiting_us

    @property
    def explained_busy_us(self) -> float:
        """What overhead, random rows and the measured rates of products add up to."""
        return self.explained_us - self.waiting_us


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRate:
    """Reading an array of `array_bytes` again and again."""

    array_bytes: int
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRate:
    """A matrix product of `rows` rows with a matrix that comes from memory."""

    rows: int
    flops_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A statement about the measurements, without the time of other processes, that can fail."""

    name: str
    value: float
    predicted: float | None
    """What the measured roofs (or what the name says) predict for `value`; None where nothing does."""
    low: float | None
    high: float | None
    met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured on the machine that ran this."""

    machine: Machine
    cached_tokens: int
    rounds: int
    seconds_per_cell: float
    load_average: float
    """Of the last minute, before the measurements: other work that ran beside."""
    conditions: str
    """What else was running, in words."""
    read_rates: tuple[ReadRate, ...]
    product_rates: tuple[ProductRate, ...]
    points: tuple[MeasuredPoint, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A whole figure."""

    figure: int
    created: str
    """UTC, ISO 8601."""
    setting: Setting
    device: Roofs
    arithmetic: tuple[ArithmeticPoint, ...]
    claims: tuple[Claim, ...]
    measured: Measured | None
    """None where the device is not the machine that ran this."""


def to_json(figure: Figure) -> dict[str, Any]:
    """A JSON-ready document with its format version."""
    document: dict[str, Any] = plain({"kind": KIND, "format_version": FORMAT_VERSION, **dataclasses.asdict(figure)})
    return document


def check_document(document: Any) -> dict[str, Any]:
    """The document of a figure's file, its kind and version checked.

    Raises:
        ValueError: it is something else, or of a format that this version does not read.
    """
    return check_version(document, kind=KIND, format_version=FORMAT_VERSION, name="figure")
