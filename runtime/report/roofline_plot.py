"""The roofline plot: what computes how fast, against arithmetic intensity and the roofs of the machine, log by log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ultramem.runtime.profile.units import scaled_text
from ultramem.runtime.report.charts import percent
from ultramem.runtime.report.page import escape

MARGIN = 1.8
"""Factor of room around the points and beyond the corner of the roofs."""

LABEL_WIDTH, LABEL_HEIGHT = 26.0, 5.5
"""Room of a label on a phone, in percent of the plot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One stage."""

    label: str
    flops_per_byte: float
    flops_per_second: float
    color: str
    is_bound: bool
    """The rate is an upper bound, drawn as a ring."""
    tooltip: str


def roofline_plot(points: Sequence[Point], *, bytes_per_second: float, flops_per_second: float, summary: str) -> str:
    """Points under the roofs min(bandwidth x intensity, GEMM rate); the SVG stretches, labels and dots do not."""
    corner = flops_per_second / bytes_per_second
    shown = [point for point in points if point.flops_per_byte > 0 and point.flops_per_second > 0]
    x_low = min([corner, *(point.flops_per_byte for point in shown)]) / MARGIN
    x_high = max([corner, *(point.flops_per_byte for point in shown)]) * MARGIN**2
    y_low = min([bytes_per_second * x_low, *(point.flops_per_second for point in shown)]) / MARGIN
    y_high = max([flops_per_second, *(point.flops_per_second for point in shown)]) * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / x_low) / math.log(x_high / x_low)
        down = 1 - math.log(y / y_low) / math.log(y_high / y_low)
        return 100 * right, 100 * down

    roof = [(x_low, bytes_per_second * x_low), (corner, flops_per_second), (x_high, flops_per_second)]
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in (place(*each) for each in roof))
    x_marks, y_marks = decades(x_low, x_high), decades(y_low, y_high)
    grid = [
        f'<line class="gridline" x1="0" x2="100" y1="{place(x_low, mark)[1]:.2f}" y2="{place(x_low, mark)[1]:.2f}"/>'
        for mark in y_marks
    ] + [
        f'<line class="gridline" y1="0" y2="100" x1="{place(mark, y_low)[0]:.2f}" x2="{place(mark, y_low)[0]:.2f}"/>'
        for mark in x_marks
    ]
    dots = _dots([(point, *place(point.flops_per_byte, point.flops_per_second)) for point in shown])
    y_labels = "".join(
        f'<span style="top:{place(x_low, mark)[1]:.2f}%">{_decade_text(mark)}</span>' for mark in y_marks
    )
    x_labels = "".join(f'<span style="left:{place(mark, y_low)[0]:.2f}%">{mark:g}</span>' for mark in x_marks)
    return (
        f'<div class="plot roofline" role="img" aria-label="{escape(summary)}"><div class="y-title">FLOP/s</div>'
        f'<div class="y">{y_labels}</div><div class="canvas">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(grid)}'
        f'<polyline class="roof" points="{line}"/></svg>{dots}</div>'
        f'<div class="x">{x_labels}</div><div class="title">FLOP per byte</div></div>'
    )


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, every other one where there are more than six."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    marks = [10.0**power for power in range(first, last + 1)]
    return marks[:: 2 if len(marks) > 6 else 1]


def _decade_text(mark: float) -> str:
    """ "10 G": a power of ten has no digits behind the point."""
    return scaled_text(mark, "").replace(".00", "").replace(".0 ", " ")


def _dots(placed: Sequence[tuple[Point, float, float]]) -> str:
    """Dots at percents of the box; a label that would cover another is left to the colour and the tooltip."""
    parts: list[str] = []
    labelled: list[tuple[float, float]] = []
    for point, x, y in placed:
        look = f"border-color:{point.color}" if point.is_bound else f"background:{point.color}"
        parts.append(
            f'<i class="dot{" ring" if point.is_bound else ""}" style="left:{x:.2f}%;top:{y:.2f}%;{look}" '
            f'title="{escape(point.tooltip)}"></i>'
        )
        if any(abs(x - left) < LABEL_WIDTH and abs(y - top) < LABEL_HEIGHT for left, top in labelled):
            continue
        labelled.append((x, y))
        side = "left" if x > 100 - LABEL_WIDTH else "right"  # it would leave the box on the other
        parts.append(
            f'<span class="dot-label {side}" style="left:{percent(x / 100)};top:{percent(y / 100)}">'
            f"{escape(point.label)}</span>"
        )
    return "".join(parts)
