"""What a profile holds, and its JSON form. The field names are the keys of the JSON; units are in the names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ultramem.machine import Machine

FORMAT_VERSION = 1
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How it was measured."""

    batches: tuple[int, ...]
    prompt_tokens: int
    """Tokens of a prefill, and tokens in the cache before each decode step."""
    seconds_per_cell: float
    """Time given to one engine, batch and phase."""
    max_samples: int
    rounds: int
    """The engines take turns (A B A B) this many times."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """An engine, and how far its logits are from eager's."""

    name: str
    prepare_seconds: float
    """Opening, compiling and warming up, before any sample."""
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
    tokens_per_second: float
    """batch * new_tokens / p50."""
    bandwidth_share: float
    """Bytes by arithmetic / p50 / measured bandwidth. Above 1 where caches hold the weights."""
    compute_share: float
    """FLOPs by arithmetic / p50 / measured GEMM rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """Time in one stage, or in kernels that compute several."""

    stages: tuple[str, ...]
    """More than one: kernels that the compiler fused over these stages."""
    time_us: float
    """Per forward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Where the time of one engine, batch and phase goes. The rows and the rest add up to the wall time."""

    engine: str
    batch: int
    phase: str
    method: str
    """How the stages were told apart."""
    wall_us: float
    """Of the instrumented forward, which is slower than `Latency.p50_us`."""
    rows: tuple[StageRow, ...]
    unattributed_us: float
    """In no stage: the framework's own work, and operators outside the stages."""
    coverage: float
    """Share of the wall time that the rows explain."""
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
    latency: tuple[Latency, ...]
    stages: tuple[StageTimes, ...]
    arithmetic: tuple[StageArithmetic, ...]


def to_json(profile: Profile) -> dict[str, Any]:
    """A JSON-ready document with its format version."""
    document: dict[str, Any] = _plain({"kind": KIND, "format_version": FORMAT_VERSION, **dataclasses.asdict(profile)})
    document["machine"]["bytes_per_second"] = profile.machine.bytes_per_second
    return document


def check_document(document: Any) -> dict[str, Any]:
    """The document of a profile.json, its kind and version checked.

    Raises:
        ValueError: it is something else, or of a format that this version does not read.
    """
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind != KIND:
        raise ValueError(f"a profile must have kind {KIND!r}, got {kind!r}")
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"a profile must have format_version {FORMAT_VERSION}, got {document.get('format_version')!r}")
    return dict(document)


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
