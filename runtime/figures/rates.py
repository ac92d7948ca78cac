"""Rates of this machine that a roofline leaves out: reads that caches answer, products of few rows, random rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.machine import Machine, roof_sizes
from ultramem.runtime.figures.devices import THIS, Roofs
from ultramem.runtime.figures.schema import ProductRate, ReadRate
from ultramem.runtime.figures.watched import Watched
from ultramem.runtime.profile.measure import percentile, time_us

READ_BYTES = tuple(2**power for power in range(20, 29))
PRODUCT_ROWS = (*range(1, 9), 10, 12, *(2**power for power in range(4, 11)))
"""A product of one more row may take a half longer, or no time."""
PRODUCT_SHAPE = (2048, 512)
"""Outputs and inputs of a matrix, 4 MiB in float32, as in the layers that are measured."""
PRODUCT_MATRICES = 64
"""One after the other: more than caches hold, as weights are in a step."""
SAMPLES = 15
CYCLE_BYTES = 2**28
"""Inputs of a call are used again after so many bytes of other rows were read: more than caches hold."""
MOST_INPUTS = 256


def read_rates(device: torch.device, sizes: Sequence[int] = READ_BYTES) -> tuple[ReadRate, ...]:
    """Bytes per second of summing float32 arrays of these sizes in bytes."""
    found = []
    for size in sizes:
        array = torch.ones(size // 4, device=device)
        found.append(ReadRate(array_bytes=size, bytes_per_second=size / median_us(array.sum, device) * 1e6))
    return tuple(found)


def product_rates(device: torch.device, rows: Sequence[int] = PRODUCT_ROWS) -> tuple[ProductRate, ...]:
    """FLOPs per second of float32 products of so many rows with matrices that come from memory, as `F.linear` does."""
    weights_MID = torch.rand(PRODUCT_MATRICES, *PRODUCT_SHAPE, device=device)
    found = []
    for count in rows:
        inputs_TD = torch.rand(count, PRODUCT_SHAPE[1], device=device)
        call = cycle([partial(F.linear, inputs_TD, weight_ID) for weight_ID in weights_MID])
        us = median_us(call, device)
        found.append(ProductRate(rows=count, flops_per_second=2 * count * weights_MID[0].numel() / us * 1e6))
    return tuple(found)


def median_us(call: Callable[[], object], device: torch.device) -> float:
    """Median of several calls after one that warms up, without the time in which others had the processor."""
    watched = Watched(call)
    watched()
    wall_us = percentile([time_us(watched, device) for _ in range(SAMPLES)], 0.5)
    return min(wall_us, percentile(watched.cpu_us, 0.5))


def measured_roofs(machine: Machine, device: torch.device) -> Roofs:
    """The roofs of this machine in float32, as `measure_machine` finds them, but by `median_us`."""
    array_bytes, size = roof_sizes(device)
    source = torch.ones(array_bytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.rand(size, size, device=device) for _ in range(2))
    read_us, copy_us = median_us(source.sum, device), median_us(partial(target.copy_, source), device)
    return Roofs(
        name=THIS,
        label=machine.device,
        bytes_per_second=1e6 * max(source.nbytes / read_us, 2 * source.nbytes / copy_us),
        flops_per_second=1e6 * 2 * size**3 / median_us(partial(torch.mm, left, right), device),
        memory_bytes=None,
        element_bytes=4,
        source=f"measured with {machine.threads} threads, time of other processes left out: the better of summing and "
        "copying 256 MiB, and a square float32 product",
    )


def read_rate(rates: Sequence[ReadRate], array_bytes: float) -> float:
    """Bytes per second at `array_bytes`, on a straight line over the logarithm of the sizes that were measured."""
    return _between([(rate.array_bytes, rate.bytes_per_second) for rate in rates], array_bytes)


def product_rate(rates: Sequence[ProductRate], rows: float) -> float:
    """FLOPs per second of a product of `rows` rows, likewise."""
    return _between([(rate.rows, rate.flops_per_second) for rate in rates], rows)


def expert_product_rate(rates: Sequence[ProductRate], tokens: int, share: float) -> float:
    """FLOPs per second of the products of experts that each of `tokens` chooses with probability `share`.

    An expert has n tokens with the probability of the binomial distribution, and 2 n FLOPs a weight.
    """
    if share >= 1:
        return product_rate(rates, tokens)
    probability = (1 - share) ** tokens
    flops = seconds = 0.0
    for count in range(1, tokens + 1):
        probability *= (tokens - count + 1) / count * share / (1 - share)
        flops += probability * count
        seconds += probability * count / product_rate(rates, count)
    return flops / seconds


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    ordered = sorted(points)
    x = min(max(x, ordered[0][0]), ordered[-1][0])
    for (left, low), (right, high) in itertools.pairwise(ordered):
        if x <= right:
            share = math.log(x / left) / math.log(right / left)
            return low + share * (high - low)
    return ordered[-1][1]


def inputs_for(bytes_of_call: float) -> int:
    """How many inputs a call cycles through, so that the rows of one are gone from the caches before it is back."""
    return max(2, min(MOST_INPUTS, math.ceil(CYCLE_BYTES / bytes_of_call)))


def random_rows(table_NV: Tensor, tokens: int, slots: int, seed: int) -> Callable[[], object]:
    """A call in which `embedding_bag`, the framework's own operator, sums `slots` random rows of each token."""
    generator = torch.Generator().manual_seed(seed)
    count = inputs_for(tokens * slots * table_NV.shape[1] * table_NV.element_size())
    indices = [
        torch.randint(table_NV.shape[0], (tokens, slots), generator=generator).to(table_NV.device) for _ in range(count)
    ]
    return cycle([partial(F.embedding_bag, each, table_NV, mode="sum") for each in indices])


def cycle(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that does what the next of `calls` does, from the start again after the last."""
    place = -1

    def call() -> object:
        nonlocal place
        place = (place + 1) % len(calls)
        return calls[place]()

    return call
