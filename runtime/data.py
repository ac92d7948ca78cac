"""Text as byte tokens: what is trained on, what is held out, and which tokens a step sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

END_OF_TEXT = 256
HELD_OUT_SHARE = 0.05
IGNORE = -100  # a target that no loss counts

_CORPUS = Path(__file__).parent / "corpus"
_NAMED = {
    "austen": (
        ("austen/emma.txt", "austen/persuasion.txt", "austen/sense-and-sensibility.txt"),
        ("austen/alice-in-wonderland.txt",),
    )
}


class Batch(NamedTuple):
    """Inputs [B,S] and the tokens that follow them [B,S]; targets of IGNORE are not counted."""

    inputs_BS: Tensor
    targets_BS: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents as byte tokens (uint8 tensors), split into parts."""

    name: str
    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    """The last 5 % of each document."""
    out_of_domain: tuple[Tensor, ...]
    """Documents of another source; empty for one's own text."""
    sha256: str
    """Of all documents, in order."""

    def train_stream(self) -> Tensor:
        """All training documents as one stream of tokens, int16, with an end-of-text token before each."""
        return torch.cat([_with_end_of_text(document) for document in self.train])


def load_corpus(data: str) -> Corpus:
    """Read "austen" (in the package), a text file, or every `*.txt` of a folder.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without *.txt.
        ValueError: a file is empty.
    """
    if data in _NAMED:
        in_domain, outside = ([_CORPUS / name for name in names] for names in _NAMED[data])
        return _split(data, in_domain, outside)
    path = Path(data)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"data: the folder {path} holds no *.txt file")
        return _split(str(path), files, [])
    if not path.is_file():
        raise FileNotFoundError(f"data must be {', '.join(_NAMED)}, a text file or a folder of *.txt, got {data!r}")
    return _split(str(path), [path], [])


def _split(name: str, files: list[Path], outside: list[Path]) -> Corpus:
    documents = [_read(path) for path in files]
    others = [_read(path) for path in outside]
    cuts = [len(document) - max(1, int(len(document) * HELD_OUT_SHARE)) for document in documents]
    digest = hashlib.sha256(b"".join(document.numpy().tobytes() for document in documents + others))
    return Corpus(
        name=name,
        train=tuple(document[:cut] for document, cut in zip(documents, cuts, strict=True)),
        held_out=tuple(document[cut:] for document, cut in zip(documents, cuts, strict=True)),
        out_of_domain=tuple(others),
        sha256=digest.hexdigest(),
    )


def _read(path: Path) -> Tensor:
    text = bytearray(path.read_bytes())
    if not text:
        raise ValueError(f"data: {path} is empty")
    return torch.frombuffer(text, dtype=torch.uint8)


def _with_end_of_text(document: Tensor) -> Tensor:
    return torch.cat([torch.tensor([END_OF_TEXT], dtype=torch.int16), document.to(torch.int16)])


def training_batch(stream: Tensor, *, step: int, seed: int, batch_size: int, sequence_length: int) -> Batch:
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
    documents: tuple[Tensor, ...], *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Every byte of the documents (or the first `max_tokens`, spread evenly over them) as a target exactly once.

    Windows do not overlap: the first token of a window is predicted from the token before it alone. All batches have
    the same shape; what is missing in the last ones is filled with targets of IGNORE.
    """
    windows = []
    share = None if max_tokens is None else max(1, max_tokens // len(documents))
    for document in documents:
        stream = _with_end_of_text(document[:share]).long()
        for start in range(0, len(stream) - 1, sequence_length):
            windows.append(stream[start : start + sequence_length + 1])
    for first in range(0, len(windows), batch_size):
        inputs = torch.full((batch_size, sequence_length), END_OF_TEXT)
        targets = torch.full((batch_size, sequence_length), IGNORE)
        for row, window in enumerate(windows[first : first + batch_size]):
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield Batch(inputs, targets)
