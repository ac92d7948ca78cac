"""A graph of ONNX Runtime with stamps behind its nodes, and the times that stamps tell.

ONNX Runtime's own profiler writes a record of several microseconds into the time of each node: more than a node of a
decode step takes. A stamp (`ops/native/onnx/stamps.h`) hands its tensor on and notes when it was entered and left. What
lies between one stamp and the next is the node between them, with the runtime's dispatch of it, and the dispatch of the
stamp. The latter is measured in the same runs: where a stamp follows a stamp, nothing else lies between.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DOMAIN = "ultramem"
PAIR_EVERY = 8
"""Nodes to one that has a second stamp behind the first."""
_ENTRY = "UltramemStampsTo"
_UNSTAMPED = "/unstamped"


class Stamp(NamedTuple):
    """When one stamp was passed, on the clock of `time.perf_counter_ns`."""

    place: int
    """Of the node that it stands behind, in the list that `add_stamps` gives."""
    entered_ns: int
    left_ns: int


class Interval(NamedTuple):
    """A node, from the stamp before it to its own."""

    place: int
    start_ns: int
    time_ns: float
    """The dispatch of the stamp behind it taken off."""
    stamps_before_ns: float
    """What the stamps before it took, with their dispatch."""


class StampedRun(NamedTuple):
    """The nodes of one run of a stamped graph, in the order in which they ran."""

    intervals: tuple[Interval, ...]
    stamps_ns: float
    """What the stamps took in all, with their dispatch."""


def add_stamps(graph: Any, chosen: Collection[int] | None = None) -> list[Any]:
    """Put stamps behind nodes of an `onnx.GraphProto`, and behind the inputs of tokens and masks.

    Args:
        graph: changed in place.
        chosen: places of the nodes; None: all.

    Returns:
        The node of each place; None for an input.
    """
    from onnx import helper

    taken = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = list(graph.node)
    places: list[Any] = []
    stamps: list[Any] = []

    def stamp(source: str, target: str) -> None:
        stamps.append(helper.make_node("Stamp", [source], [target], f"stamp {len(stamps)}", domain=DOMAIN))
        stamps[-1].attribute.append(helper.make_attribute("place", len(places) - 1))

    renamed: dict[str, str] = {}
    for each in graph.input:
        if "." not in each.name:  # caches are large, and would be copied
            places.append(None)
            stamp(each.name, f"{each.name}/first stamp")
            renamed[each.name] = f"{each.name}/stamped"
            stamp(f"{each.name}/first stamp", renamed[each.name])
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for node in kept:
        places.append(node)
        if chosen is not None and len(places) - 1 not in chosen:
            continue
        for index, name in enumerate(node.output):
            if name and name in taken:
                node.output[index] = name + _UNSTAMPED
                if len(places) % PAIR_EVERY == 0:
                    stamp(node.output[index], f"{name}/first stamp")
                    stamp(f"{name}/first stamp", name)
                else:
                    stamp(node.output[index], name)
    del graph.node[:]
    graph.node.extend([*kept, *stamps])  # ONNX Runtime sorts them
    return places


@contextlib.contextmanager
def stamps_of(library: Path, capacity: int) -> Iterator[Callable[[], list[Stamp]]]:
    """Take the stamps of the plugin library; yields a function that gives those since its last call."""
    stamps_to = getattr(ctypes.CDLL(str(library)), _ENTRY)
    stamps_to.restype = ctypes.c_size_t
    stamps_to.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    record = np.zeros((capacity, 3), dtype=np.int64)
    stamps_to(record.ctypes.data, capacity)

    def take() -> list[Stamp]:
        count = stamps_to(record.ctypes.data, capacity)
        if count > capacity:
            raise RuntimeError(f"a run has {count} stamps, room was made for {capacity}")
        return [Stamp(*row) for row in record[:count].tolist()]

    try:
        yield take
    finally:
        stamps_to(None, 0)


def stamped_runs(runs: Sequence[Sequence[Stamp]]) -> list[StampedRun]:
    """The nodes of each run. What a stamp's dispatch takes is the median over all of the runs."""
    alone_ns = [
        stamp.entered_ns - before.left_ns
        for stamps in runs
        for before, stamp in itertools.pairwise(stamps)
        if stamp.place == before.place
    ]
    dispatch_ns = statistics.median(alone_ns) if alone_ns else 0.0
    return [_stamped_run(stamps, dispatch_ns) for stamps in runs]


def _stamped_run(stamps: Sequence[Stamp], dispatch_ns: float) -> StampedRun:
    """The first stamp has nothing before it: what is there belongs to the start of the run."""
    intervals: list[Interval] = []
    seen = set[int]()
    spent_ns, left_ns = 0.0, None
    for stamp in stamps:
        if stamp.place not in seen and left_ns is not None:
            time_ns = max(0.0, stamp.entered_ns - left_ns - dispatch_ns)
            intervals.append(Interval(stamp.place, left_ns, time_ns, spent_ns))
        seen.add(stamp.place)
        left_ns = stamp.left_ns
        spent_ns += stamp.left_ns - stamp.entered_ns + dispatch_ns
    return StampedRun(tuple(intervals), spent_ns)
