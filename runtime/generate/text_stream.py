"""Text of tokens as they come: whole characters alone, and nothing of a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ultramem.runtime.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into pieces of text.

    Text that may be the beginning of a stop text is held back until the next token decides.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is sure after this token; `stopped` says whether a stop text was met."""
        return self._advance(self._decoder.decode(self._pieces[token]), final=False)

    def finish(self) -> str:
        """What was held back, where no more tokens come."""
        return self._advance(self._decoder.decode(b"", final=True), final=True)

    def _advance(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
