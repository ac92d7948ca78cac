"""Which node launched what the device ran: of eager an operator, of a compiled graph one of its kernels.

What the host launches lies in the span of the operator or kernel. A replayed CUDA graph is launched as a whole: its
activities are those of the recording, in order, and which kernel launches which of them shows where the same graph runs
without being replayed.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ultramem.runtime.profile.device_calls import GRAPH_LAUNCH, DeviceCall, is_api
from ultramem.runtime.profile.device_runs import activity_node
from ultramem.runtime.profile.eager_stages import eager_runs
from ultramem.runtime.profile.inductor_kernels import Kernel
from ultramem.runtime.profile.inductor_stages import COMPILED_GRAPH, graph_of, kernel_node
from ultramem.runtime.profile.modules import BETWEEN
from ultramem.runtime.profile.profiled_calls import CALL, Span
from ultramem.runtime.profile.stage_turns import NotSeparableError
from ultramem.runtime.profile.stages import MODULE_KIND, NodeTime

Owners = dict[int, NodeTime]
"""By the place of an activity in its forward, the node that launched it; times of the node are not the device's."""
_PACKAGED = ("aoti_torch_", "kernels_.")
"""Names of an AOTInductor package's kernels."""


class Launches(NamedTuple):
    """What each kernel of a graph launches."""

    kernels: Sequence[Kernel]
    activities: tuple[tuple[str, ...], ...]
    """Of each kernel, names in the order of their launch."""


def eager_owners(call: DeviceCall) -> Owners:
    """The outermost operator of each activity; what a module launches itself, as a Triton kernel, is its own node."""
    (run,) = eager_runs([Span(CALL, 0.0, call.wall_us), *call.spans])
    modules = [node for node in run.nodes if node.kind == MODULE_KIND]
    operators = [node for node in run.nodes if node.kind != MODULE_KIND]
    names: Counter[str] = Counter()
    owners = {}
    for place, activity in enumerate(call.activities):
        launched_us = call.spans[activity.launch].start_us
        owner = _around(operators, launched_us)
        if owner is None:
            module = _around(modules, launched_us)
            owner = activity_node(activity, BETWEEN if module is None else module.modules[0], names)
        owners[place] = owner
    return owners


def kernel_owners(call: DeviceCall, graphs: Sequence[Sequence[Kernel]], launches: Callable[[], Launches]) -> Owners:
    """The kernel of a compiled graph, where one launched it; the engine's own copies have no owner.

    Args:
        call: the forward.
        graphs: of which it ran one.
        launches: those of the graph that it ran; asked for if the graph was replayed.

    Raises:
        NotSeparableError: what ran is not, one for one, what a graph launches.
    """
    replayed = [
        place for place, activity in enumerate(call.activities) if call.spans[activity.launch].name == GRAPH_LAUNCH
    ]
    if replayed:
        return _replayed_owners(call, replayed, launches())
    kernels, places = _launched(call, graphs)
    nodes = [kernel_node(index, kernel) for index, kernel in enumerate(kernels)]
    return {place: node for node, each in zip(nodes, places, strict=True) for place in each}


def kernel_launches(call: DeviceCall, graphs: Sequence[Sequence[Kernel]]) -> Launches:
    """What the kernels of the graph that `call` ran, without being replayed, launched.

    Raises:
        NotSeparableError: what ran is not, one for one, a graph of `graphs`.
    """
    kernels, places = _launched(call, graphs)
    by_launch = (sorted(each, key=lambda place: call.activities[place].launch) for each in places)
    return Launches(kernels, tuple(tuple(call.activities[place].name for place in each) for each in by_launch))


def _launched(call: DeviceCall, graphs: Sequence[Sequence[Kernel]]) -> tuple[Sequence[Kernel], list[list[int]]]:
    """The kernels that ran, and the places of what each launched."""
    spans = _kernel_spans(call)
    kernels = graph_of([span.name for span in spans], graphs)
    places: list[list[int]] = [[] for _ in kernels]
    starts_us = [span.start_us for span in spans]
    for place, activity in enumerate(call.activities):
        launched_us = call.spans[activity.launch].start_us
        index = bisect.bisect(starts_us, launched_us) - 1
        if index >= 0 and launched_us < spans[index].start_us + spans[index].time_us:
            places[index].append(place)
    return kernels, places


def _kernel_spans(call: DeviceCall) -> list[Span]:
    """The outermost spans in a compiled graph; AOTInductor, which has no span for a graph, has names of its own."""
    found = []
    graph_end = kernel_end = float("-inf")
    for span in call.spans:
        if span.name.startswith(COMPILED_GRAPH):
            graph_end = span.start_us + span.time_us
        elif (
            span.start_us >= kernel_end
            and (span.start_us < graph_end or span.name.startswith(_PACKAGED))
            and not is_api(span.name)
        ):
            kernel_end = span.start_us + span.time_us
            found.append(span)
    return found


def _replayed_owners(call: DeviceCall, replayed: Sequence[int], launches: Launches) -> Owners:
    expected = [
        (kernel_node(index, kernel), name)
        for index, (kernel, names) in enumerate(zip(launches.kernels, launches.activities, strict=True))
        for name in names
    ]
    if len(replayed) != len(expected):
        raise NotSeparableError(
            f"the replayed CUDA graph ran {len(replayed)} activities on the device, and without being replayed "
            f"{len(expected)}"
        )
    for place, (node, name) in zip(replayed, expected, strict=True):
        if call.activities[place].name != name:
            raise NotSeparableError(
                f"the replayed CUDA graph ran {call.activities[place].name!r} on the device where, without being "
                f"replayed, {node.node!r} runs {name!r}"
            )
    return {place: node for place, (node, _) in zip(replayed, expected, strict=True)}


def _around(nodes: Sequence[NodeTime], time_us: float) -> NodeTime | None:
    """The node that a time of the host lies in, of nodes that follow each other."""
    place = bisect.bisect(nodes, time_us, key=lambda node: node.start_us) - 1
    return nodes[place] if place >= 0 and time_us < nodes[place].start_us + nodes[place].span_us else None
