"""Bytes and FLOPs of ONNX Runtime's nodes, from the shapes that its own profiler writes down.

Weights that a kernel repacks are missing there, so that the session that is profiled repacks none.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ultramem.runtime.profile.operator_work import Operand, Work, operand, operator_work

NO_REPACKING = ("session.disable_prepacking", "1")
"""Entry of a session's configuration."""
_EVENT = "_kernel_time"
_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "float": 4, "int32": 4, "uint32": 4, "double": 8, "int64": 8, "uint64": 8,
}  # fmt: skip


class _Event(NamedTuple):
    node: str
    start: int
    work: Work


def onnx_work(profile: Path, nodes: Iterable[Any]) -> dict[str, Work]:
    """Work of each node by its name.

    Args:
        profile: the file that ONNX Runtime wrote of one run.
        nodes: of the graph, as `onnx.NodeProto`. A loop's work is that of its turns.
    """
    graph = {node.name: node for node in nodes}
    events = _events(json.loads(profile.read_text()), graph)
    found: dict[str, Work] = {}
    own = sorted((event for event in events if event.node in graph), key=lambda event: event.start)
    starts = [event.start for event in own]
    for event in events:
        name = event.node if event.node in graph else own[bisect.bisect_right(starts, event.start) - 1].node
        found[name] = found[name] + event.work if name in found else event.work
    return found


def _events(records: Sequence[Mapping[str, Any]], graph: Mapping[str, Any]) -> list[_Event]:
    events = []
    for record in records:
        if record.get("cat") != "Node" or not record["name"].endswith(_EVENT):
            continue
        name, told = record["name"].removesuffix(_EVENT), record["args"]
        inputs, outputs = (_operands(told[f"{side}_type_shape"]) for side in ("input", "output"))
        is_body = told["op_name"] in ("Loop", "If", "Scan")
        work = Work(0, 0) if is_body else operator_work(told["op_name"], inputs, outputs, _arguments(graph.get(name)))
        events.append(_Event(name, record["ts"], work))
    return events


def _operands(shapes: Iterable[Mapping[str, Sequence[int]]]) -> list[Operand]:
    return [operand(shape, _BYTES[kind]) for kind, shape in chain.from_iterable(each.items() for each in shapes)]


def _arguments(node: Any) -> dict[str, Any]:
    from onnx import helper

    if node is None:
        return {}
    values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
