"""From nodes to stages: which part of the model a node of an exported file, or of ONNX Runtime's own graph, belongs to.

Stages: `blocks.{i}.attention|mlp` (each with the norm before it), `memories.{j}.query|score|select|lookup|expand`,
`embedding`, `norm`, `head`, and `model` for what stands between them (mask, positions, residual additions).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ultramem.export.extras import require

OTHER_STAGE = "model"

_MODULE = re.compile(
    r"(?:model\.)?(embedding|norm|head|blocks\.\d+\.(?:attention|mlp)|memories\.\d+)(?:_norm)?"
    r"(\.query|\.score|\.select|\.lookup|\.expand)?(?=\.|$)"
)
_STAGE_OF_OP = {
    "LookupDot": "lookup",
    "LookupReduce": "lookup",
    "LookupReduceQuantized": "lookup",
    "PermuteAddresses": "lookup",
    "ProductTopK": "select",
    "TuckerTopK": "select",
}
_INLINED = re.compile(rf"_inlfunc_({'|'.join(_STAGE_OF_OP)})_")


def stage_of_module(path: str) -> str:
    """The stage that a module path such as `model.memories.0.query.proj` belongs to."""
    found = _MODULE.match(path)
    if found is None:
        return OTHER_STAGE
    part, stage = found.groups()
    if part.startswith("memories."):  # the layer itself only reshapes, before and after its last product
        return part + (stage or ".expand")
    return part


def stage_of_node(name: str) -> str | None:
    """The stage in the name of a node of an exported file, `<stage>/<name>`; None if the name holds none."""
    stage, slash, _ = name.partition("/")
    return stage if slash and (stage == OTHER_STAGE or _MODULE.fullmatch(stage)) else None


def stages_of_optimized_model(path: str | Path) -> dict[str, str]:
    """The stage of each node, by name, of the graph that ONNX Runtime really runs.

    Write that graph by `SessionOptions.optimized_model_filepath`. Nodes that come out of a function body are named
    `_inlfunc_<op>_...` there, and fused nodes may have any name: both belong to the layer of their neighbours.
    """
    onnx = require("onnx", "onnx")
    nodes = list(onnx.load(str(path), load_external_data=False).graph.node)
    neighbours = _neighbours(nodes)
    stages: list[str | None] = [stage_of_node(node.name) for node in nodes]
    changed = True
    while changed:  # each round names at least one more node
        changed = False
        for index, node in enumerate(nodes):
            if stages[index] is not None:
                continue
            near = [stage for stage in (stages[each] for each in neighbours[index]) if stage is not None]
            inlined = _INLINED.match(node.name)
            if inlined:
                layers = [stage.rpartition(".")[0] for stage in near if stage.startswith("memories.")]
                stages[index] = f"{layers[0]}.{_STAGE_OF_OP[inlined[1]]}" if layers else None
            else:
                stages[index] = next((stage for stage in near if stage != OTHER_STAGE), near[0] if near else None)
            changed = changed or stages[index] is not None
    return {node.name: stage or OTHER_STAGE for node, stage in zip(nodes, stages, strict=True)}


def _neighbours(nodes: list[Any]) -> list[list[int]]:
    """Producers of each node's inputs, then readers of its outputs."""
    producer = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    near: list[list[int]] = [[producer[value] for value in node.input if value in producer] for node in nodes]
    for index, node in enumerate(nodes):
        for value in node.input:
            if value in producer:
                near[producer[value]].append(index)
    return near
