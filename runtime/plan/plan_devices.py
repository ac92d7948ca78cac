"""Devices to plan for: what they compute and move in practice, and the links between them.

H100 rates are those that the benchmarks measured (`benchmarks/results/gpu-nvidia-h100-80gb-hbm3.json`: a large square
product, reading and copying memory), 0.83 and 0.91 of the datasheet's. An H200 has the same processor, and its memory
is taken to reach the same share of its datasheet's rate. Links are at line rate: nobody here has measured them. So a
time made of these is one that nothing beats, not one to expect.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from ultramem.machine import gemm_flops_per_second, measure_machine
from ultramem.runtime.figures.devices import DEVICES
from ultramem.runtime.plan.exchange import Kind
from ultramem.runtime.plan.options import Group, PlanOptions

PLAN_DEVICES = ("h100", "h200", "cpu")

MEASURED_BYTES_PER_SECOND = 3.06e12
"""Of an H100's memory, the better of reading and copying."""
MEASURED_FLOPS_PER_SECOND = {"bf16": 8.19e14, "fp32": 2.75e13}
"""Of a large square product on an H100; float32 without TF32."""

NVLINK_BYTES_PER_SECOND = 450e9
NETWORK_BYTES_PER_SECOND = 50e9
BASE_US, NVLINK_US, NETWORK_US = 8.4, 3.4, 14.0
LINK_SOURCE = (
    "NVIDIA H100/H200 SXM datasheet: NVLink 900 GB/s, half of it each way; DGX H100 user guide: a 400 Gb/s ConnectX-7 "
    "for each GPU; latencies of a ring step from NCCL's tuner, as PyTorch's torch/_inductor/comm_analysis.py has them"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What a rank sends at most, and how long a message takes at least."""

    node_bytes_per_second: float
    """To ranks of its node, one way."""
    network_bytes_per_second: float
    """To ranks of other nodes, one way."""
    base_us: float
    """Of starting a collective."""
    node_us: float
    """Of a step to a rank of the same node."""
    network_us: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDevice:
    """A device and its links."""

    name: str
    label: str
    flops_per_second: float
    """Of matrix products in the plan's type."""
    bytes_per_second: float
    memory_bytes: float
    """Of one rank."""
    links: Links
    source: str


def plan_device(name: str, options: PlanOptions) -> PlanDevice:
    """The device called `name`; "cpu" is this machine, measured in about a second.

    Raises:
        ValueError: no device has that name, or the network of a CPU is not told.
    """
    if name not in PLAN_DEVICES:
        raise ValueError(f"device must be one of {', '.join(PLAN_DEVICES)}, got {name!r}")
    if name == "cpu":
        return _this_machine(options)
    roofs, measured = DEVICES[name], DEVICES["h100"]
    network = NETWORK_BYTES_PER_SECOND if options.network_gbit is None else options.network_gbit * 1e9 / 8
    return PlanDevice(
        name=name,
        label=roofs.label,
        flops_per_second=MEASURED_FLOPS_PER_SECOND[options.dtype],
        bytes_per_second=MEASURED_BYTES_PER_SECOND * roofs.bytes_per_second / measured.bytes_per_second,
        memory_bytes=_known(roofs.memory_bytes),
        links=Links(
            node_bytes_per_second=NVLINK_BYTES_PER_SECOND,
            network_bytes_per_second=network,
            base_us=BASE_US,
            node_us=NVLINK_US,
            network_us=NETWORK_US,
            source=LINK_SOURCE,
        ),
        source="rates measured on an H100" + ("" if name == "h100" else ", memory scaled to the datasheet's rate"),
    )


def collective_us(kind: Kind, sent_bytes: int, group: Group, links: Links) -> float:
    """Time of one collective of a group, each rank of which sends `sent_bytes`.

    An all-to-all sends to all at once, within the node and beyond side by side: one step, and the longer of the two
    transfers. The others are rings of P-1 steps (an all-reduce 2 (P-1)), of which one a node crosses the network; the
    ranks of a node share the bytes of the crossing over their network links.
    """
    if group.ranks == 1 or not sent_bytes:
        return 0.0
    nodes = group.nodes
    if kind == "all_to_all":
        within = (group.per_node - 1) / (group.ranks - 1)
        seconds = max(
            sent_bytes * within / links.node_bytes_per_second,
            sent_bytes * (1 - within) / links.network_bytes_per_second,
        )
        return links.base_us + (links.network_us if nodes > 1 else links.node_us) + 1e6 * seconds
    rounds = 2 if kind == "all_reduce" else 1
    crossings, steps = rounds * (nodes - 1), rounds * (group.ranks - 1)
    rate = links.node_bytes_per_second if group.per_node > 1 else links.network_bytes_per_second
    if nodes > 1:
        rate = min(rate, group.per_node * links.network_bytes_per_second)
    latency = (steps - crossings) * links.node_us + crossings * links.network_us
    return links.base_us + latency + 1e6 * sent_bytes / rate


def _this_machine(options: PlanOptions) -> PlanDevice:
    if options.network_gbit is None and options.ranks > 1:
        raise ValueError("network_gbit must be given with device cpu, whose network nobody knows, got None")
    machine = measure_machine()
    dtype: Literal["bf16", "fp32"] = options.dtype
    flops = gemm_flops_per_second(torch.device("cpu"), {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    rate = (options.network_gbit or 1.0) * 1e9 / 8
    links = Links(
        node_bytes_per_second=rate,
        network_bytes_per_second=rate,
        base_us=0.0,
        node_us=0.0,
        network_us=0.0,
        source="network_gbit as given, within a node too; latencies are not counted",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / min(options.ranks, options.ranks_per_node)
    return PlanDevice(
        name="cpu",
        label=machine.device,
        flops_per_second=flops,
        bytes_per_second=machine.bytes_per_second,
        memory_bytes=memory,
        links=links,
        source=f"measured here with {machine.threads} threads, for a node of its own for every rank",
    )


def _known(value: float | None) -> float:
    assert value is not None, "devices with published roofs have a known memory"
    return value
