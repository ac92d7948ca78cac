"""A profile on a page, and the names and colours that all sections of it use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SERIES = tuple(f"var(--series-{index})" for index in range(6))
NONE = "–"  # noqa: RUF001  # an en dash
PHASES = ("prefill", "decode")
ENGINE_NAMES = {"compile": "torch.compile", "onnx": "ONNX Runtime", "aoti": "AOTInductor", "tensorrt": "TensorRT"}
STAGE_NAMES = {"mlp": "MLP"}
DARK_STAGES = ("select", "attention", "mlp", "head")


class Source(NamedTuple):
    """A profile, and where it is in the page's JSON."""

    profile: dict[str, Any]
    pointer: str

    @property
    def name(self) -> str:
        return str(self.profile["model"]["name"])


def engine_name(engine: str) -> str:
    return ENGINE_NAMES.get(engine, engine)


def stage_name(stages: Sequence[str]) -> str:
    """ "query", or "score + select" for what is fused."""
    return " + ".join(STAGE_NAMES.get(stage, stage) for stage in stages)


def phase_title(phase: str, tokens: int) -> str:
    return f"Prefill of {tokens} tokens" if phase == "prefill" else f"Decode step, {tokens} tokens in the cache"


def time_scale(values_us: Sequence[float]) -> tuple[str, float]:
    high = max(values_us, default=1.0)
    return ("s", 1e6) if high >= 1e6 else ("ms", 1e3) if high >= 1e3 else ("µs", 1.0)


def chosen(rows: Sequence[dict[str, Any]], **wanted: object) -> list[tuple[int, dict[str, Any]]]:
    """Rows whose fields are as wanted, with their places."""
    return [(place, row) for place, row in enumerate(rows) if all(row[name] == value for name, value in wanted.items())]
