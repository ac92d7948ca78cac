"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ultramem.config.fields import require_fields_at_least, require_literals
from ultramem.config.parallel import ParallelConfig


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
    activation_checkpointing: bool = False
    """Whether attention and MLPs run again in the backward, in place of keeping what they made: less memory, more
    time. Memory layers keep theirs, whose rows would have to be fetched again."""
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

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is spread over ranks."""

    def __post_init__(self) -> None:
        require_fields_at_least(
            self, 1, "steps", "batch_size", "accumulate", "checkpoint_every", "eval_tokens", "keep_checkpoints"
        )
        if self.final_eval_tokens is not None:
            require_fields_at_least(self, 1, "final_eval_tokens")
        require_fields_at_least(self, 2, "sequence_length")
        require_fields_at_least(self, 0, "eval_every", "seed", "weight_decay", "max_grad_norm")
        require_literals(self)
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
