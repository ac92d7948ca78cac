"""Which tokens a step trains on, and every token of a text once for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.runtime.data.documents import Documents, Stream
from ultramem.runtime.tokenizer import END_OF_TEXT

IGNORE = -100  # a target that no loss counts


class Batch(NamedTuple):
    """Inputs [B,S] and the tokens that follow them [B,S], int64; targets of IGNORE are not counted."""

    inputs_BS: Tensor
    targets_BS: Tensor


def training_batch(stream: Tensor | Stream, *, step: int, seed: int, batch_size: int, sequence_length: int) -> Batch:
    """The batch of a step: random windows of the stream, a function of (seed, step) alone, so that resuming is exact.

    Raises:
        ValueError: the stream is shorter than one sequence and the token after it.
    """
    starts = len(stream) - sequence_length
    if starts < 1:
        raise ValueError(
            f"data must hold at least sequence_length + 1 = {sequence_length + 1} tokens to train on, got {len(stream)}"
        )
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    start_B = torch.randint(0, starts, (batch_size,), generator=generator)
    window_BS = stream[start_B.unsqueeze(1) + torch.arange(sequence_length + 1)].long()
    return Batch(window_BS[:, :-1], window_BS[:, 1:])


def step_seed(seed: int, step: int) -> int:
    """A seed for one step, well spread over 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def evaluation_batches(
    documents: Sequence[Tensor], *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Every token of the documents (or about the first `max_tokens`, spread evenly over them) as a target exactly once.

    Windows do not overlap: the first token of a window is predicted from the token before it alone, that of a document
    from an end-of-text token. All batches have the same shape; what is missing in the last ones is filled with targets
    of IGNORE. Documents without a tokenizer of their own (a plain tuple) are bytes.

    With more documents than `max_tokens` has sequences, as many documents as sequences are taken, at even distances.
    """
    end_of_text = documents.end_of_text if isinstance(documents, Documents) else END_OF_TEXT
    windows = _windows(documents, end_of_text, sequence_length, max_tokens)
    while rows := list(islice(windows, batch_size)):
        inputs = torch.full((batch_size, sequence_length), end_of_text)
        targets = torch.full((batch_size, sequence_length), IGNORE)
        for row, window in enumerate(rows):
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield Batch(inputs, targets)


def _windows(
    documents: Sequence[Tensor], end_of_text: int, sequence_length: int, max_tokens: int | None
) -> Iterator[Tensor]:
    """Up to sequence_length + 1 tokens at a time, int64; the first is not a target."""
    chosen, share = range(len(documents)), None
    if max_tokens is not None and len(documents):
        share = max(1, max_tokens // len(documents))
        count = max(1, max_tokens // sequence_length)
        if share < sequence_length and count < len(documents):
            share = sequence_length
            chosen = [index * len(documents) // count for index in range(count)]  # type: ignore[assignment]  # ints too
    for index in chosen:
        document = documents[index][:share]
        before = torch.tensor([end_of_text])
        for start in range(0, len(document), sequence_length):
            window = document[start : start + sequence_length].long()
            yield torch.cat([before, window])
            before = window[-1:]
