"""The models and settings of the paper's Figures 1(b,c), 6(c) and 7, as data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from ultramem.config import ModelConfig
from ultramem.counts import count
from ultramem.presets import preset

CACHED_TOKENS = (2048, 0)
"""The captions of all three figures say 2048; without a cache, for what the layers alone do."""
FAMILIES = ("dense", "moe", "pkm", "ultramem")
SIZES = ("151m", "680m", "1.6b")
PRESETS = {
    (family, size): name
    for size, experts in (("151m", 32), ("680m", 33), ("1.6b", 34))
    for family, name in (
        ("dense", f"dense-{size}"),
        ("moe", f"moe-{size}-2in{experts}"),
        ("pkm", f"pkm-{size}-x12"),
        ("ultramem", f"ultramem-{size}-x12"),
    )
}
BATCHES = {1: tuple(2**power for power in range(10)), 7: tuple(2**power for power in range(18))}
"""Figure 1 up to 512, Figure 7 up to the 131072 of Appendix B."""
FIGURE_6_BATCH = 512
FIGURE_6_SIZE = "1.6b"
FIGURE_6_RATIOS = (1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0)
"""Sparse parameters for one of the dense model, on both sides of the paper's 12."""


class PaperModel(NamedTuple):
    """A model of a figure."""

    family: str
    size: str
    name: str
    config: ModelConfig


def paper_models(sizes: tuple[str, ...] = SIZES) -> list[PaperModel]:
    """Every family at these sizes: equal FLOPs per token at a size, and the sparse ones of equal parameters."""
    return [
        PaperModel(family, size, PRESETS[family, size], preset(PRESETS[family, size]))
        for size in sizes
        for family in FAMILIES
    ]


def sparser(model: PaperModel, ratio: float) -> PaperModel:
    """The same model with `ratio` times as many sparse parameters as the dense model has, and no more per token.

    Figure 6(c): a mixture of experts has more of them, a memory layer has more rows, and keys as the root of those.
    """
    dense = count(preset(PRESETS["dense", model.size])).total
    config = model.config
    if config.moe is not None:
        expert = 2 * config.hidden_size * config.inner_size
        experts = max(config.moe.experts_per_token, round(ratio * dense / (config.num_layers * expert)))
        config = replace(config, moe=replace(config.moe, num_experts=experts))
    elif config.memory is not None:
        rows = ratio * dense / (len(config.parsed_insertions) * config.memory.value_dim)
        config = replace(config, memory=replace(config.memory, knum=round(math.sqrt(rows))))
    else:
        raise ValueError(f"model must have experts or a memory to be made sparser, got {model.name!r}")
    return PaperModel(model.family, model.size, f"{model.family}-{model.size} x{ratio:g}", config)
