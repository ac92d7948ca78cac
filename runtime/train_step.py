"""One optimiser step: micro-batches through one compiled graph, clipping, learning rates.

A step is a function of (weights, optimiser state, seed, step number): its windows of text and its dropout masks are
drawn from a seed made of the last two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.config import TrainConfig
from ultramem.graph import Transformer
from ultramem.optim import clip_grad_norm_
from ultramem.runtime.data import Stream, step_seed, training_batch
from ultramem.runtime.schedule import learning_rate, value_lr_ratio

TrainLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainStep:
    """Trains `model` on the windows of `stream`, one call a step."""

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        stream: Tensor | Stream,
    ) -> None:
        self.model, self.optimizers, self.config, self.stream = model, optimizers, config, stream
        self.device = model.embedding.weight.device
        self.loss = make_train_loss(model, config)

    def __call__(self, step: int) -> dict[str, Any]:
        """Do step `step`, counted from 1; returns its row of metrics.jsonl.

        Raises:
            ValueError: the loss or the gradient is no longer a finite number.
        """
        config = self.config
        began = time.perf_counter()
        lr = learning_rate(config, step)
        value_lr = lr * value_lr_ratio(config, step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = value_lr if group["name"] == "values" else lr
        loss, aux_loss = self._backward(step)
        grad_norm = clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            check_finite(name, value, step, config)
        return {
            "step": step,
            "loss": loss,
            "aux_loss": aux_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "value_lr": value_lr,
            "tokens_per_second": round(config.batch_size * config.sequence_length / (time.perf_counter() - began), 1),
        }

    def _backward(self, step: int) -> tuple[float, float]:
        """Leave the gradient of the step's mean loss in the parameters; returns the cross-entropy and the aux loss."""
        config = self.config
        batch = training_batch(
            self.stream,
            step=step,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
        )
        torch.manual_seed(step_seed(config.seed, step))  # dropout
        sums = torch.zeros(2, device=self.device)
        for inputs_BS, targets_BS in zip(
            *(part.to(self.device).split(config.micro_batch_size) for part in batch), strict=True
        ):
            total, parts = self.loss(inputs_BS, targets_BS)
            (total / config.accumulate).backward()
            sums += parts
        cross_entropy, aux_loss = (sums / config.accumulate).tolist()
        return cross_entropy, aux_loss


def make_train_loss(model: Transformer, config: TrainConfig) -> TrainLoss:
    """(inputs, targets) -> (loss to differentiate, its parts [cross-entropy, aux loss]); one graph, if compiled."""
    device_type = model.embedding.weight.device.type
    dtype = autocast_dtype(config, device_type)

    def loss(inputs_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            output = model(inputs_BS)
        cross_entropy = F.cross_entropy(output.logits.float().flatten(0, 1), targets_BS.flatten())
        # The parts as a copy: where a dense model's aux loss is a constant 0, the compiler (torch 2.13) takes the sum
        # for an alias of a detached output, and returns it without a gradient.
        parts = torch.stack([cross_entropy.detach(), output.aux_loss.detach()])
        return cross_entropy + output.aux_loss, parts

    return torch.compile(loss, fullgraph=True) if config.compile else loss


def check_finite(name: str, value: float, step: int, config: TrainConfig) -> None:
    """Raises ValueError, which names the fields to change, if training has diverged."""
    if not math.isfinite(value):
        raise ValueError(
            f"the {name} at step {step} is {value}; lower lr ({config.lr}) or value_lr_ratio "
            f"({config.value_lr_ratio}), or raise warmup_ratio ({config.warmup_ratio})"
        )


def autocast_dtype(config: TrainConfig, device_type: str) -> torch.dtype | None:
    """In which matrix products are taken; None: in float32, without autocast."""
    if config.precision == "auto":
        return torch.bfloat16 if device_type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if config.precision == "bfloat16" else None
