"""A chart with logarithmic axes, in the look of `ultramem.runtime.report.charts`: HTML labels over an SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ultramem.runtime.report.page import escape

MAX_X_LABELS = 6
"""More would touch on a phone."""
MAX_Y_LABELS = 6
DASHES = "stroke-dasharray:5 4"
DOTS = "stroke-dasharray:1.5 3"
HALO = "stroke-width:6px;opacity:.5"
"""Of a line that another may cover."""
TOP_ROOM = 5
"""Percent of the height below the title of the axis in which no label fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogCurve:
    """Points (x, y), both positive, ascending in x."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    style: str = ""
    """CSS of the stroke: nothing, `DASHES`, `DOTS` or `HALO`."""
    has_dots: bool = False


def log_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round values from `low` to `high`: powers of ten, every second or third of them where there are more than
    `most`, and 1, 2 and 5 times powers (or more of them) where fewer than two lie between.
    """
    if not 0 < low <= high:
        raise ValueError(f"low and high must be positive and ascending, got {low} and {high}")
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**power for power in range(first, last + 1) if low <= 10.0**power <= high]
    if len(powers) < 2:
        for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            fine = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            marks = [mark for mark in fine if low <= mark <= high]
            if len(marks) >= 2:
                break
        return marks or [low]
    return powers[:: -(-len(powers) // most)]


def power_ticks(values: Sequence[int]) -> list[int]:
    """Some of `values`, evenly spread from the first on: those of a sweep over powers of two."""
    return list(values)[:: -(-len(values) // MAX_X_LABELS)]


def _short(text: str) -> str:
    """Text of a mark: "10.0 ms" as "10 ms", which no line breaks."""
    return re.sub(r"\.0+(?= )", "", text).replace(" ", "\u00a0")


def log_chart(
    curves: Sequence[LogCurve],
    *,
    x_marks: Sequence[float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_title: str,
    y_title: str,
    summary: str,
) -> str:
    """Lines, and dots with their values as tooltips, over two logarithmic axes."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    if not xs or min(xs) <= 0 or min(ys) <= 0:
        raise ValueError("curves must have points, all of them positive on both axes")
    # A little room, so that no line lies on the frame.
    y_low, y_high = min(ys) / 1.25, max(ys) * 1.25
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else 2 * min(xs)

    def across(x: float) -> float:
        return 100 * math.log(x / x_low) / math.log(x_high / x_low)

    def down(y: float) -> float:
        return 100 * (1 - math.log(y / y_low) / math.log(y_high / y_low))

    y_marks = log_ticks(y_low, y_high, most=MAX_Y_LABELS)
    shapes = [
        f'<line class="gridline" x1="0" x2="100" y1="{down(mark):.2f}" y2="{down(mark):.2f}"/>' for mark in y_marks
    ]
    dots = []
    for curve in curves:
        line = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in curve.points)
        shapes.append(f'<polyline class="strong" style="stroke:{curve.color};{curve.style}" points="{line}"/>')
        if curve.has_dots:
            dots += [
                f'<i class="dot" style="left:{across(x):.2f}%;top:{down(y):.2f}%;background:{curve.color}" '
                f'title="{escape(f"{curve.label}, {x_text(x)}: {y_text(y)}")}"></i>'
                for x, y in curve.points
            ]
    y_labels = "".join(
        f'<span style="top:{down(mark):.2f}%">{escape(_short(y_text(mark)))}</span>'
        for mark in y_marks
        if down(mark) >= TOP_ROOM
    )
    x_labels = "".join(
        f'<span{" class=end" if place > 95 else ""} style="left:{place:.2f}%">{escape(x_text(mark))}</span>'
        for mark, place in ((mark, across(mark)) for mark in x_marks)
        if -1 <= place <= 101
    )
    return (
        f'<div class="plot" role="img" aria-label="{escape(summary)}"><div class="y-title">{escape(y_title)}</div>'
        f'<div class="y">{y_labels}</div><div class="canvas">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'{"".join(dots)}</div><div class="x">{x_labels}</div><div class="title">{escape(x_title)}</div></div>'
    )
