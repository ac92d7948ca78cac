"""Configuration of a decoder with memory layers, for `transformers`. This file stands alone beside the weights."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


class UltraMemConfig(PreTrainedConfig):
    """A pre-norm decoder with rotary positions: dense, with a mixture of experts, or with memory layers.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside an MLP, or inside each expert.
        num_hidden_layers: blocks.
        num_attention_heads: heads of attention, each with keys and values of its own.
        max_position_embeddings: longest context that the model was made for.
        rope_base: base of the rotary angles.
        hidden_dropout: on the embedding and on each residual branch's output, in training.
        moe: `num_experts` and `experts_per_token` of a mixture in the place of every MLP, or None.
        memory: the fields of `MemoryLayerConfig`, or None.
        insertions: where memory layers read and write, 1-based: "3:5/6:8" reads at layer 3, adds after layer 5, ...
        replace_mlp: a memory layer takes the place of the MLP of the layer that it reads at.
    """

    model_type = "ultramem"

    vocab_size: int = 257
    hidden_size: int = 192
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    max_position_embeddings: int = 4096
    rope_base: float = 10000.0
    hidden_dropout: float = 0.0
    moe: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    insertions: str = ""
    replace_mlp: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one head of attention."""
        return self.hidden_size // self.num_attention_heads

    @property
    def memory_layer(self) -> "MemoryLayerConfig | None":
        """`memory` with its derived sizes."""
        return None if self.memory is None else MemoryLayerConfig(**self.memory)

    @property
    def parsed_insertions(self) -> list[tuple[int, int]]:
        """(source, target) of each memory layer, 1-based."""
        pairs = [item.split(":") for item in self.insertions.split("/") if item]
        return [(int(source), int(target)) for source, target in pairs]

    @property
    def conv_lengths(self) -> list[int]:
        """Per block the inputs that the convolution of its memory layers keeps while decoding; 0: none."""
        memory = self.memory_layer
        sources = {source for source, _ in self.parsed_insertions}
        length = 0 if memory is None else memory.conv_width - 1
        return [length if number in sources else 0 for number in range(1, self.num_hidden_layers + 1)]


@dataclass(frozen=True, kw_only=True)
class MemoryLayerConfig:
    """What a forward pass of a memory layer depends on; `ultramem.MemoryConfig` explains each field."""

    hidden_size: int
    value_dim: int
    key_dim: int
    knum: int
    num_heads: int
    top_m: int
    rank: int
    num_cores: int
    expansion: int
    rank_layout: str
    candidates: str
    permutation: str
    permutation_seed: int
    conv_width: int
    candidate_ratio: float
    shared_query: bool
    qk_norm: str
    qk_norm_eps: float
    score_function: str
    output: str
    project_bias: bool
    table: str
    table_layers: int
    window_share: float
    expert_dim: int
    expert_activation: str
    expert_project: bool
    table_bits: int
    """Of the numbers in rows of the table, 8 or 4, with a float32 scale for each row; 0: floating point."""

    @property
    def table_rows(self) -> int:
        """Rows of the table that the layer reads."""
        return self.table_layers * self.knum**2

    @property
    def side(self) -> int:
        """Side of the rows that the layer sees: knum, or that of its window."""
        return math.isqrt(int(self.table_rows * self.window_share)) if self.table == "windows" else self.knum

    @property
    def num_values(self) -> int:
        """Rows that the layer sees."""
        return self.side**2

    @property
    def grid_side(self) -> int:
        """Side of the grid of virtual addresses."""
        return math.isqrt(self.expansion) * self.side

    @property
    def num_candidates(self) -> int:
        """Slots per head that selection finds candidates for, of which the best `top_m` are kept."""
        return math.ceil(self.candidate_ratio * self.top_m)

    @property
    def rank_key_dim(self) -> int:
        """Width of one rank's key."""
        return self.key_dim // self.rank if self.rank_layout == "split" else self.key_dim
