"""Bytes and FLOPs of every stage by arithmetic: what one forward must move and compute, on any engine.

Symbols: B sequences, S new tokens each, P tokens already cached, T = B*S; d hidden size, L layers, V vocabulary;
of a memory layer H heads, r ranks, n side of the logical grid, m slots per head, K = m*H, C cores, E blocks,
N rows, Dv value dim, Dp width of an expert's input row. e is the bytes of one number. Per forward:

| stage | FLOPs | bytes |
| --- | --- | --- |
| query | 2T * weights (projection and convolution) | weights; in T*d and B*d*(W-1) of the convolution, out the query |
| score | 2T * 2*H*r*n*K_r | keys; in the query, out T*2*H*r*n scores |
| select | per head: a and b 4rn; candidates 2r^2 s + 2r s^2 per grid of side s; kept m*C*(2r^2 + 2r); PKM m^2 | in the scores, out T*H*m*C scores and int64 addresses |
| lookup | 2T*K*(Dv + Dp), 2T*d*Dp of an expert projection | min(T*K, N) rows; in scores and addresses, out T*E*Dv |
| exchange | none | what a rank sends to P - 1 others, where tables are in P parts: (P-1)/P * T*E*Dv by columns, twice that by rows, 2(P-1)/P * T*K of expert products |
| expand | 2T * weights | weights; in T*E*Dv (and T*d, if gated), out T*d |
| attention | 2T*4d^2 and 4d per pair of a token and a position that it sees | weights; in and out T*d; cache: 2*B*P*d read, 2*B*S*d written |
| mlp | 2T*2*d*inner; with experts times those of a token, and 2T*d*experts of the router | weights, of at most as many experts as T tokens choose; in and out T*d |
| head | 2T*d*V | weights; in T*d, out T*V |
| other | not counted | norm weights, min(T, V) embedding rows, and T*d read or written by each norm and residual addition |

Each is summed over the layers that have the stage. It is a lower bound: every weight and activation crosses the memory
bus once, what stays inside a stage (the MLP's inner activations, the softmax) never does. Norms, activations, softmax,
rotary angles and the comparisons of top-k are not counted as FLOPs. Of tables in P parts a rank reads 1/P of the rows'
bytes (by rows in the mean).
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

from typing import NamedTuple

from ultramem.config import MemoryConfig, ModelConfig
from ultramem.counts import count_memory
from ultramem.ops.tucker_topk import tail_length

MEMORY_STAGES = ("query", "score", "select", "lookup", "expand")
EXCHANGE = "exchange"
STAGES = (*MEMORY_STAGES, "attention", "mlp", "head", "other")
"""Of a model in one process."""
ALL_STAGES = (*MEMORY_STAGES[:-1], EXCHANGE, *STAGES[len(MEMORY_STAGES) - 1 :])
"""With the one that ranks add."""
ADDRESS_BYTES = 8


class StageCost(NamedTuple):
    """What a stage must compute and move in one forward, over all layers that have it; of several ranks, on one."""

    stage: str
    flops: int
    weight_bytes: int
    """Dense weights read once."""
    row_bytes: int
    """Rows of value tables (lookup) or of the embedding (other), each distinct row at most once."""
    cache_bytes: int
    """Key-value and convolution caches, read and appended."""
    activation_bytes: int
    """Inputs read and outputs written."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.row_bytes + self.cache_bytes + self.activation_bytes


def stage_costs(
    config: ModelConfig,
    *,
    batch: int,
    new_tokens: int,
    cached_tokens: int = 0,
    element_bytes: int = 4,
    ranks: int = 1,
    placement: str | None = None,
) -> tuple[StageCost, ...]:
    """Cost of one forward of `batch` sequences with `new_tokens` each after `cached_tokens`, stage by stage.

    A prefill is `new_tokens=S`; a decode step is `new_tokens=1, cached_tokens=P`. Stages that the model lacks are
    left out; the order is that of `ALL_STAGES`. With a `placement` of tables, "rows" or "columns", it is what each of
    the `ranks` does, all of them on the same tokens.
    """
    costs = []
    if config.memory is not None:
        costs += _memory_costs(config.memory, len(config.parsed_insertions), batch, new_tokens, element_bytes)
        if placement is not None:
            costs = _shared(costs, config, ranks, placement, batch * new_tokens * element_bytes)
    costs += _dense_costs(config, batch, new_tokens, cached_tokens, element_bytes)
    return tuple(costs)


def modules_of_stages(config: ModelConfig) -> dict[str, int]:
    """How many modules share a stage's cost in equal parts; stages whose modules do not are left out ("other")."""
    memories = len(config.parsed_insertions) if config.memory is not None else 0
    mlps = config.num_layers - len(config.layers_without_mlp)
    counts = dict.fromkeys(MEMORY_STAGES, memories) | {"attention": config.num_layers, "mlp": mlps, "head": 1}
    return {stage: number for stage, number in counts.items() if number}


def _shared(
    costs: list[StageCost], config: ModelConfig, ranks: int, placement: str, token_bytes: int
) -> list[StageCost]:
    """The stages of a memory layer on one of several ranks; `token_bytes` are those of a number for each token."""
    memory, layers = config.memory, len(config.parsed_insertions)
    assert memory is not None
    *before, lookup, expand = costs
    rows = memory.expansion * memory.value_dim * (1 if placement == "columns" else 2)
    products = 2 * memory.num_slots if memory.expert_dim else 0
    sent = layers * token_bytes * (rows + products) * (ranks - 1) // ranks
    lookup = lookup._replace(row_bytes=lookup.row_bytes // ranks)
    return [*before, lookup, StageCost(EXCHANGE, 0, 0, 0, 0, activation_bytes=sent), expand]


def _memory_costs(memory: MemoryConfig, layers: int, batch: int, new_tokens: int, size: int) -> list[StageCost]:
    """The five stages of `layers` memory layers."""
    t = batch * new_tokens
    d, h, r, n = memory.hidden_size, memory.num_heads, memory.rank, memory.grid_side
    m, k, c, e, dv = memory.top_m, memory.num_slots, memory.num_cores, memory.expansion, memory.value_dim
    weights = count_memory(memory)
    norm = memory.rank_key_dim if memory.qk_norm != "none" else 0
    dp, gated = memory.expert_dim, memory.output == "gated"
    queries = 2 * memory.key_dim * (1 if memory.shared_query else h)
    scores = 2 * h * r * n
    kept = t * h * m * (c * size + ADDRESS_BYTES)
    conv = d * (memory.conv_width - 1)
    permutation = t * k * ADDRESS_BYTES if memory.permutation == "stored" else 0

    def cost(stage: str, flops: int, weight: int, activation: int, *, rows: int = 0, cache: int = 0) -> StageCost:
        parts = (flops, weight * size, rows, cache, activation)
        return StageCost(stage, *(layers * part for part in parts))

    return [
        cost(
            "query", 2 * t * (weights.query - norm), weights.query, t * (d + queries) * size,
            cache=2 * batch * conv * size,
        ),
        cost("score", 2 * t * scores * memory.rank_key_dim, weights.score, t * (queries + scores) * size),
        cost("select", t * h * _select_flops(memory), weights.select, t * scores * size + kept),
        cost(
            "lookup", 2 * t * (k * (dv + dp) + weights.lookup), weights.lookup,
            kept + t * (e * dv + (d if dp else 0)) * size + permutation,
            rows=min(t * k, memory.num_values) * (dv + dp) * size,
        ),
        cost("expand", 2 * t * weights.expand, weights.expand, t * (e * dv + d * (2 if gated else 1)) * size),
    ]  # fmt: skip


def select_flops(rank: int, side: int, top_m: int, cores: int, *, grids: int, grid_side: int) -> int:
    """Of one token and head: `grids` of `grid_side` x `grid_side` candidates, of which `top_m` stay."""
    candidates = grids * (2 * rank * rank * grid_side + 2 * rank * grid_side * grid_side)
    return 4 * rank * side + candidates + top_m * cores * (2 * rank * rank + 2 * rank)


def _select_flops(memory: MemoryConfig) -> int:
    if memory.rank == 1:
        return memory.top_m**2
    grids, side = (1, memory.top_m) if memory.candidates == "one_tailed" else (2, tail_length(memory.top_m))
    return select_flops(memory.rank, memory.grid_side, memory.top_m, memory.num_cores, grids=grids, grid_side=side)


def _dense_costs(config: ModelConfig, batch: int, new_tokens: int, cached_tokens: int, size: int) -> list[StageCost]:
    """Attention, MLP, head and what is left."""
    t, d, layers = batch * new_tokens, config.hidden_size, config.num_layers
    # A new token sees the cache, the new ones before it and itself.
    pairs = batch * (new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2)
    attention, mlp, head = 4 * d * d, 2 * d * config.inner_size, d * config.vocab_size
    mlp_layers, mlp_flops, mlp_weights = layers - len(config.layers_without_mlp), 2 * t * mlp, mlp
    if config.moe is not None:
        experts, per_token = config.moe.num_experts, config.moe.experts_per_token
        mlp_flops = 2 * t * (per_token * mlp + d * experts)
        mlp_weights = min(t * per_token, experts) * mlp + d * experts
    norms = 2 * layers + 1
    additions = 2 * layers + len(config.parsed_insertions)
    return [
        StageCost(
            "attention",
            flops=layers * (2 * t * attention + 4 * d * pairs),
            weight_bytes=layers * attention * size,
            row_bytes=0,
            cache_bytes=layers * 2 * batch * (cached_tokens + new_tokens) * d * size,
            activation_bytes=layers * 2 * t * d * size,
        ),
        StageCost("mlp", mlp_layers * mlp_flops, mlp_layers * mlp_weights * size, 0, 0, mlp_layers * 2 * t * d * size),
        StageCost("head", 2 * t * head, head * size, 0, 0, t * (d + config.vocab_size) * size),
        StageCost(
            "other",
            flops=0,
            weight_bytes=norms * d * size,
            row_bytes=min(t, config.vocab_size) * d * size,
            cache_bytes=0,
            activation_bytes=(2 * norms + 3 * additions) * t * d * size + t * ADDRESS_BYTES,
        ),
    ]
