"""The fastest instrumented forward of every engine, batch and phase in the Trace Event Format.

chrome://tracing and Perfetto read it. A process is an engine, a thread one batch and phase, an event a node; each
forward begins at 0, so that engines lie below each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES = ("kind", "modules", "fx_nodes", "p50_us", "p90_us", "p99_us", "flops", "bytes")
"""Of a node, beside its event."""


def chrome_trace(document: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a profile (a document of `to_json`)."""
    names = list(dict.fromkeys(times["engine"] for times in document["stages"]))
    events: list[dict[str, Any]] = []
    for process, engine in enumerate(names, start=1):
        events.append(_name("process_name", engine, process, 0))
        of_engine = [times for times in document["stages"] if times["engine"] == engine]
        for thread, times in enumerate(of_engine, start=1):
            what = f"{times['phase']}, batch {times['batch']}"
            events.append(_name("thread_name", what, process, thread))
            whole = {
                "method": times["method"],
                "runs": times["runs"],
                "max_abs_difference": times["max_abs_difference"],
            }
            events.append(_complete(what, "forward", 0.0, times["fastest_us"], process, thread, whole))
            for node in times["nodes"]:
                if node["fastest_span_us"] == 0:  # it did not run in this one
                    continue
                figures = {name: node[name] for name in FIGURES}
                events.append(
                    _complete(
                        node["node"],
                        ",".join(node["stages"]),
                        node["fastest_start_us"],
                        node["fastest_span_us"],
                        process,
                        thread,
                        figures,
                    )
                )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"model": document["model"]["name"], "created": document["created"]},
    }


def _name(kind: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _complete(
    name: str, category: str, start_us: float, span_us: float, process: int, thread: int, args: Mapping[str, Any]
) -> dict[str, Any]:
    """An event with a start and a duration, both in microseconds."""
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": start_us,
        "dur": span_us,
        "pid": process,
        "tid": thread,
        "args": dict(args),
    }
