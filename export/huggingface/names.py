"""Our configuration and names of weights as the Hugging Face files have them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from ultramem.config import MemoryConfig, ModelConfig
from ultramem.export.options import TABLE_BITS, ExportOptions
from ultramem.graph.transformer import Transformer

# Only training from scratch reads these.
TRAINING_FIELDS = ("num_layers", "init", "aux_loss_weight", "aux_loss_margin")

_TOP_LEVEL = {"embedding": "embed_tokens", "blocks": "layers"}


def hugging_face_fields(config: ModelConfig, options: ExportOptions | None = None) -> dict[str, Any]:
    """The fields of `UltraMemConfig`, JSON-ready; the options say how many bits the rows of tables have."""
    moe, table = config.moe, None if options is None else options.table
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "rope_base": config.rope_theta,
        "hidden_dropout": config.dropout,
        "moe": moe and {"num_experts": moe.num_experts, "experts_per_token": moe.experts_per_token},
        "memory": config.memory and memory_fields(config.memory, table_bits=0 if table is None else TABLE_BITS[table]),
        "insertions": config.insertions,
        "replace_mlp": config.replace_mlp,
    }


def memory_fields(config: MemoryConfig, *, table_bits: int) -> dict[str, Any]:
    """The fields of a memory layer that a forward pass reads."""
    fields = {name: value for name, value in asdict(config).items() if name not in TRAINING_FIELDS}
    return fields | {"table_bits": table_bits}


def hugging_face_name(name: str) -> str:
    """The name of a weight or buffer of `Transformer` in `UltraMemForCausalLM`."""
    first, dot, rest = name.partition(".")
    return "lm_head." + rest if first == "head" else f"model.{_TOP_LEVEL.get(first, first)}{dot}{rest}"


def hugging_face_state(model: Transformer) -> dict[str, Tensor]:
    """The weights of `model` under the names of `UltraMemForCausalLM`, bit for bit."""
    return {hugging_face_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
