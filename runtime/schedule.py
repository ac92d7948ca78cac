"""Learning rates as functions of the step, counted from 1."""

from __future__ import annotations

import math

from ultramem.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `lr_end_ratio` of the peak at the last step (Table 4)."""
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    share = config.lr_end_ratio + (1 - config.lr_end_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share


def value_lr_ratio(config: TrainConfig, step: int) -> float:
    """Learning rate of the value tables over the others': constant, or linear to 1 at the last step (Table 2)."""
    if not config.value_lr_decay:
        return config.value_lr_ratio
    return config.value_lr_ratio + (1 - config.value_lr_ratio) * (step - 1) / max(1, config.steps - 1)
