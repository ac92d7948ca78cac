"""What a profile holds, and its JSON form. The field names are the keys of the JSON; units are in the names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ultramem.machine import Machine
from ultramem.runtime.profile.request_schema import Request, RowUse
from ultramem.runtime.versioned_document import check_version, plain

FORMAT_VERSION = 5
KIND = "ultramem-profile"

PREFILL = "prefill"
DECODE = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfiledModel:
    """The model that was measured."""

    name: str
    parameters: int
    """All of them, embedding and head included."""
    flops_per_token: int
    """By the paper's convention: 2 x active parameters, without embedding and head."""
    weight_bytes: int
    dtype: str
    config: dict[str, Any]
    ranks: int = 1
    """That have a part of the tables each and were measured together: times are the main rank's."""
    table_placement: str = "whole"
    """"rows" or "columns", where there are several ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How it was measured."""

    batches: tuple[int, ...]
    prompt_tokens: int
    """Tokens of a prefill, and tokens in the cache before each decode step."""
    new_tokens: int
    """Tokens that a request generates, its first one included."""
    seconds_per_cell: float
    """Time given to one engine, batch and phase, and to the requests of one engine and batch."""
    max_samples: int
    rounds: int
    """The engines take turns (A B A B) this many times."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """An engine: what it takes before the first token, and how far its logits are from eager's."""

    name: str
    prepare_seconds: float
    """All that comes before any sample; the sum of the three that follow."""
    export_seconds: float
    """Writing the export; 0 where it was there, or the engine needs none."""
    open_seconds: float
    """Loading the export, or wrapping the model; 0 for an engine that was passed open."""
    warm_up_seconds: float
    """The first prefill and decode step at every batch: what compiles at the first call compiles here."""
    graphs: int
    """Graphs that torch.compile made meanwhile."""
    graph_breaks: int
    cached_graphs: int
    """Graphs that came compiled from torch.compile's cache on disk: the warm-up lacks the time of compiling them."""
    memory_bytes: int | None
    """Highest resident memory while preparing, less the resident memory before; None where it is not known."""
    memory_method: str
    max_abs_difference: float
    """Largest difference of a logit from eager's, over prefill and decode at every batch."""
    tolerance: float
    """4 x the largest difference of eager from its own float64 run, for the same inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Wall-clock time of one engine, batch and phase, and its distance from the roofs."""

    engine: str
    batch: int
    phase: str
    """"prefill" or "decode"."""
    new_tokens: int
    """Of each sequence."""
    cached_tokens: int
    samples: int
    p50_us: float
    p90_us: float
    p99_us: float
    min_us: float
    round_p50_low_us: float
    """Lowest median of a round."""
    round_p50_high_us: float
    """Highest median of a round: with the lowest, how far the machine drifted while measuring."""
    round_p50_us: tuple[float, ...]
    """Median of each round."""
    round_p90_us: tuple[float, ...]
    round_p99_us: tuple[float, ...]
    tokens_per_second: float
    """batch * new_tokens / p50."""
    bandwidth_share: float
    """Bytes by arithmetic / p50 / measured bandwidth. Above 1 where caches hold the weights."""
    compute_share: float
    """FLOPs by arithmetic / p50 / measured GEMM rate."""
    max_abs_difference: float
    """Parity error of the engine, as in its `EngineRecord`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """Time in one stage, or in kernels that compute several."""

    stages: tuple[str, ...]
    """More than one: kernels that the compiler fused over these stages."""
    time_us: float
    """Per forward, mean of the faster half of the runs: the rows and the rest add up."""
    p50_us: float
    """Of all runs, as p90 and p99."""
    p90_us: float
    p99_us: float
    calls: int
    """Sum of its nodes' calls."""
    is_whole: bool
    """False: other rows hold a part of these stages too, so that the time is less than the stages take."""
    flops: int | None
    """By arithmetic; None for kernels that compute parts of several stages."""
    bytes: int | None
    flops_per_byte: float | None
    """Arithmetic intensity."""
    bandwidth_share: float | None
    """Bytes / time / measured bandwidth; where the row is not whole, an upper bound."""
    compute_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleRow:
    """Time in one module, or in nodes that compute for several: what rows of different engines have in common."""

    modules: tuple[str, ...]
    """As in `NodeRow`."""
    stages: tuple[str, ...]
    time_us: float
    """Per forward, mean of the faster half of the runs."""
    p50_us: float
    """Of all runs, as p90 and p99."""
    p90_us: float
    p99_us: float
    calls: int
    """Sum of its nodes' calls."""
    is_whole: bool
    """False: other rows hold a part of these modules too."""
    flops: int | None
    """By arithmetic, as of a stage: None for parts of several modules, and for modules whose work is not counted."""
    bytes: int | None
    flops_per_byte: float | None
    bandwidth_share: float | None
    """Bytes / time / measured bandwidth; where the row is not whole, an upper bound."""
    compute_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRow:
    """Time in one node of the graph that really ran: an operator, or a generated kernel."""

    node: str
    """The engine's own name of it, unique in the graph."""
    kind: str
    """Operator or kernel, or "module" for a module's time outside its operators."""
    modules: tuple[str, ...]
    """Paths of the modules that it computes for, which rows of all engines have in common; "model" stands for what
    lies between them. Empty where the engine does not say."""
    fx_nodes: tuple[str, ...]
    """Nodes of the captured graph that went into a generated kernel."""
    stages: tuple[str, ...]
    calls: int
    """Per forward; on a GPU, the kernels, copies and memsets that it ran on the device."""
    time_us: float
    """Per forward, mean of the faster half of the runs."""
    p50_us: float
    """Of all runs, as p90 and p99."""
    p90_us: float
    p99_us: float
    fastest_start_us: float
    """Where it began in the fastest run, from the start of the forward."""
    fastest_span_us: float
    """How long it took there, with what it called."""
    flops: int | None
    """By the shapes of its operands (`ultramem.runtime.profile.operator_work`), as the bytes; None where the engine
    does not tell them, and for a module's time outside its operators."""
    bytes: int | None
    flops_per_byte: float | None
    """None too where it moves nothing."""
    bandwidth_share: float | None
    """Bytes / time / measured bandwidth: above 1 where caches hold its operands."""
    compute_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Where the time of one engine, batch and phase goes. The rows and the rest add up to `sum_us`."""

    engine: str
    batch: int
    phase: str
    method: str
    """How the stages were told apart."""
    runs: int
    """Instrumented forwards."""
    plain_us: float
    """Wall time without instruments, of forwards that take turns with the instrumented ones: mean of the faster half,
    as all times here."""
    instrumented_us: float
    """Wall time with instruments."""
    instrument_us: float
    """What the instruments took of it, by a measurement of their own."""
    sum_us: float
    """instrumented_us - instrument_us: what the rows and the rest add up to."""
    sum_ratio: float
    """sum_us / plain_us: 1 if what was taken off is what the instruments really cost."""
    turn_sum_ratios: tuple[float, ...]
    """The same of each turn of plain and instrumented forwards; none where there are no rows."""
    fastest_us: float
    """Of the instrumented forward whose sum is the smallest: its wall time, instruments included, as nodes began."""
    max_abs_difference: float
    """Parity error of the engine, as in its `EngineRecord`."""
    rows: tuple[StageRow, ...]
    modules: tuple[ModuleRow, ...]
    nodes: tuple[NodeRow, ...]
    launches: int
    """Kernels or operators that the forward launched, those outside the stages included. On a GPU, all kernels, copies
    and memsets that the device ran: those of a replayed graph one by one, which the host launches together."""
    unattributed_us: float
    """In no stage: the framework's own work between kernels and operators; on a GPU, while the device ran nothing."""
    coverage: float
    """Share of the sum that the rows explain."""
    note: str
    """Why there are no rows, if there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageArithmetic:
    """Bytes and FLOPs of one stage in one forward (`ultramem.runtime.profile.arithmetic`)."""

    batch: int
    phase: str
    stage: str
    flops: int
    weight_bytes: int
    row_bytes: int
    cache_bytes: int
    activation_bytes: int
    total_bytes: int
    roofline_us: float
    """The longer of total_bytes / bandwidth and flops / GEMM rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A whole profile."""

    created: str
    """UTC, ISO 8601."""
    model: ProfiledModel
    machine: Machine
    settings: Settings
    engines: tuple[EngineRecord, ...]
    requests: tuple[Request, ...]
    latency: tuple[Latency, ...]
    stages: tuple[StageTimes, ...]
    arithmetic: tuple[StageArithmetic, ...]
    row_use: tuple[RowUse, ...]
    """None of a model without a memory."""


def to_json(profile: Profile) -> dict[str, Any]:
    """A JSON-ready document with its format version."""
    document: dict[str, Any] = plain({"kind": KIND, "format_version": FORMAT_VERSION, **dataclasses.asdict(profile)})
    document["machine"]["bytes_per_second"] = profile.machine.bytes_per_second
    return document


def check_document(document: Any) -> dict[str, Any]:
    """The document of a profile.json, its kind and version checked.

    Raises:
        ValueError: it is something else, or of a format that this version does not read.
    """
    return check_version(document, kind=KIND, format_version=FORMAT_VERSION, name="profile")
