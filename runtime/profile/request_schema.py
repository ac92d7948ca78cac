"""What a profile says of whole requests, and of the table rows that a forward reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and the tokens generated after it, greedily, by one engine at one batch; the cache grows meanwhile."""

    engine: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    requests: int
    """How many were timed."""
    ttft_us: float
    """Median time to the first token: the prefill, and the pick of a token."""
    ttft_p90_us: float
    tpot_us: float
    """Median over the requests of the time per output token after the first."""
    tokens_per_second: float
    """batch * new_tokens / median time of a request."""
    gap_p50_us: float
    """Between one token and the next, over all of the requests' gaps, as p90 and p99."""
    gap_p90_us: float
    gap_p99_us: float
    gaps: int
    round_ttft_us: tuple[float, ...]
    """Median of each round."""
    round_tpot_us: tuple[float, ...]
    launches_per_step: int | None
    """Per decode step: generated kernels of a compiled engine, nodes of ONNX Runtime, outermost operators of eager; all
    that the device ran, on a GPU. None where they cannot be counted."""
    recompiles: int
    """Graphs that torch.compile made during the requests, when all should have been compiled."""
    memory_bytes: int | None
    """Highest resident memory during a request, less the resident memory before it; None where it is not known."""
    memory_method: str
    minor_faults: int
    """Pages that a request mapped without reading from the disk."""
    major_faults: int
    """Pages that it read from the disk: of a mapped table that is not in memory."""
    max_abs_difference: float
    """Parity error of the engine, as in its `EngineRecord`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowUse:
    """Rows that one forward reads from one value table, by the model's own lookups on the tokens of the profile."""

    batch: int
    phase: str
    table: str
    """Path of its module."""
    reads: int
    """Slots of all tokens and layers."""
    rows_touched: int
    """Different rows among them."""
    table_rows: int
    row_bytes: int
    """Of one row, the input row of an expert included."""
