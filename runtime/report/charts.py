"""Charts as HTML and inline SVG, sized in percent of their box: the text keeps its size on any screen.

Colours are the custom properties of page.html, so that a chart follows the light or dark scheme.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ultramem.runtime.profile.units import number_text
from ultramem.runtime.report.page import escape

LABEL_ROOM = 0.24
"""Share of a bar chart's width that is left for the number behind the longest bar."""
THIN = 0.02
"""Share of a chart's width below which a segment has no gap to the next."""
MAX_POINTS = 300
"""Points of a training curve; more are averaged in bins."""
LETTER_ROOM = 0.024
"""Width of a letter in a stacked bar on a phone: a segment shows its name where all of it fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar from zero, with whiskers to two higher values."""

    label: str
    value: float
    middle: float
    """p90: a cap on the whisker."""
    end: float
    """p99: the whisker's end, or an arrow where it lies beyond the axis."""
    text: str
    path: str
    """JSON pointer of the value."""
    color: str
    tooltip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One part of a stacked bar."""

    label: str
    value: float
    look: str
    """A CSS background, or a class name."""
    is_dark: bool
    tooltip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A line of (x, y) points."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    is_faint: bool = False
    has_dots: bool = False


def binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in each), statistics.fmean(y for _, y in each)) for each in bins]


def ticks(high: float, low: float = 0.0, *, count: int = 4) -> list[float]:
    """Round values from `low` to `high`, about `count` steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def bar_chart(rows: Sequence[Sequence[Bar]], *, unit: str, scale: float, summary: str) -> str:
    """Horizontal bars: each row has a lane for every one of its bars; values are divided by `scale` for the axis."""
    bars = [bar for row in rows for bar in row]
    # A few late samples must not flatten the medians: the axis ends behind the p90s, arrows point beyond.
    high = max(max(bar.middle for bar in bars) * 1.08, max(bar.value for bar in bars) * 1.15)
    full = high / (1 - LABEL_ROOM)
    shown = [(row[0].label, "".join(_lane(bar, high, full) for bar in row)) for row in rows]
    return tracks(shown, high=high, full=full, unit=unit, scale=scale, summary=summary)


def tracks(rows: Sequence[tuple[str, str]], *, high: float, full: float, unit: str, scale: float, summary: str) -> str:
    """Labelled rows over a common axis that starts at zero."""
    marks = [(f"{100 * mark * scale / full:.2f}%", f"{mark:g}") for mark in ticks(high / scale)]
    lines = "".join(f'<i class="grid" style="left:{place}"></i>' for place, _ in marks)
    parts = [
        f'<div class="label">{escape(label)}</div><div class="track">{lines}{lanes}</div>' for label, lanes in rows
    ]
    labels = "".join(f'<span style="left:{place}">{text}</span>' for place, text in marks)
    axis = f'<div></div><div class="axis">{labels}</div><div class="axis-title">{escape(unit)}</div>'
    return f'<div class="bars" role="group" aria-label="{escape(summary)}">{"".join(parts)}{axis}</div>'


def _lane(bar: Bar, high: float, full: float) -> str:
    end = min(bar.end, high)
    whisker = (
        f'<i class="whisker" style="left:{percent(bar.value / full)};width:{percent((end - bar.value) / full)}"></i>'
        f'<i class="cap" style="left:{percent(bar.middle / full)}"></i>'
    )
    beyond = bar.end > high
    mark = (
        f'<i class="over" style="left:{percent(end / full)};right:auto"></i>'
        if beyond
        else f'<i class="cap" style="left:{percent(end / full)}"></i>'
    )
    offset = ";margin-left:.6rem" if beyond else ""
    return (
        f'<div class="lane" title="{escape(bar.tooltip)}">'
        f'<div class="bar" style="width:{percent(bar.value / full)};background:{bar.color}"></div>{whisker}{mark}'
        f'<span class="value" style="left:{percent(end / full)}{offset}" data-path="{escape(bar.path)}">'
        f"{escape(bar.text)}</span></div>"
    )


def stacked_bars(rows: Sequence[tuple[str, str, Sequence[Segment]]], *, unit: str, scale: float, summary: str) -> str:
    """Stacked horizontal bars on one axis: (label, text behind the bar, segments)."""
    high = max((sum(segment.value for segment in segments) for _, _, segments in rows), default=1.0)
    full = high / (1 - LABEL_ROOM)
    shown = []
    for label, text, segments in rows:
        total = sum(segment.value for segment in segments)
        inner = "".join(
            _segment(segment, segment.value / total, segment.value / full) for segment in segments if segment.value > 0
        )
        lane = (
            f'<div class="lane tall"><div class="stack" style="width:{percent(total / full)}">{inner}</div>'
            f'<span class="value" style="left:{percent(total / full)}">{escape(text)}</span></div>'
        )
        shown.append((label, lane))
    return tracks(shown, high=high, full=full, unit=unit, scale=scale, summary=summary)


def _segment(segment: Segment, share: float, shown: float) -> str:
    label = escape(segment.label) if shown >= LETTER_ROOM * (len(segment.label) + 1) else ""
    # A gap would swallow a thin segment.
    classes = "segment" + (" light" if segment.is_dark else "") + (" gap" if shown > THIN else "")
    style = f"width:{percent(share)}"
    if segment.look.isalpha():
        classes += f" {segment.look}"
        label = ""
    else:
        style += f";background:{segment.look}"
    return f'<div class="{classes}" style="{style}" title="{escape(segment.tooltip)}">{label}</div>'


def line_chart(
    curves: Sequence[Curve], *, x_title: str, y_title: str, y_low: float, y_high: float, summary: str
) -> str:
    """Lines over a shared x from zero, cut at `y_high`. The SVG stretches; labels and dots are HTML and do not."""
    x_high = max((x for curve in curves for x, _ in curve.points), default=1.0) or 1.0
    y_marks, x_marks = ticks(y_high, y_low), ticks(x_high, count=5)

    def place(x: float, y: float) -> tuple[float, float]:
        return 100 * x / x_high, 100 * (1 - (y - y_low) / (y_high - y_low))

    shapes = [
        f'<line class="gridline" x1="0" x2="100" y1="{place(0, mark)[1]:.2f}" y2="{place(0, mark)[1]:.2f}"/>'
        for mark in y_marks
    ]
    dots = []
    for curve in curves:
        places = [place(x, y) for x, y in curve.points]
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        look = "faint" if curve.is_faint else "strong"
        shapes.append(f'<polyline class="{look}" style="stroke:{curve.color}" points="{points}"/>')
        if curve.has_dots:
            dots += [
                f'<i class="dot" style="left:{x:.2f}%;top:{y:.2f}%;background:{curve.color}" '
                f'title="{escape(curve.label)}, step {number_text(step, 6)}: {value:.3f}"></i>'
                for (x, y), (step, value) in zip(places, curve.points, strict=True)
                if value <= y_high
            ]
    y_labels = "".join(f'<span style="top:{place(0, mark)[1]:.2f}%">{mark:g}</span>' for mark in y_marks)
    x_labels = "".join(
        f'<span{" class=end" if mark > 0.95 * x_high else ""} style="left:{percent(mark / x_high)}">{mark:,g}</span>'
        for mark in x_marks
    )
    return (
        f'<div class="plot" role="img" aria-label="{escape(summary)}"><div class="y-title">{escape(y_title)}</div>'
        f'<div class="y">{y_labels}</div><div class="canvas">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'{"".join(dots)}</div><div class="x">{x_labels}</div><div class="title">{escape(x_title)}</div></div>'
    )


def percent(share: float) -> str:
    """A share as a CSS length."""
    return f"{100 * share:.2f}%"
