"""Two instruments as one: one that costs little says how long a module takes, one that costs much how that divides.

A timer around each of thirty modules disturbs a forward little. What tells its hundreds of operators apart takes as
long as they do: of it, shares are taken and not times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from ultramem.runtime.profile.stages import NodeTime, Run, faster_half


def divided(timed: Sequence[Run], detailed: Sequence[Run]) -> list[Run]:
    """The detailed runs at the pace of the timed ones, module by module.

    A module's nodes add up to its time in the timed runs. What those leave, nodes of modules that they do not have and
    what is outside of all nodes, has a pace of its own, so that the whole adds up to them too.
    """
    timed_us = _module_times(timed, {node.modules[0] for run in timed for node in run.nodes})
    detailed_us = _module_times(detailed, timed_us)
    sum_us = faster_half([run.sum_us for run in timed])
    instrument_us = faster_half([run.wall_us for run in timed]) - sum_us
    whole_us = faster_half([run.sum_us for run in detailed])
    rest_us = max(0.0, sum_us - sum(timed_us.values()))
    # A module whose nodes are all too short for the detailed instrument has none to divide among.
    paces = {module: time_us / detailed_us[module] for module, time_us in timed_us.items() if detailed_us[module]}
    rest = rest_us / (whole_us - sum(detailed_us.values()))
    return [_at_pace(run, paces, rest, instrument_us) for run in detailed]


def _module_times(runs: Sequence[Run], modules: Collection[str]) -> dict[str, float]:
    """Of each of the modules: the mean over the faster half of the runs."""
    by_speed = sorted(runs, key=lambda run: run.sum_us)
    kept = by_speed[: (len(runs) + 1) // 2]
    found: dict[str, float] = defaultdict(float)
    for run in kept:
        for node in run.nodes:
            if node.modules[0] in modules:
                found[node.modules[0]] += node.time_us / len(kept)
    return found


def _at_pace(run: Run, paces: Mapping[str, float], rest: float, instrument_us: float) -> Run:
    moved: dict[int, NodeTime] = {}
    end_us = moved_end_us = float("-inf")
    for place, node in sorted(enumerate(run.nodes), key=lambda each: (each[1].start_us, -each[1].span_us)):
        pace = paces.get(node.modules[0], rest)
        if node.start_us >= end_us:  # after all before it, at a distance that has the pace of the rest
            gap_us = node.start_us - max(end_us, 0.0)
            start_us = max(moved_end_us, 0.0) + gap_us * rest
            end_us, moved_end_us = node.start_us + node.span_us, start_us + node.span_us * pace
        else:  # inside of another
            start_us = moved_end_us - (end_us - node.start_us) * pace
        moved[place] = node._replace(start_us=start_us, time_us=node.time_us * pace, span_us=node.span_us * pace)
    nodes = tuple(moved[place] for place in range(len(run.nodes)))
    in_nodes_us = sum(node.time_us for node in run.nodes)
    sum_us = sum(node.time_us for node in nodes) + (run.sum_us - in_nodes_us) * rest
    return Run(sum_us + instrument_us, nodes, instrument_us)
