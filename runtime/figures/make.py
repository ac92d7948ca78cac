"""One figure from end to end: the device's roofs, arithmetic, the paper's statements, and measurements here."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import torch

from ultramem.machine import measure_machine
from ultramem.presets import PAPER_VOCABULARY
from ultramem.runtime.figures.by_arithmetic import figure_claims, figure_points
from ultramem.runtime.figures.cases import ROUNDS, SECONDS_PER_CELL, Rates
from ultramem.runtime.figures.devices import DEVICE_NAMES, DEVICES, THIS, Roofs
from ultramem.runtime.figures.measured_batch import batch_checks, batch_points
from ultramem.runtime.figures.measured_table import table_checks, table_points
from ultramem.runtime.figures.paper import CACHED_TOKENS
from ultramem.runtime.figures.rates import measured_roofs, product_rates, read_rates
from ultramem.runtime.figures.schema import FIGURES, Figure, Measured, Setting
from ultramem.runtime.figures.small_models import CACHED_TOKENS as MEASURED_CACHED_TOKENS

CAPTIONS = {
    1: "Figure 1(b,c): inference time and memory access against the batch, 1.6B; sequence length 1, 2048 tokens of "
    "key/value cache, A100-SXM-80GB",
    6: "Figure 6(c): inference time against the ratio of sparse to dense parameters, 1.6B activated; batch 512, "
    "sequence length 1, 2048 tokens of key/value cache",
    7: "Figure 7: as Figure 1(b,c), up to batch 131,072 on an A100-SXM",
}
ASSUMPTIONS = (
    "one decode step, one new token a sequence, embedding and head included",
    "every weight that a step uses crosses the memory bus once, and every activation between two stages once each way",
    "experts and rows are chosen uniformly: E(1 - (1 - k/E)^T) experts and N(1 - (1 - 1/N)^(TK)) rows are read",
    "stages run one after the other, each as long as the slower of moving its bytes and computing its FLOPs",
    "memory layers do not run beside the layers that they skip",
    "the paper does not say which type its numbers have; bytes of a number are those of element_bytes",
)


def make_figure(
    figure: int,
    device: str = THIS,
    *,
    conditions: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> Figure:
    """Figure 1, 6 or 7 on a device; measured too where that is the machine that runs this (minutes, up to 6 GB).

    Args:
        figure: of the paper.
        device: a name of `DEVICES`, or "this".
        conditions: what else runs on the machine, for the record.
        progress: called with a line on what is being done.

    Raises:
        ValueError: an argument is not one of those.
        WrongResultError: what was to be timed computes something else.
    """
    if figure not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(map(str, FIGURES))}, got {figure!r}")
    if device not in DEVICE_NAMES:
        raise ValueError(f"device must be one of {', '.join(DEVICE_NAMES)}, got {device!r}")
    measured = None
    if device == THIS:
        roofs, measured = _measure(figure, conditions, progress)
    else:
        roofs = DEVICES[device]
    points = figure_points(figure, roofs)
    return Figure(
        figure=figure,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        setting=Setting(
            caption=CAPTIONS[figure],
            cached_tokens=CACHED_TOKENS,
            element_bytes=roofs.element_bytes,
            vocab_size=PAPER_VOCABULARY,
            assumptions=ASSUMPTIONS,
        ),
        device=roofs,
        arithmetic=tuple(points),
        claims=tuple(figure_claims(figure, points)),
        measured=measured,
    )


def _measure(figure: int, conditions: str, progress: Callable[[str], None]) -> tuple[Roofs, Measured]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load_average = os.getloadavg()[0]
    progress("measuring memory bandwidth and matrix products")
    machine = measure_machine(device)
    rates = Rates(roofs=measured_roofs(machine, device), reads=read_rates(device), products=product_rates(device))
    if figure == 6:
        points = table_points(rates, device, progress=progress)
        checks = table_checks(points)
    else:
        points = batch_points(figure, rates, device, progress=progress)
        checks = batch_checks(points)
    return rates.roofs, Measured(
        machine=machine,
        cached_tokens=MEASURED_CACHED_TOKENS,
        rounds=ROUNDS,
        seconds_per_cell=SECONDS_PER_CELL,
        load_average=load_average,
        conditions=conditions,
        read_rates=rates.reads,
        product_rates=rates.products,
        points=tuple(points),
        checks=tuple(checks),
    )
