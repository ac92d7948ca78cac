"""The enumerations of TensorRT, as far as they are used."""

from __future__ import annotations

import enum


class DataType(enum.Enum):
    """Of a tensor."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8
    BF16 = 7


class NetworkDefinitionCreationFlag(enum.IntEnum):
    """Bits of `create_network`."""

    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    """Of a configuration."""

    TF32 = 7


class MemoryPoolType(enum.Enum):
    """Of a limit."""

    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    """What an engine keeps of its layers' names."""

    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class LayerType(enum.Enum):
    """Of a layer of a network."""

    CONSTANT = 0
    PLUGIN_V3 = 1
    CAST = 2
    OTHER = 3


ALL = [DataType, NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType, ProfilingVerbosity, LayerType]
