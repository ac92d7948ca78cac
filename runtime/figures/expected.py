"""Cost of one decode step where tokens choose experts and rows uniformly at random.

`runtime/profile/arithmetic.py` counts at most `min(T*k, E)` experts and `min(T*K, N)` rows, which is what T tokens
touch if no two choose the same. Figures over the batch need what they touch on average. Of T tokens with k different
experts of E each, the expected number of different experts is

    E * (1 - (1 - k/E)^T)

and of T*K rows of N, each drawn by itself,

    N * (1 - (1 - 1/N)^(T*K))

and so for embedding rows, T of V. Uniform is what the paper assumes ("fully balanced"); what was trained chooses less
uniformly and touches fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ultramem.config import ModelConfig
from ultramem.counts import count
from ultramem.runtime.figures.devices import Roofs
from ultramem.runtime.profile.arithmetic import StageCost, stage_costs


def expected_distinct(draws: int, among: int, *, at_once: int = 1) -> float:
    """Expected number of different ones in `draws` draws of `at_once` different ones among `among`."""
    if not 1 <= at_once <= among or draws < 0:
        raise ValueError(f"at_once must be in 1..{among} and draws at least 0, got at_once {at_once}, draws {draws}")
    if at_once == among:
        return float(among) if draws else 0.0
    return among * -math.expm1(draws * math.log1p(-at_once / among))


def decode_costs(
    config: ModelConfig, *, batch: int, cached_tokens: int, element_bytes: int, used: float | None = None
) -> tuple[StageCost, ...]:
    """Cost of a decode step of `batch` sequences after `cached_tokens` tokens each, stage by stage.

    Args:
        config: of the model.
        batch: sequences, so new tokens.
        cached_tokens: of each sequence.
        element_bytes: of weights, activations and caches.
        used: the experts or rows that a layer was seen to touch, on average over layers; None: the expected number.
    """
    costs = stage_costs(config, batch=batch, new_tokens=1, cached_tokens=cached_tokens, element_bytes=element_bytes)
    return tuple(_with_expected(cost, config, batch, used, element_bytes) for cost in costs)


def sparse_bytes(costs: Iterable[StageCost], config: ModelConfig, *, element_bytes: int) -> int:
    """Bytes of experts or value rows in them: what the paper's formulas of memory access compare."""
    by_stage = {cost.stage: cost for cost in costs}
    if config.moe is not None:
        layers = config.num_layers - len(config.layers_without_mlp)
        router = config.hidden_size * config.moe.num_experts
        return by_stage["mlp"].weight_bytes - layers * router * element_bytes
    return by_stage["lookup"].row_bytes if config.memory is not None else 0


def expected_used(config: ModelConfig, batch: int) -> float:
    """Expected number of different experts, or rows, that a layer touches for `batch` tokens; 0 in a dense model."""
    if config.moe is not None:
        return expected_distinct(batch, config.moe.num_experts, at_once=config.moe.experts_per_token)
    if config.memory is not None:
        return expected_distinct(batch * config.memory.num_slots, config.memory.num_values)
    return 0.0


def roofline_us(costs: Iterable[StageCost], roofs: Roofs) -> float:
    """Shortest time of stages one after the other: of each, the longer of moving its bytes and computing its FLOPs."""
    return 1e6 * sum(
        max(cost.total_bytes / roofs.bytes_per_second, cost.flops / roofs.flops_per_second) for cost in costs
    )


def resident_bytes(config: ModelConfig, *, batch: int, cached_tokens: int, element_bytes: int) -> int:
    """Bytes that must lie in the device's memory for the step: all weights, and the cache of keys and values."""
    cache = 2 * batch * (cached_tokens + 1) * config.hidden_size * config.num_layers
    return (count(config).total_with_embeddings + cache) * element_bytes


def _with_expected(
    cost: StageCost, config: ModelConfig, batch: int, used: float | None, element_bytes: int
) -> StageCost:
    d = config.hidden_size
    if cost.stage == "other":
        rows = expected_distinct(batch, config.vocab_size)
        return cost._replace(row_bytes=round(rows * d * element_bytes))
    if cost.stage == "lookup" and config.memory is not None:
        memory = config.memory
        at_most = min(batch * memory.num_slots, memory.num_values)
        rows = expected_used(config, batch) if used is None else used
        return cost._replace(row_bytes=round(cost.row_bytes * rows / at_most))
    if cost.stage == "mlp" and config.moe is not None:
        experts = expected_used(config, batch) if used is None else used
        layers = config.num_layers - len(config.layers_without_mlp)
        numbers = experts * 2 * d * config.inner_size + d * config.moe.num_experts
        return cost._replace(weight_bytes=round(layers * numbers * element_bytes))
    return cost
