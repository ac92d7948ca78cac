"""Curves over a size that grows by factors, log by log, each with the spread of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ultramem.runtime.profile.units import number_text
from ultramem.runtime.report.page import escape

ROOM = 1.25
"""Factor of room above and below the values."""
LABEL_WIDTH = 7.0
"""Room of a number below the axis on a phone, in percent of the plot."""
MAX_MARKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One value, and the lowest and highest of its rounds."""

    x: float
    y: float
    low: float
    high: float
    path: str
    """JSON pointer of the value."""
    tooltip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepCurve:
    """One line."""

    label: str
    color: str
    dashes: str
    """Of `stroke-dasharray`; "" for a whole line."""
    points: Sequence[SweepPoint]


def sweep_plot(
    curves: Sequence[SweepCurve], *, x_title: str, y_title: str, unit: str, scale: float, summary: str
) -> str:
    """Lines with dots, and bands from the lowest to the highest round; y labels are divided by `scale`.

    The SVG stretches; labels and dots are HTML and do not.
    """
    points = [point for curve in curves for point in curve.points]
    xs = sorted({point.x for point in points})
    x_low, x_high = xs[0], xs[-1]
    y_low = min(point.low for point in points) / ROOM
    y_high = max(point.high for point in points) * ROOM

    def across(x: float) -> float:
        return 4 + 92 * math.log(x / x_low) / math.log(x_high / x_low)

    def down(y: float) -> float:
        return 100 * (1 - math.log(y / y_low) / math.log(y_high / y_low))

    def line(pairs: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in pairs)

    marks = marks_between(y_low / scale, y_high / scale)
    shapes = [
        f'<line class="gridline" x1="0" x2="100" y1="{down(mark * scale):.2f}" y2="{down(mark * scale):.2f}"/>'
        for mark in marks
    ]
    shapes += [f'<line class="gridline" y1="0" y2="100" x1="{across(x):.2f}" x2="{across(x):.2f}"/>' for x in xs]
    dots = []
    for curve in curves:
        band = [(point.x, point.high) for point in curve.points]
        band += [(point.x, point.low) for point in reversed(curve.points)]
        shapes.append(f'<polygon class="band" style="fill:{curve.color}" points="{line(band)}"/>')
        dashes = f";stroke-dasharray:{curve.dashes}" if curve.dashes else ""
        middle = line([(point.x, point.y) for point in curve.points])
        shapes.append(f'<polyline class="strong" style="stroke:{curve.color}{dashes}" points="{middle}"/>')
        dots += [
            f'<i class="dot" style="left:{across(point.x):.2f}%;top:{down(point.y):.2f}%;background:{curve.color}" '
            f'data-point="{escape(point.path)}" title="{escape(point.tooltip)}"></i>'
            for point in curve.points
        ]
    y_labels = "".join(f'<span style="top:{down(mark * scale):.2f}%">{number_text(mark, 1)}</span>' for mark in marks)
    x_labels = "".join(f'<span style="left:{across(x):.2f}%">{x:,g}</span>' for x in _apart(xs, across))
    return (
        f'<div class="plot sweep" role="img" aria-label="{escape(summary)}">'
        f'<div class="y-title">{escape(f"{unit} {y_title}")}</div><div class="y">{y_labels}</div>'
        f'<div class="canvas" data-low="{y_low!r}" data-high="{y_high!r}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'{"".join(dots)}</div><div class="x"><i></i>{x_labels}</div><div class="title">{escape(x_title)}</div></div>'
    )


def marks_between(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; where these are many the powers, or every other one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    decades = [10.0**power for power in powers]
    for marks in (every, decades, decades[::2]):
        found = [mark for mark in marks if low <= mark * (1 + 1e-9) and mark <= high * (1 + 1e-9)]
        if len(found) <= MAX_MARKS:
            break
    return found


def _apart(xs: Sequence[float], across: Callable[[float], float]) -> list[float]:
    """Those whose numbers do not cover each other, the first and the last among them."""
    kept = [xs[0]]
    for x in xs[1:-1]:
        if min(across(x) - across(kept[-1]), across(xs[-1]) - across(x)) >= LABEL_WIDTH:
            kept.append(x)
    return [*kept, xs[-1]]
