"""What makes a memory layer a product-key memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PKM_SWITCHES: Mapping[str, Any] = MappingProxyType(
    {
        "rank": 1,
        "num_cores": 1,
        "expansion": 1,
        "permutation": "none",
        "conv_width": 1,
        "shared_query": False,
        "qk_norm": "none",
        "score_function": "softmax",
        "output": "none",
    }
)
"""Fields of `MemoryConfig` that product-key memories (https://arxiv.org/abs/1907.05242) have; their
rows are as wide as the model."""
