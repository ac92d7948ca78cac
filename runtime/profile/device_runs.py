"""A forward on a GPU as a `Run`: each node has the time of what it launched on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ultramem.runtime.profile.device_calls import Activity, DeviceCall
from ultramem.runtime.profile.device_cost import HostCost, earlier_without
from ultramem.runtime.profile.modules import BETWEEN, stage_of_module
from ultramem.runtime.profile.stages import NodeTime, Run


def device_run(call: DeviceCall, owners: Mapping[int, NodeTime], cost: HostCost) -> Run:
    """A node's own time is what its activities add to the time that the device is busy.

    Where streams run side by side, the time that two activities share is that of the one that began first: all nodes
    together take as long as the device is busy. A node's span is from the start of its first activity to the end of the
    last, whatever else runs meanwhile. The device runs nothing in what is outside of the nodes.

    Args:
        call: the forward.
        owners: by the place of an activity, the node that launched it; what nobody owns is the engine's own.
        cost: of the profiler, taken off as far as the forward was longer for it.
    """
    earlier = earlier_without(cost, call)
    own_us = added_us(call.activities)
    names: Counter[str] = Counter()
    nodes: dict[str, NodeTime] = {}
    for place, activity in enumerate(call.activities):
        owner = owners.get(place) or activity_node(activity, BETWEEN, names)
        start_us = activity.start_us - earlier.starts_us[place]
        node = nodes.get(owner.node, owner._replace(start_us=start_us, time_us=0.0, span_us=0.0, calls=0))
        nodes[owner.node] = node._replace(
            time_us=node.time_us + own_us[place],
            span_us=max(node.span_us, start_us + activity.time_us - node.start_us),
            calls=node.calls + 1,
        )
    return Run(call.wall_us, tuple(nodes.values()), earlier.end_us)


def activity_node(activity: Activity, module: str, names: Counter[str]) -> NodeTime:
    """A node of the activity alone, numbered among `names`: no operator launched it."""
    name = f"{module}/{activity.name}"
    names[name] += 1
    number = f" {names[name]}" if names[name] > 1 else ""
    return NodeTime(name + number, activity.name, (module,), (stage_of_module(module),), 0.0, 0.0, 0.0)


def added_us(activities: Sequence[Activity]) -> list[float]:
    """What each adds to the time that the device is busy, in the order of their starts."""
    found = []
    busy_until_us = 0.0
    for activity in activities:
        found.append(max(0.0, activity.end_us - max(activity.start_us, busy_until_us)))
        busy_until_us = max(busy_until_us, activity.end_us)
    return found
