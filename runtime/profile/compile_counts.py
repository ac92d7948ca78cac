"""What torch.compile counts: graphs that it made, and breaks in them."""

from __future__ import annotations

import sys
from typing import NamedTuple


class CompileCounts(NamedTuple):
    """Since the process began."""

    graphs: int
    graph_breaks: int
    cached_graphs: int
    """Of the graphs, those that came compiled from the compiler's cache on disk."""

    def since(self, before: CompileCounts) -> CompileCounts:
        return CompileCounts(*(now - earlier for now, earlier in zip(self, before, strict=True)))


def compile_counts() -> CompileCounts:
    """Read TorchDynamo's counters; an engine that never compiles does not import it for that."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return CompileCounts(0, 0, 0)
    counters = utils.counters
    return CompileCounts(
        graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        # Two caches, one inside of the other.
        cached_graphs=max(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]),
    )
