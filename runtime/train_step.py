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
from ultramem.ops import accumulation_dtype
from ultramem.runtime.data import Stream, step_seed, training_batch
from ultramem.runtime.distributed import ALONE, Ranks, ShardedLoss, reduce_gradients
from ultramem.runtime.distributed.gradients import clip_gradients
from ultramem.runtime.schedule import learning_rate, value_lr_ratio

TrainLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainStep:
    """Trains `model` on the windows of `stream`, one call a step.

    Args:
        model: to train.
        optimizers: of its weights.
        config: how.
        stream: tokens, the same on every rank.
        ranks: that train together, each on its part of every micro-batch.
        loss: see `make_train_loss`, which makes it where it is None; or a `ShardedLoss`.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        stream: Tensor | Stream,
        *,
        ranks: Ranks = ALONE,
        loss: TrainLoss | None = None,
    ) -> None:
        self.model, self.optimizers, self.config, self.stream = model, optimizers, config, stream
        self.ranks = ranks
        self.device = model.embedding.weight.device
        self.loss = make_train_loss(model, config) if loss is None else loss

    def __call__(self, step: int, *, stop: Callable[[], int] = lambda: 0) -> dict[str, Any]:
        """Do step `step`, counted from 1; returns its row of metrics.jsonl.

        Args:
            step: its number.
            stop: gives the number of a signal that this rank was told to end by, or 0; the row's "stop" is the highest
                of all ranks.

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
        sums_F = self._backward(step)
        reduce_gradients(self.model, self.ranks)
        stops_F = sums_F.new_zeros(self.ranks.size)
        stops_F[self.ranks.rank] = stop()
        figures_F = torch.cat([sums_F, stops_F])
        grad_norm = clip_gradients(self.model, self.ranks, config.max_grad_norm or math.inf, figures_F).item()
        loss, aux_loss, *stops = figures_F.tolist()
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
            "stop": int(max(stops)),
        }

    def _backward(self, step: int) -> Tensor:
        """Leave this rank's part of the gradient of the step's mean loss in the parameters; and of that loss.

        Returns the cross-entropy and the aux loss [2], which add up over ranks.
        """
        config = self.config
        batch = training_batch(
            self.stream,
            step=step,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
        )
        torch.manual_seed(step_seed(config.seed, step) + self.ranks.rank)  # dropout
        share = config.accumulate * self.ranks.size
        sums = torch.zeros(2, device=self.device, dtype=accumulation_dtype(self.model.embedding.weight.dtype))
        micro_batches = list(zip(*(part.split(config.micro_batch_size) for part in batch), strict=True))
        for number, (inputs_BS, targets_BS) in enumerate(micro_batches, start=1):
            if isinstance(self.loss, ShardedLoss):
                self.loss.is_last(number == len(micro_batches))
            total, parts = self.loss(*(self.ranks.part_of(each).to(self.device) for each in (inputs_BS, targets_BS)))
            (total / share).backward()
            sums += parts
        return sums / share


def make_train_loss(model: Transformer, config: TrainConfig) -> TrainLoss:
    """(inputs, targets) -> (loss to differentiate, its parts [cross-entropy, aux loss]); one graph, if compiled."""
    device_type = model.embedding.weight.device.type
    dtype = autocast_dtype(config, device_type)

    def loss(inputs_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            output = model(inputs_BS)
        logits_BSV = output.logits.to(accumulation_dtype(output.logits.dtype))
        cross_entropy = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
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
