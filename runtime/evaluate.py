"""Loss, bits per byte and perplexity on text that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.graph import Transformer
from ultramem.runtime.data import IGNORE, Batch


class Evaluation(NamedTuple):
    """Means over `tokens` predicted bytes."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    perplexity: float
    tokens: int


SummedLoss = Callable[[Tensor, Tensor], Tensor]


def make_summed_loss(model: Transformer, *, compiled: bool) -> SummedLoss:
    """(inputs, targets) -> cross-entropy summed over the counted targets; one graph for every length, if compiled."""

    def summed_loss(inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = model(inputs_BS).logits.float()
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")

    return torch.compile(summed_loss, fullgraph=True, dynamic=True) if compiled else summed_loss


def evaluate(model: Transformer, summed_loss: SummedLoss, batches: Iterable[Batch]) -> Evaluation:
    """Evaluate in eval mode and without gradients; the model's mode is put back.

    Raises:
        ValueError: the batches hold no target.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for inputs_BS, targets_BS in batches:
                total += float(summed_loss(inputs_BS.to(device), targets_BS.to(device)))
                tokens += int((targets_BS != IGNORE).sum())
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("the text to evaluate on holds no token")
    loss = total / tokens
    return Evaluation(loss, loss / math.log(2), math.exp(min(loss, 700.0)), tokens)
