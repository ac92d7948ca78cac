"""The ONNX file as TensorRT's parser is given it: which node takes its plugin, which its body.

The file on disk is the one for everybody. In memory, selections that the plugin serves get the plugin's name and its
two outputs of scratch memory, and nodes that no plugin serves lose the attributes by which the parser would look for
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ultramem.export.extras import require
from ultramem.export.onnx_functions import DOMAIN
from ultramem.export.tensorrt_plugins import PLUGINS, SCRATCH_SUFFIX
from ultramem.ops.triton.select import fits_one_launch

MOST_INT = 2**31  # the parser was seen to hand integers of a node to plugins in 32 bits
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")


class Prepared(NamedTuple):
    """A serialized model, and how its nodes of this package are to be run."""

    model: bytes
    plugin_nodes: int
    body_nodes: int


def prepare(file: Path, *, plugins: bool = True) -> Prepared:
    """The model of an ONNX file for TensorRT's parser; external data stays where it is.

    Without `plugins` every node runs by its body, also in a process that has our plugins registered.
    """
    onnx = require("onnx", "onnx")
    model = onnx.load(str(file), load_external_data=False)
    sides = _sides(model)
    served = bodies = 0
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        name = _plugin_of(onnx, node, sides) if plugins else None
        if name is None:
            _forget_plugin(node)
            bodies += 1
            continue
        served += 1
        if name != node.op_type:
            node.op_type = name
            node.output.extend(f"{node.output[0]}/{each}" for each in ("found", "chosen"))
    return Prepared(model.SerializeToString(), served, bodies)


def _plugin_of(onnx: Any, node: Any, sides: dict[str, int]) -> str | None:
    """Name of the plugin that serves the node; None: its body does."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    names = {each.name for each in PLUGINS}
    if node.op_type in ("ProductTopK", "TuckerTopK"):
        side = sides.get(node.input[0])
        fits = side is not None and attributes["k"] <= side and fits_one_launch(side, attributes["k"])
        return f"{node.op_type}{SCRATCH_SUFFIX}" if fits else None
    if node.op_type == "PermuteAddresses" and max(attributes["size"], abs(attributes["seed"])) >= MOST_INT:
        return None
    if attributes.get("bits", 8) != 8:
        return None
    return node.op_type if node.op_type in names else None


def _sides(model: Any) -> dict[str, int]:
    """Last size of each value of the graph that has a fixed one."""
    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        if sizes and sizes[-1].HasField("dim_value"):
            found[value.name] = int(sizes[-1].dim_value)
    return found


def _forget_plugin(node: Any) -> None:
    kept = [each for each in node.attribute if each.name not in PLUGIN_ATTRIBUTES]
    del node.attribute[:]
    node.attribute.extend(kept)
