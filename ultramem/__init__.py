"""Memory layers for transformers: UltraMem and its relatives, compiled, exported and profiled."""

from ultramem import ops
from ultramem.config import MemoryConfig, ModelConfig, TrainConfig
from ultramem.graph import (
    Cache,
    Counts,
    ModelOutput,
    Transformer,
    UltraMemLayer,
    build_model,
    count,
    load,
    param_groups,
)
from ultramem.presets import preset, presets

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Counts",
    "MemoryConfig",
    "ModelConfig",
    "ModelOutput",
    "TrainConfig",
    "Transformer",
    "UltraMemLayer",
    "build_model",
    "count",
    "load",
    "ops",
    "param_groups",
    "preset",
    "presets",
]
