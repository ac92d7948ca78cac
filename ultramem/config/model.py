"""A model: dense, with a mixture of experts, or with memory layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ultramem.config.fields import require_fields_at_least
from ultramem.config.memory import MemoryConfig


class Insertion(NamedTuple):
    """A memory layer that reads the input of layer `source`'s MLP and is added after layer `target` (both 1-based)."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """A mixture of experts in the place of every MLP; each expert is as wide as the model's `inner_size`.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    num_experts: int
    experts_per_token: int = 2
    balance_loss_weight: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, eq 4-6); 0 turns it off."""

    def __post_init__(self) -> None:
        require_fields_at_least(self, 1, "num_experts", "experts_per_token")
        require_fields_at_least(self, 0, "balance_loss_weight")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts ({self.num_experts}), got {self.experts_per_token}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder with rotary positions: dense, with a mixture of experts, or with memory layers.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    vocab_size: int
    hidden_size: int
    inner_size: int
    """Width inside the MLP, or inside each expert."""
    num_heads: int
    num_layers: int
    dropout: float = 0.1
    """On the embedding and on each residual branch's output."""
    rope_theta: float = 10000.0
    max_positions: int = 4096
    """Longest context that generation accepts."""
    moe: MoEConfig | None = None
    memory: MemoryConfig | None = None
    insertions: str = ""
    """Where memory layers read and write, 1-based: "3:5/6:8" reads at layer 3, adds after layer 5, and so on."""
    replace_mlp: bool = False
    """A memory layer takes the place of the MLP of the layer that it reads at and writes after (Memory+, PEER)."""

    def __post_init__(self) -> None:
        require_fields_at_least(
            self, 1, "vocab_size", "hidden_size", "inner_size", "num_heads", "num_layers", "max_positions"
        )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads ({self.num_heads}), got {self.hidden_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        insertions = parse_insertions(self.insertions, self.num_layers)
        if (self.memory is None) != (not insertions):
            raise ValueError(f"insertions must name layers exactly when there is a memory, got {self.insertions!r}")
        if self.memory is not None:
            if self.memory.hidden_size != self.hidden_size:
                raise ValueError(
                    f"memory.hidden_size must be hidden_size ({self.hidden_size}), got {self.memory.hidden_size}"
                )
            if self.memory.num_layers != self.num_layers:
                raise ValueError(
                    f"memory.num_layers must be num_layers ({self.num_layers}), got {self.memory.num_layers}"
                )
            if self.memory.table == "windows" and self.memory.table_layers != len(insertions):
                raise ValueError(
                    f"memory.table_layers must be the {len(insertions)} layers of insertions, "
                    f"got {self.memory.table_layers}"
                )
        if self.replace_mlp and not all(each.source == each.target for each in insertions):
            raise ValueError(f"insertions must write where they read with replace_mlp, got {self.insertions!r}")
        if self.replace_mlp and len({each.source for each in insertions}) < len(insertions):
            raise ValueError(f"insertions must name each layer once with replace_mlp, got {self.insertions!r}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_convs(self) -> int:
        """Memory layers that keep inputs for their convolution while decoding."""
        return len(self.parsed_insertions) if self.conv_length else 0

    @property
    def conv_length(self) -> int:
        """Inputs that a memory layer's convolution keeps."""
        return self.memory.conv_width - 1 if self.memory is not None else 0

    @property
    def layers_without_mlp(self) -> frozenset[int]:
        """1-based layers whose MLP a memory layer replaces."""
        return frozenset(each.source for each in self.parsed_insertions) if self.replace_mlp else frozenset()

    @property
    def parsed_insertions(self) -> tuple[Insertion, ...]:
        return parse_insertions(self.insertions, self.num_layers)


def parse_insertions(text: str, num_layers: int) -> tuple[Insertion, ...]:
    """Read "3:5/6:8" (1-based source:target pairs).

    Raises:
        ValueError: not of that form, or 1 <= source <= target <= num_layers does not hold.
    """
    if not text:
        return ()
    pairs = []
    for item in text.split("/"):
        source, colon, target = item.partition(":")
        if not (colon and source.isdecimal() and target.isdecimal()):
            raise ValueError(f"insertions must look like '3:5/6:8', got {text!r}")
        pair = Insertion(int(source), int(target))
        if not 1 <= pair.source <= pair.target <= num_layers:
            raise ValueError(f"insertions must satisfy 1 <= source <= target <= {num_layers}, got {item!r}")
        pairs.append(pair)
    return tuple(pairs)
