"""Text from any engine: requests in, tokens and text out, one by one or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ultramem.runtime.engine import Engine
from ultramem.runtime.generate.generator import Generator
from ultramem.runtime.generate.request import Completion, Event, FinishReason, Request, check_request
from ultramem.runtime.tokenizer import END_OF_TEXT

__all__ = ["Completion", "Event", "FinishReason", "Generator", "Request", "check_request", "generate"]


def generate(
    engine: Engine,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_of_text: int = END_OF_TEXT,
) -> Iterator[int]:
    """New tokens of one prompt, one by one; ends before an end-of-text token. See `Request` for the arguments.

    Raises:
        ValueError: an argument is out of range, or the context would be too long.
    """
    generator = Generator(engine, end_of_text=end_of_text)
    generator.submit(
        Request(prompt=tuple(prompt), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    )
    return (event.token for event in generator.run() if event.token is not None)
