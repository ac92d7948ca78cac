"""Whole requests: a prompt, its first token, and the tokens after it, while the cache grows.

Shapes: B sequences, S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem.machine import synchronize
from ultramem.runtime.profile.compile_counts import compile_counts
from ultramem.runtime.profile.in_step import agreed
from ultramem.runtime.profile.measure import Engine, percentile
from ultramem.runtime.profile.memory_watch import MemoryWatch
from ultramem.runtime.profile.request_schema import Request


class TimedRequest(NamedTuple):
    """When the tokens of one request came."""

    ttft_us: float
    """From the start to the first token."""
    gaps_us: tuple[float, ...]
    """From each token to the next."""

    @property
    def tpot_us(self) -> float:
        return statistics.fmean(self.gaps_us)

    @property
    def total_us(self) -> float:
        return self.ttft_us + sum(self.gaps_us)


@dataclass(slots=True)
class RequestSamples:
    """All that was measured of one engine at one batch."""

    rounds: list[list[TimedRequest]] = field(default_factory=list)
    recompiles: int = 0
    watch: MemoryWatch | None = None


def run_request(engine: Engine, prompt_BS: Tensor, *, new_tokens: int, device: torch.device) -> TimedRequest:
    """Generate `new_tokens` greedily; of equal logits the lowest token."""
    synchronize(device)
    stamps_ns = [time.perf_counter_ns()]
    logits_BSV, cache = engine.prefill(prompt_BS)
    token_B1 = _pick(logits_BSV)
    stamps_ns.append(time.perf_counter_ns())
    for _ in range(new_tokens - 1):
        logits_BSV, cache = engine.decode(token_B1, cache)
        token_B1 = _pick(logits_BSV)
        stamps_ns.append(time.perf_counter_ns())
    ttft_us, *gaps_us = ((end - start) / 1e3 for start, end in itertools.pairwise(stamps_ns))
    return TimedRequest(ttft_us, tuple(gaps_us))


def _pick(logits_BSV: Tensor) -> Tensor:
    """The likeliest next token [B,1], on the CPU: whoever waits for it has it."""
    return logits_BSV[:, -1].argmax(-1, keepdim=True).cpu()


@torch.no_grad()
def measure_requests(
    engines: Sequence[Engine],
    prompt_BS: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    seconds_per_cell: float,
    device: torch.device,
) -> list[RequestSamples]:
    """Requests of one batch, engine after engine in each round; at least one an engine and round.

    Memory and page faults are those of one more request, whose time does not count.
    """
    found = [RequestSamples() for _ in engines]
    for engine, samples in zip(engines, found, strict=True):
        before = compile_counts()
        run_request(engine, prompt_BS, new_tokens=new_tokens, device=device)  # the warm-up
        samples.recompiles += compile_counts().since(before).graphs
    for _ in range(rounds):
        for engine, samples in zip(engines, found, strict=True):
            before = compile_counts()
            requests: list[TimedRequest] = []
            end = time.perf_counter() + seconds_per_cell / rounds
            while agreed(not requests or time.perf_counter() < end):
                requests.append(run_request(engine, prompt_BS, new_tokens=new_tokens, device=device))
            samples.rounds.append(requests)
            samples.recompiles += compile_counts().since(before).graphs
    for engine, samples in zip(engines, found, strict=True):
        with MemoryWatch(device) as samples.watch:
            run_request(engine, prompt_BS, new_tokens=new_tokens, device=device)
    return found


def request_record(
    engine: str,
    prompt_BS: Tensor,
    samples: RequestSamples,
    *,
    launches_per_step: int | None,
    max_abs_difference: float,
) -> Request:
    """The figures of one engine at one batch."""
    timed = [request for requests in samples.rounds for request in requests]
    gaps_us = [gap for request in timed for gap in request.gaps_us]
    batch, prompt_tokens = prompt_BS.shape
    new_tokens = 1 + len(timed[0].gaps_us)
    watch = samples.watch
    assert watch is not None, "requests were measured without their memory"
    return Request(
        engine=engine,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=len(timed),
        ttft_us=statistics.median(request.ttft_us for request in timed),
        ttft_p90_us=percentile([request.ttft_us for request in timed], 0.9),
        tpot_us=statistics.median(request.tpot_us for request in timed),
        tokens_per_second=batch * new_tokens / statistics.median(request.total_us for request in timed) * 1e6,
        gap_p50_us=percentile(gaps_us, 0.5),
        gap_p90_us=percentile(gaps_us, 0.9),
        gap_p99_us=percentile(gaps_us, 0.99),
        gaps=len(gaps_us),
        round_ttft_us=tuple(statistics.median(each.ttft_us for each in requests) for requests in samples.rounds),
        round_tpot_us=tuple(statistics.median(each.tpot_us for each in requests) for requests in samples.rounds),
        launches_per_step=launches_per_step,
        recompiles=samples.recompiles,
        memory_bytes=watch.memory_bytes,
        memory_method=watch.method,
        minor_faults=watch.minor_faults,
        major_faults=watch.major_faults,
        max_abs_difference=max_abs_difference,
    )
