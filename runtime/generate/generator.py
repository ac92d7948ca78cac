"""Requests of different lengths on one engine: they join and leave the batch between two steps.

The batch is padded on the left. A request that joins is a prefill of its own, whose cache is then joined to that of the
batch; one that ends takes its row, and the columns that only it needed, along.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ultramem.runtime.distributed.ranks import ALONE, Ranks
from ultramem.runtime.engine import Engine
from ultramem.runtime.engine_cache import EngineCache, cache_bytes_per_token, join_caches, take_rows
from ultramem.runtime.generate.request import Completion, Event, FinishReason, Request, check_request
from ultramem.runtime.generate.sampling import Sampler
from ultramem.runtime.generate.text_stream import TextStream
from ultramem.runtime.tokenizer import Tokenizer


@dataclass(slots=True)
class _Row:
    """A request that is running."""

    request_id: int
    request: Request
    sampler: Sampler
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)

    @property
    def tokens_left(self) -> int:
        return self.request.max_new_tokens - len(self.tokens)


class Generator:
    """Continues any number of requests; `submit` some, then iterate over `run`, and submit or cancel meanwhile.

    Args:
        engine: what runs the model.
        tokenizer: for text and stop texts; None: tokens alone.
        end_of_text: the token that ends a continuation; None: that of the tokenizer, or none without one.
        max_batch: requests that run at a time; the others wait in order. An engine of a fixed batch has its own.
        max_cache_bytes: of keys and values of all that run, padding included; None: as memory lasts. While a step
            appends to them they are there twice.
        ranks: that run the model together, each with a generator of its own that is given the same requests in the same
            order. Tokens are those that the main rank picks; what one rank cancels ends on all.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer | None = None,
        end_of_text: int | None = None,
        max_batch: int = 8,
        max_cache_bytes: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if max_cache_bytes is not None and max_cache_bytes < 1:
            raise ValueError(f"max_cache_bytes must be at least 1 or None, got {max_cache_bytes}")
        if engine.new_tokens not in (None, 1):
            raise ValueError(
                f"the export must take single tokens to generate, its graph takes {engine.new_tokens} at a time"
            )
        self.engine = engine
        self.ranks = ranks
        self.tokenizer = tokenizer
        self.end_of_text = tokenizer.end_of_text if end_of_text is None and tokenizer is not None else end_of_text
        self.max_batch = max_batch if engine.batch is None else min(max_batch, engine.batch)
        self.max_cache_bytes = max_cache_bytes
        self._token_bytes = cache_bytes_per_token(engine.config, engine.cache_dtype)
        self._ids = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._cache: EngineCache | None = None
        self._logits_BV: Tensor | None = None
        self._cancelled: set[int] = set()
        self._events: deque[Event] = deque()

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. A request that is refused changes nothing.

        Raises:
            ValueError: it does not fit the model's positions, vocabulary or `max_cache_bytes`, or has stop texts
                where there is no tokenizer.
        """
        check_request(request, self.engine.config)
        if request.stop and self.tokenizer is None:
            raise ValueError("stop needs a tokenizer, the generator has none")
        needed = request.num_positions * self._token_bytes
        if self.max_cache_bytes is not None and needed > self.max_cache_bytes:
            raise ValueError(
                f"prompt and max_new_tokens must fit max_cache_bytes {self.max_cache_bytes:,}, got "
                f"{request.num_positions} tokens of {self._token_bytes:,} bytes: {needed:,}"
            )
        request_id = next(self._ids)
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, request.stop)
        self._waiting.append(_Row(request_id, request, Sampler(request), stream))
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request before its next token; one that has ended, or was never there, is left alone."""
        self._cancelled.add(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def run(self) -> Iterator[Event]:
        """Events of all requests, until there are none left. May be left and called again: it goes on."""
        while self._events or self._waiting or self._running:
            if not self._events:
                self._step()
            if self._events:
                yield self._events.popleft()

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Submit requests, run all there is, and return the continuations of these in their order.

        Events of others, submitted before, stay for `run`.

        Raises:
            ValueError: as `submit`; then none of them is queued.
        """
        before, self._waiting = self._waiting, deque(self._waiting)
        try:
            ids = [self.submit(request) for request in requests]
        except ValueError:
            self._waiting = before
            raise
        tokens: dict[int, list[int]] = {each: [] for each in ids}
        texts: dict[int, list[str]] = {each: [] for each in ids}
        reasons: dict[int, FinishReason] = {}
        others: list[Event] = []
        for event in self.run():
            if event.request_id not in tokens:
                others.append(event)
                continue
            texts[event.request_id].append(event.text)
            if event.token is not None:
                tokens[event.request_id].append(event.token)
            if event.finish_reason is not None:
                reasons[event.request_id] = event.finish_reason
        self._events.extend(others)
        return [
            Completion(tokens=tuple(tokens[each]), text="".join(texts[each]), finish_reason=reasons[each])
            for each in ids
        ]

    def _step(self) -> None:
        """One token for each request that runs, after those that wait have joined as far as there is room.

        Where the engine raises, the requests are as they were before its call.
        """
        with torch.inference_mode():
            self._drop_cancelled()
            self._admit()
            if not self._running:
                return
            if self._logits_BV is None:
                self._decode()
            assert self._logits_BV is not None
            picked = [row.sampler.pick(logits_V) for row, logits_V in zip(self._running, self._logits_BV, strict=True)]
            tokens = self.ranks.as_main_has(picked)  # machines may round differently, and then all must go one way
            events = [self._advance(row, token) for row, token in zip(self._running, tokens, strict=True)]
            self._events.extend(events)
            self._logits_BV = None
            self._keep([index for index, event in enumerate(events) if event.finish_reason is None])

    def _admit(self) -> None:
        """Prefill as many of those that wait as there is room for, together, and join them to the batch."""
        new: list[_Row] = []
        for row in self._waiting:
            if not self._fits([*self._running, *new, row]):
                break
            new.append(row)
        if not new:
            return
        # Those that run need the logits of their next token, too: all rows are then at the same point.
        if self._running and self._logits_BV is None:
            self._decode()
        logits_BV, cache = self._prefill([row.request.prompt for row in new])
        if self._cache is not None and self._logits_BV is not None:
            cache = join_caches(self.engine.config, [self._cache, cache])
            logits_BV = torch.cat([self._logits_BV, logits_BV])
        for _ in new:
            self._waiting.popleft()
        self._running, self._cache, self._logits_BV = [*self._running, *new], cache, logits_BV

    def _fits(self, rows: Sequence[_Row]) -> bool:
        if len(rows) > self.max_batch:
            return False
        if self.max_cache_bytes is None:
            return True
        columns = max(len(row.request.prompt) + len(row.tokens) for row in rows)
        columns += max(row.tokens_left for row in rows)
        return len(rows) == 1 or len(rows) * columns * self._token_bytes <= self.max_cache_bytes

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, EngineCache]:
        """Logits [B,V] after each prompt."""
        length = max(len(prompt) for prompt in prompts)
        # An engine of a fixed batch computes rows that nobody reads.
        filled = [*prompts, *([prompts[0]] * ((self.engine.batch or len(prompts)) - len(prompts)))]
        ids_BS = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in filled])
        mask_BS = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in filled])
        logits_BSV, cache = self.engine.prefill(ids_BS, mask_BS)
        if len(filled) > len(prompts):
            cache = take_rows(self.engine.config, cache, range(len(prompts)))
        return logits_BSV[: len(prompts), -1], cache

    def _decode(self) -> None:
        """Logits of the next token of every row."""
        assert self._cache is not None
        rows, cache = len(self._running), self._cache
        ids_B1 = torch.tensor([[row.tokens[-1]] for row in self._running])
        if self.engine.batch is not None and self.engine.batch > rows:
            filled = [*range(rows), *([0] * (self.engine.batch - rows))]
            ids_B1, cache = ids_B1[torch.tensor(filled)], take_rows(self.engine.config, cache, filled)
        logits_B1V, cache = self.engine.decode(ids_B1, cache)
        if cache.num_rows > rows:
            cache = take_rows(self.engine.config, cache, range(rows))
        self._cache, self._logits_BV = cache, logits_B1V[:rows, -1]

    def _advance(self, row: _Row, token: int) -> Event:
        """Give a row its next token, and say whether it was the last."""
        if token == self.end_of_text:
            return _end(row, None, "", "end_of_text")
        row.tokens.append(token)
        text = "" if row.stream is None else row.stream.push(token)
        if row.stream is not None and row.stream.stopped:
            return Event(row.request_id, token, text, "stop")
        if row.tokens_left == 0:
            return _end(row, token, text, "length")
        return Event(row.request_id, token, text, None)

    def _drop_cancelled(self) -> None:
        all_rows = [*self._running, *self._waiting]
        cancelled = self.ranks.largest([int(row.request_id in self._cancelled) for row in all_rows])
        rows = [row for row, is_cancelled in zip(all_rows, cancelled, strict=True) if is_cancelled]
        self._cancelled.clear()
        if not rows:
            return
        gone = {row.request_id for row in rows}
        self._waiting = deque(row for row in self._waiting if row.request_id not in gone)
        self._keep([index for index, row in enumerate(self._running) if row.request_id not in gone])
        self._events.extend(_end(row, None, "", "cancelled") for row in rows)

    def _keep(self, rows: list[int]) -> None:
        """Let all other rows of the batch go."""
        if len(rows) == len(self._running):
            return
        if not rows:
            self._running, self._cache, self._logits_BV = [], None, None
            return
        assert self._cache is not None
        self._cache = take_rows(self.engine.config, self._cache, rows)
        self._logits_BV = None if self._logits_BV is None else self._logits_BV[torch.tensor(rows)]
        self._running = [self._running[index] for index in rows]


def _end(row: _Row, token: int | None, text: str, reason: FinishReason) -> Event:
    """The last event of a row; what its text held back comes out, unless that completes a stop text."""
    if row.stream is not None:
        text += row.stream.finish()
        if row.stream.stopped:
            reason = "stop"
    return Event(row.request_id, token, text, reason)
