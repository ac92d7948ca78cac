"""Which module of the model a path names: what rows of different engines have in common.

The modules are `embedding`, `blocks.{i}.attention_norm|attention|mlp_norm|mlp`, `memories.{j}` and its stages, `norm`,
`head`; `model` stands for what lies between them (mask, positions, residual additions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ultramem.runtime.profile.arithmetic import ALL_STAGES

BETWEEN = "model"
COLLECTIVES = "_c10d_functional"
"""In the names of operators that talk to other ranks: they are the stage "exchange", whichever module calls them."""

# A table is a layer's own or the model's, and its time is part of the lookup that calls it.
TABLE = re.compile(r"(?:^|\.)table(?=\.|$)")
# Where the stages are in the model: the module's path, behind any prefix that a wrapper adds.
_STAGES = (
    (re.compile(r"(?:^|\.)memories\.\d+\.(query|score|select|lookup|exchange|expand)(?=\.|$)"), None),
    (TABLE, "lookup"),
    (re.compile(r"(?:^|\.)blocks\.\d+\.(attention|mlp)(?=\.|$)"), None),
    (re.compile(r"(?:^|\.)head(?=\.|$)"), "head"),
    (re.compile(r"(?:^|\.)(?:blocks\.\d+\.(?:attention_norm|mlp_norm)|norm|embedding)(?=\.|$)"), "other"),
)
_MODULE = re.compile(
    r"(?:^|\.)(embedding|norm|head|blocks\.\d+\.(?:attention|mlp)(?:_norm)?"
    r"|memories\.\d+(?:\.(?:query|score|select|lookup|exchange|expand))?)(?=\.|$)"
)
_INDEXED = re.compile(r"\[['\"]?(\w+)['\"]?\]")


def stage_of_path(path: str) -> str | None:
    """The stage that the module at `path` belongs to; None if it belongs to none."""
    for pattern, stage in _STAGES:
        match = pattern.search(path)
        if match:
            return stage or match.group(1)
    return None


def module_of_path(path: str) -> str | None:
    """The module of the list above that `path` is, or is inside of; None if there is none.

    Takes the spellings of tracers too: "L['self'].blocks[0].mlp", "L['m']._modules['blocks']._modules['0'].mlp".
    """
    match = _MODULE.search(_INDEXED.sub(r".\1", path).replace("._modules.", "."))
    return match.group(1) if match else None


def module_of_stack(paths: Sequence[str]) -> str:
    """The innermost module of a stack of calls, outermost first; a table's is whoever called it."""
    for path in reversed(paths):
        if not TABLE.search(path) and (module := module_of_path(path)) is not None:
            return module
    return BETWEEN


def stage_of_module(module: str) -> str:
    """The stage of a module of the list above; "other" for what lies between."""
    return stage_of_path(module) or "other"


def in_order(stages: Iterable[str]) -> tuple[str, ...]:
    """Each stage once, in the order in which the model runs them."""
    return tuple(sorted(set(stages), key=ALL_STAGES.index))
