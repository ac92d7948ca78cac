"""Memory layers for transformers: UltraMem and its relatives, compiled, exported and profiled."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ultramem.config import MemoryConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from ultramem.counts import Counts, count
from ultramem.presets import preset, preset_training, presets

if TYPE_CHECKING:
    from ultramem import ops
    from ultramem.graph import (
        Cache,
        ModelOutput,
        Transformer,
        UltraMemLayer,
        build_model,
        load,
        param_groups,
    )

__version__ = "0.1.0"

# What needs torch is imported at its first use, so that `ultramem params` and `--help` answer at once.
_LAZY = {
    "Cache": "ultramem.graph",
    "ModelOutput": "ultramem.graph",
    "Transformer": "ultramem.graph",
    "UltraMemLayer": "ultramem.graph",
    "build_model": "ultramem.graph",
    "load": "ultramem.graph",
    "param_groups": "ultramem.graph",
}

__all__ = [
    "Cache",
    "Counts",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelOutput",
    "ParallelConfig",
    "TrainConfig",
    "Transformer",
    "UltraMemLayer",
    "build_model",
    "count",
    "load",
    "ops",
    "param_groups",
    "preset",
    "preset_training",
    "presets",
]


def __getattr__(name: str) -> Any:
    if name in ("ops", "graph"):
        return importlib.import_module(f"ultramem.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
