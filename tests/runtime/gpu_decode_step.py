"""What the profiler recorded of one decode step of ultramem-tiny on an NVIDIA H200 with torch 2.11.

Batch 1, after 64 tokens, by eager, `torch.compile`, and that replayed as a CUDA graph, and the kernels that Inductor
recorded of the graphs for prefill and decoding. Other processes had the machine too: times are long. Names are cut at
120 characters.
"""

from __future__ import annotations

import json
from pathlib import Path

from ultramem.runtime.profile.device_calls import DeviceCall, Event, device_calls
from ultramem.runtime.profile.inductor_kernels import Kernel

_RECORDED = json.loads((Path(__file__).parent / "data/gpu_decode_step.json").read_text(encoding="utf-8"))
_NAMES = _RECORDED["names"]

GRAPHS = [[Kernel(_NAMES[name], tuple(stages)) for name, stages in graph] for graph in _RECORDED["graphs"]]


def recorded_events(engine: str) -> list[Event]:
    """Of "eager", "compile" or "replay"."""
    return [
        Event(_NAMES[name], bool(on_device), start_ns, time_ns, correlation)
        for name, on_device, start_ns, time_ns, correlation in _RECORDED[engine]
    ]


def recorded_call(engine: str) -> DeviceCall:
    (call,) = device_calls(recorded_events(engine))
    return call
