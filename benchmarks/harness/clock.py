"""Clocks: wall time on a CPU, and of what ends on the host; events, a flushed cache and CUDA graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contender import Contender
from benchmarks.harness.measure import Clock

FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H100
QUEUE_CYCLES = 2_000_000  # about a millisecond, in which the host launches all of a call
GRAPH_CALLS = 16  # in one CUDA graph, each with inputs of its own: what one launch of the graph costs is shared


class WallClock:
    """Wall time of a call. Inputs are drawn before the burst, results dropped between calls."""

    def how(self, contender: Contender) -> str:
        return "wall time"

    def burst(self, contender: Contender, calls: int) -> list[float]:
        inputs = [contender.draw() for _ in range(calls)]
        times = []
        for each in inputs:
            start = time.perf_counter_ns()
            result = contender.run(each)
            end = time.perf_counter_ns()
            del result
            times.append((end - start) / 1e3)
        return times


class GpuClock:
    """Time between two events on the stream, with the L2 cache flushed before each.

    In a CUDA graph, `GRAPH_CALLS` calls with inputs of their own follow each other after one flush, and the time is
    that of one of them. What a graph cannot hold is launched from Python while the device waits, so that the time is
    the device's; where a call itself waits for the device, what the host does after that counts.
    """

    def __init__(self, device: torch.device, *, graph: bool) -> None:
        self.graph = graph
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._graphs: dict[int, _CapturedCalls | str] = {}

    def how(self, contender: Contender) -> str:
        captured = self._captured(contender)
        return f"events, launched from Python{captured}" if isinstance(captured, str) else "events, in a CUDA graph"

    def burst(self, contender: Contender, calls: int) -> list[float]:
        captured = self._captured(contender)
        if isinstance(captured, str):
            return self._time(contender.draw, contender.run, calls)
        return [us / GRAPH_CALLS for us in self._time(captured.refresh, captured.replay, calls)]

    def _captured(self, contender: Contender) -> _CapturedCalls | str:
        """The graph of a contender, or why there is none."""
        if not (self.graph and contender.graphable):
            return ""
        if id(contender) not in self._graphs:
            try:
                self._graphs[id(contender)] = _CapturedCalls(contender)
            except RuntimeError as error:
                self._graphs[id(contender)] = f" ({str(error).splitlines()[0][:200]})"
        return self._graphs[id(contender)]

    def _time(self, draw: Callable[[], Any], run: Callable[[Any], Any], calls: int) -> list[float]:
        events = []
        for _ in range(calls):
            inputs = draw()
            self._flush.zero_()
            torch.cuda._sleep(QUEUE_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run(inputs)
            end.record()
            del result
            events.append((start, end))
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]


class _CapturedCalls:
    """A CUDA graph of calls on inputs that can be replaced by fresh ones."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.inputs = [contender.draw() for _ in range(GRAPH_CALLS)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for each in self.inputs[:2]:
                contender.run(each)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for each in self.inputs:
                contender.run(each)

    def refresh(self) -> None:
        for old, fresh in zip(self.inputs, (self.contender.draw() for _ in self.inputs), strict=True):
            for target, source in zip(_tensors(old), _tensors(fresh), strict=True):
                target.copy_(source)

    def replay(self, _: None) -> None:
        self.graph.replay()


def _tensors(inputs: Any) -> list[Tensor]:
    """The tensors of a call's inputs: one, or a tuple that may hold other things besides."""
    members = inputs if isinstance(inputs, tuple) else (inputs,)
    return [member for member in members if isinstance(member, Tensor)]


def clock_for(device: torch.device, *, graph: bool, wall: bool = False) -> Clock:
    return GpuClock(device, graph=graph) if device.type == "cuda" and not wall else WallClock()
