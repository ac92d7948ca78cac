"""What a model, a memory layer and a training run are made of. A default appears here and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

FORMAT_VERSION = 1

T = TypeVar("T")


class Insertion(NamedTuple):
    """A memory layer that reads the input of layer `source`'s MLP and is added after layer `target` (both 1-based)."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """One memory layer: UltraMem's by default, its relatives' by switches. The paper's symbols stand in brackets.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    hidden_size: int
    """[d] width of the residual stream."""
    num_layers: int
    """[L] transformer layers of the model, for the variance of the initial output, 1/(2L)."""
    value_dim: int
    """[Dv] width of a value row; the paper halves it, d/2."""
    key_dim: int
    """[Kdim] key width of a side."""
    knum: int
    """[Knum] side of the physical table, which has knum^2 rows."""
    num_heads: int = 2
    """[H] key sets."""
    top_m: int = 16
    """[m] slots kept per head."""
    rank: int = 2
    """[r] Tucker rank; 1 means additive product keys (PKM)."""
    num_cores: int = 2
    """[h] scores per slot (MCS), each weighting its own columns of the value row; 1 turns it off."""
    expansion: int = 4
    """[E] virtual blocks (IVE), a perfect square; 1 turns it off."""
    rank_layout: Literal["full", "split"] = "full"
    """"full": every rank has keys of key_dim (Table 6). "split": query and keys are cut into r pieces (Table 2)."""
    candidates: Literal["one_tailed", "two_tailed"] = "one_tailed"
    """Which cells Tucker selection rescores: the paper's, or both tails of each side."""
    permutation: Literal["computed", "stored", "none"] = "computed"
    """How virtual addresses are shuffled: a computed bijection, a stored random table (the paper's), or not at all."""
    permutation_seed: int = 0
    conv_width: int = 4
    """Width of the causal depthwise convolution before the query projection; 1 turns it off."""
    candidate_ratio: float = 1.0
    """[m'/m] Tucker selection rescores the candidates for ceil(ratio * m) slots and keeps the best m of them."""
    shared_query: bool = True
    """One query for all heads; False gives each head its own."""
    qk_norm: Literal["layer", "rms", "none"] = "layer"
    """Norm of queries and keys; the released code has RMSNorm."""
    score_function: Literal["none", "softmax"] = "none"
    """What kept scores go through before they weight rows; softmax is over the m slots of a head."""
    output: Literal["project", "gated", "none"] = "project"
    """"project": one matrix per virtual block (eq 13). "gated": Memory+'s W2(pooled * silu(W1 x)). "none": the pooled
    rows themselves, which must be as wide as the residual stream."""
    project_bias: bool = False
    """A bias per virtual block in the projection, weighted by the block's score sum (as Table 2's counts imply)."""
    table: Literal["own", "shared", "windows"] = "own"
    """"own": a table per layer. "shared": one of knum^2 rows for all layers (Memory+). "windows": one of
    table_layers * knum^2 rows, of which layer l sees those from l * knum^2 on, cyclically (UltraMemV2)."""
    table_layers: int = 1
    """Memory layers that read one table of windows."""
    window_share: float = 1.0
    """Share of the rows of a table of windows that one layer sees."""
    expert_dim: int = 0
    """[Dp] width of a slot's input row, which makes it a one-neuron expert (PEER, UltraMemV2); 0 turns it off."""
    expert_activation: Literal["gelu", "none"] = "gelu"
    """What the product of input and input row goes through before it multiplies the slot's scores."""
    expert_project: bool = False
    """The input goes through a matrix to expert_dim before the product (UltraMemV2); else expert_dim is hidden_size."""
    init: Literal["calibrated", "paper", "released", "memory_plus"] = "calibrated"
    """"calibrated": scales are measured on the layer's own keys and cores. "paper": the closed rule of Appendix A.
    "released": the authors' code, values of std 0.02. "memory_plus": uniform keys, values of std hidden_size^-0.5."""
    aux_loss_weight: float = 0.001
    """[alpha] weight of the loss on the cores' trailing singular values; 0 turns it off."""
    aux_loss_margin: float = 0.15
    """[tau] singular values below it are free."""

    def __post_init__(self) -> None:
        _require_fields_at_least(
            self, 1, "hidden_size", "num_layers", "value_dim", "key_dim", "knum", "num_heads", "top_m", "rank",
            "num_cores", "expansion", "conv_width", "table_layers", "candidate_ratio",
        )  # fmt: skip
        _require_fields_at_least(self, 0, "permutation_seed", "expert_dim", "aux_loss_weight", "aux_loss_margin")
        _require_literals(self)
        if math.isqrt(self.expansion) ** 2 != self.expansion:
            raise ValueError(f"expansion must be a perfect square (1, 4, 9, 16), got {self.expansion}")
        if self.value_dim % self.num_cores:
            raise ValueError(f"num_cores must divide value_dim ({self.value_dim}), got {self.num_cores}")
        if self.rank_layout == "split" and self.key_dim % self.rank:
            raise ValueError(f"rank must divide key_dim ({self.key_dim}) with rank_layout 'split', got {self.rank}")
        if self.rank == 1 and self.num_cores != 1:
            raise ValueError(f"num_cores must be 1 with rank 1 (additive scores have no core), got {self.num_cores}")
        if self.num_candidates > self.grid_side:
            raise ValueError(f"top_m must be at most the {self.grid_side} keys of a side, got {self.num_candidates}")
        if self.grid_side > 65536:
            raise ValueError(f"sqrt(expansion) * knum must be at most 65536, got {self.grid_side}")
        if self.candidate_ratio != 1 and self.rank == 1:
            raise ValueError(f"candidate_ratio must be 1 with rank 1, which is exact, got {self.candidate_ratio}")
        if not 0 < self.window_share <= 1:
            raise ValueError(f"window_share must be in (0, 1], got {self.window_share}")
        if self.table != "windows" and (self.table_layers, self.window_share) != (1, 1.0):
            raise ValueError(
                f"table must be 'windows' with table_layers {self.table_layers} and window_share {self.window_share}, "
                f"got {self.table!r}"
            )
        self._check_output()

    def _check_output(self) -> None:
        if self.output == "none" and (self.expansion != 1 or self.value_dim != self.hidden_size):
            raise ValueError(
                f"output must not be 'none' unless expansion is 1 and value_dim is hidden_size ({self.hidden_size}), "
                f"got expansion {self.expansion} and value_dim {self.value_dim}"
            )
        if self.project_bias and self.output != "project":
            raise ValueError(f"project_bias needs output 'project', got {self.output!r}")
        if self.expert_project and not self.expert_dim:
            raise ValueError("expert_project needs an expert_dim of at least 1, got 0")
        if self.expert_dim and not self.expert_project and self.expert_dim != self.hidden_size:
            raise ValueError(
                f"expert_dim must be hidden_size ({self.hidden_size}) without expert_project, got {self.expert_dim}"
            )

    @property
    def grid_side(self) -> int:
        """[n] side of the logical grid, sqrt(E) * knum."""
        return math.isqrt(self.expansion) * self.side

    @property
    def num_values(self) -> int:
        """[N] physical value rows that the layer sees: knum^2, or those of its window."""
        return self.side**2

    @property
    def table_rows(self) -> int:
        """Rows of the table that the layer reads."""
        return self.table_layers * self.knum**2

    @property
    def side(self) -> int:
        """Side of the physical rows that the layer sees: knum, or that of its window."""
        return math.isqrt(int(self.table_rows * self.window_share)) if self.table == "windows" else self.knum

    @property
    def num_candidates(self) -> int:
        """[m'] slots per head that Tucker selection finds candidates for."""
        return math.ceil(self.candidate_ratio * self.top_m)

    @property
    def num_slots(self) -> int:
        """[K] slots read per token, m * H."""
        return self.top_m * self.num_heads

    @property
    def rank_key_dim(self) -> int:
        """Width of one rank's key."""
        return self.key_dim // self.rank if self.rank_layout == "split" else self.key_dim


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
        _require_fields_at_least(self, 1, "num_experts", "experts_per_token")
        _require_fields_at_least(self, 0, "balance_loss_weight")
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
        _require_fields_at_least(
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is accepted.
    """

    steps: int = 1000
    batch_size: int = 16
    """Sequences per step."""
    accumulate: int = 1
    """Micro-batches that a step's sequences are split into, to save memory; the step stays the same to rounding."""
    sequence_length: int = 256
    """Tokens per sequence."""
    lr: float = 1e-3
    """Peak learning rate of all but the value tables."""
    lr_end_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_ratio: float = 0.01
    """Share of the steps in which the learning rate rises linearly."""
    value_lr_ratio: float = 10.0
    """Learning rate of the value tables over the others' at the start."""
    value_lr_decay: bool = True
    """Whether `value_lr_ratio` falls linearly to 1 at the last step (Table 2) or stays."""
    table_optimizer: Literal["adamw", "lazy_adamw", "row_adagrad"] = "adamw"
    """Of the value tables: AdamW on all rows (the paper's), or one that works on the rows that a step touched."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the value tables are kept and trained."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    seed: int = 0
    compile: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; "auto" is bfloat16 on a CUDA device that has it, else float32."""
    eval_every: int = 250
    """Steps between evaluations on held-out text; the last step is always evaluated. 0: only the last."""
    eval_tokens: int = 65536
    """Held-out tokens per evaluation during training."""
    final_eval_tokens: int | None = None
    """Tokens of held-out and of out-of-domain text in the final evaluation, spread evenly over documents; None: all."""
    health_every: int | None = None
    """Steps between reports on the memory's health; None: with each evaluation. 0: none."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """The newest ones that are kept."""
    save: Literal["last", "best"] = "last"
    """Whose weights the run ends with: the last step's, or those of the lowest held-out loss during training."""

    def __post_init__(self) -> None:
        _require_fields_at_least(
            self, 1, "steps", "batch_size", "accumulate", "checkpoint_every", "eval_tokens", "keep_checkpoints"
        )
        if self.final_eval_tokens is not None:
            _require_fields_at_least(self, 1, "final_eval_tokens")
        _require_fields_at_least(self, 2, "sequence_length")
        _require_fields_at_least(self, 0, "eval_every", "seed", "weight_decay", "max_grad_norm")
        _require_literals(self)
        for name in ("lr", "value_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("lr_end_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size ({self.batch_size}), got {self.accumulate}")
        if self.health_every is not None and self.health_every < 0:
            raise ValueError(f"health_every must be at least 0, got {self.health_every}")
        if self.save == "best" and not self.eval_every:
            raise ValueError("save must be last where eval_every is 0 (nothing says which step is best), got 'best'")

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward and backward."""
        return self.batch_size // self.accumulate


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


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready nested dicts."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """Build a config from nested dicts.

    Raises:
        ValueError: an unknown or missing field, or a value of the wrong type, named in the message.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is one of the dataclasses above
    for name in data:
        if name not in fields:
            raise ValueError(f"unknown field {name!r} of {cls.__name__}, accepted: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING:
            raise ValueError(f"{cls.__name__} needs the field {name!r}")
    return cls(**{name: _convert(f"{cls.__name__}.{name}", hints[name], value) for name, value in data.items()})


def _convert(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`: nested configs, None, and ints given for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (option,) = [each for each in options if each is not type(None)]
    if dataclasses.is_dataclass(option) and isinstance(value, dict):
        return from_dict(typing.cast(type[Any], option), value)
    if typing.get_origin(option) is Literal:
        if value not in typing.get_args(option):
            raise ValueError(f"{name} must be one of {', '.join(map(str, typing.get_args(option)))}, got {value!r}")
        return value
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, option) or (option is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be of type {option.__name__}, got {value!r}")
    return value


def _require_fields_at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _require_literals(config: Any) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            accepted = ", ".join(map(str, typing.get_args(hint)))
            raise ValueError(f"{name} must be one of {accepted}, got {getattr(config, name)!r}")
