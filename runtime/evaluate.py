"""Loss, bits per byte and perplexity on text that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.graph import Transformer
from ultramem.ops import accumulation_dtype
from ultramem.runtime.data import IGNORE, Batch
from ultramem.runtime.distributed import ALONE, Ranks


class Evaluation(NamedTuple):
    """Means over `tokens` predicted tokens, which stand for `text_bytes` bytes of UTF-8 text."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    perplexity: float
    """Of a token."""
    tokens: int
    text_bytes: int


SummedLoss = Callable[[Tensor, Tensor], Tensor]


def make_summed_loss(model: Transformer, *, compiled: bool) -> SummedLoss:
    """(inputs, targets) -> cross-entropy summed over the counted targets; one graph for every length, if compiled."""

    def summed_loss(inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = model(inputs_BS).logits
        logits_BSV = logits_BSV.to(accumulation_dtype(logits_BSV.dtype))
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")

    return torch.compile(summed_loss, fullgraph=True, dynamic=True) if compiled else summed_loss


def _share(batches: Iterable[Batch], ranks: Ranks) -> Iterator[Batch]:
    """Every rank's batches: as many of each, since a forward may need all ranks; what is missing counts no target."""
    if ranks.size == 1:
        yield from batches
        return
    batches = iter(batches)
    while turn := list(islice(batches, ranks.size)):
        inputs_BS, targets_BS = turn[-1]
        turn += [Batch(inputs_BS, torch.full_like(targets_BS, IGNORE))] * (ranks.size - len(turn))
        yield turn[ranks.rank]


def evaluate(
    model: Transformer,
    summed_loss: SummedLoss,
    batches: Iterable[Batch],
    *,
    token_bytes: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluate in eval mode and without gradients; the model's mode is put back.

    Args:
        model: what is evaluated.
        summed_loss: see `make_summed_loss`.
        batches: see `evaluation_batches`.
        token_bytes: bytes of text that each token id stands for, int64 [vocab_size] (a tokenizer's `token_bytes`);
            None: one each.
        ranks: that evaluate together, a batch each in turn; all of them return the whole.

    Raises:
        ValueError: the batches hold no target.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    total, tokens, text_bytes = 0.0, 0, 0
    try:
        with torch.no_grad():
            for inputs_BS, targets_BS in _share(batches, ranks):
                total += float(summed_loss(inputs_BS.to(device), targets_BS.to(device)))
                counted_N = targets_BS[targets_BS != IGNORE]
                tokens += len(counted_N)
                text_bytes += len(counted_N) if token_bytes is None else int(token_bytes[counted_N].sum())
    finally:
        model.train(was_training)
    if ranks.size > 1:
        sums = torch.tensor([total, tokens, text_bytes], dtype=torch.float64, device=device)
        total, tokens, text_bytes = ranks.add_up(sums).tolist()
        tokens, text_bytes = int(tokens), int(text_bytes)
    if not tokens:
        raise ValueError("the text to evaluate on holds no token")
    if not text_bytes:
        raise ValueError(f"token_bytes must be above 0 for the {tokens} tokens to evaluate on, got 0 bytes in all")
    loss = total / tokens
    bits_per_byte = loss / math.log(2) * (tokens / text_bytes)
    return Evaluation(loss, bits_per_byte, math.exp(min(loss, 700.0)), tokens, text_bytes)
