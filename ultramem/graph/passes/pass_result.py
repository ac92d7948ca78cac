"""What every pass returns."""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import GraphModule


class PassResult(NamedTuple):
    """The rewritten graph (the same object, changed in place) and whether anything changed."""

    gm: GraphModule
    modified: bool


def finish(gm: GraphModule, modified: bool) -> PassResult:
    """Drop what nothing reads any more, check the graph and recompile it."""
    if modified:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
