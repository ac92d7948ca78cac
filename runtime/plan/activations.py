"""Bytes that a training forward keeps for the backward, by arithmetic.

Per token, with L blocks of which L' have an MLP, M memory layers, d hidden size, A attention heads, V vocabulary, e
bytes of an activation; of a memory layer Q query widths, H heads, r ranks, n side of the grid, K slots, C cores, E
blocks, Dv value dim, W convolution width, S sequence length. Norms, the residual stream and the loss are in float32.

| what | bytes |
| --- | --- |
| inputs of norms and their statistics | (2L + 1) (4 d + 8) |
| inputs of products: attention (two), MLP or memory in its place, head | (3L + 1) d e, and L d e: attention's output in another order |
| queries, keys, values, rotated, log-sum of scores | 5 L d e + 4 L A |
| inside the MLP, before and after its activation | 2 L' inner e |
| dropout masks, if there is dropout, as GPUs keep them (on a CPU 4 bytes each) | (2L + M + 1) d |
| log-probabilities, and their gradient | 8 V |
| a memory layer: input of the convolution, padded | 4 d (1 + (W-1)/S) |
| its query: input of the product, before and after the norm | d e + 2 Q e + statistics |
| its scores of rows and columns, where r > 1 | 2 H r n e |
| its addresses, once more where virtual indices are not made by the lookup | 8 K |
| its kept scores | 4 K C |
| products of experts, activated and times the scores | 4 K (2 + C), and Dp e if the input is projected |
| its pooled rows | E Dv e |
| gated outputs | 3 E Dv e more |
| beside, once a layer | normalised keys 2 H r n dk e and 8 bytes of statistics a key |

Compiled graphs keep less, as they recompute what is cheap. Under checkpointing attention and MLPs keep their inputs alone,
4 d each, and the larger of the two is there in full while it runs again; memory layers keep theirs.
"""  # noqa: E501  # a table row is one line

from __future__ import annotations

from ultramem.config import MemoryConfig, ModelConfig


def activation_bytes(
    config: ModelConfig, *, tokens: int, sequence_length: int, element_bytes: int, checkpointing: bool = False
) -> int:
    """Of one forward of `tokens` tokens on one rank, exchanges apart.

    Raises:
        ValueError: the model has mixtures of experts, whose activations are not counted here.
    """
    if config.moe is not None:
        raise ValueError(f"moe must be None, got {config.moe.num_experts} experts, whose activations are not counted")
    d, layers, size = config.hidden_size, config.num_layers, element_bytes
    with_mlp = layers - len(config.layers_without_mlp)
    memories = len(config.parsed_insertions)
    block = 2 * (4 * d + 8) + 9 * d * size + 4 * config.num_heads + (2 * d if config.dropout else 0)
    mlp = 2 * config.inner_size * size
    ends = 4 * d + 8 + d * size + 8 * config.vocab_size + (d if config.dropout else 0)
    memory = 0.0
    once = 0
    if config.memory is not None:
        memory = _memory_bytes(config.memory, sequence_length, size) + (d if config.dropout else 0)
        once = _key_bytes(config.memory, size)
    if checkpointing:
        inside = 7 * d * size + 4 * config.num_heads
        # The inputs of attention and MLP stay, as norms give them: in float32.
        block += 2 * d * (4 - size) - inside
        kept = layers * block + ends + memories * memory + max(inside, mlp)
        return round(tokens * kept) + memories * once
    return round(tokens * (layers * block + with_mlp * mlp + ends + memories * memory)) + memories * once


def _memory_bytes(memory: MemoryConfig, sequence_length: int, size: int) -> float:
    """Of one memory layer and token."""
    d, slots, cores = memory.hidden_size, memory.num_slots, memory.num_cores
    queries = 2 * memory.key_dim * (1 if memory.shared_query else memory.num_heads)
    norms = queries // memory.rank_key_dim
    kept: float = queries * size
    if memory.conv_width > 1:
        kept += 4 * d * (1 + (memory.conv_width - 1) / sequence_length) + d * size
    if memory.qk_norm != "none":
        kept += queries * size + 8 * norms
    if memory.rank > 1:
        kept += 2 * memory.num_heads * memory.rank * memory.grid_side * size
    kept += 8 * slots + 4 * slots * cores
    asks_for_indices = memory.expert_dim or memory.project_bias or memory.table == "windows"
    if memory.permutation == "stored" or (memory.permutation == "computed" and asks_for_indices):
        kept += 8 * slots
    if memory.expert_dim:
        kept += 4 * slots * (2 + cores) + (memory.expert_dim * size if memory.expert_project else 0)
    pooled = memory.expansion * memory.value_dim * size
    if memory.output == "project":
        kept += pooled
    elif memory.output == "gated":
        kept += 4 * pooled
    return kept


def _key_bytes(memory: MemoryConfig, size: int) -> int:
    """Of one layer's normalised keys."""
    keys = 2 * memory.num_heads * memory.rank * memory.grid_side
    return 0 if memory.qk_norm == "none" else keys * (memory.rank_key_dim * size + 8)
