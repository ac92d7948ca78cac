"""A plot with logarithmic axes as an SVG file of its own, for pages that show images; light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ultramem.runtime.figures.log_chart import log_ticks
from ultramem.runtime.report.page import escape

STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; --ink: #1b1e22;
  --muted: #5a626c; --grid: #e3e5e9; --page: #ffffff; --a: #0072b2; --b: #d55e00; --c: #00866a; --fill: #0072b2; }
@media (prefers-color-scheme: dark) { svg { --ink: #e9eaec; --muted: #a2aab4; --grid: #2c3137; --page: #1a1d21;
  --a: #57aee8; --b: #f28e53; --c: #35c39a; --fill: #57aee8; } }
text { fill: var(--muted); } .title { fill: var(--ink); font-weight: 600; font-size: 14px; }
.page { fill: var(--page); }
.grid { stroke: var(--grid); } .frame { fill: none; stroke: var(--grid); } .region { fill: var(--fill); opacity: .1; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; } .dashed { stroke-dasharray: 6 4; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); }
text.a, text.b, text.c { stroke: none; font-weight: 600; } text.a { fill: var(--a); } text.b { fill: var(--b); }
text.c { fill: var(--c); } .dot { fill: var(--ink); stroke: var(--page); stroke-width: 2; }
.strong { fill: var(--ink); }
"""
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 52, 46
"""Room around a panel's axes, for titles and numbers."""
MOST_TICKS = 7
LETTER = 7.4
"""Width of a letter of the legend, on average."""
ABOVE = 13
"""Pixels from a dot up to its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotLine:
    """Points (x, y), both positive."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    """Class a, b or c."""
    dashed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Text in a panel, or a dot with text beside it."""

    text: str
    x: float
    y: float
    dot: bool = False
    anchor: str = "start"
    """Where the text begins: start, middle or end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes."""

    title: str
    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    lines: Sequence[PlotLine]
    y_text: Callable[[float], str]
    y_marks: Sequence[float] | None = None
    """None: round numbers."""
    notes: Sequence[Note] = ()
    above: PlotLine | None = None
    """A line whose upper side is shaded."""


def svg_plot(panels: Sequence[Panel], *, width: int = 1000, height: int = 430, summary: str) -> str:
    """The panels side by side.

    Args:
        panels: from left to right.
        width: of the picture, in pixels.
        height: the same.
        summary: what a reader who sees no picture is told.
    """
    each = width / len(panels)
    parts = [_panel(panel, index * each, each, height, index) for index, panel in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(summary)}"><title>{escape(summary)}</title><style>{STYLE}</style>'
        f'<rect class="page" width="{width}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel, left: float, width: float, height: float, index: int) -> str:
    x0, x1, y0, y1 = left + LEFT, left + width - RIGHT, height - BOTTOM, float(TOP)

    def across(x: float) -> float:
        return x0 + (x1 - x0) * _share(x, panel.x_range)

    def down(y: float) -> float:
        return y0 + (y1 - y0) * _share(y, panel.y_range)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)

    clip = f"clip{index}"
    shapes = [f'<clipPath id="{clip}"><rect x="{x0}" y="{y1}" width="{x1 - x0:.1f}" height="{y0 - y1}"/></clipPath>']
    for mark in panel.y_marks or log_ticks(*panel.y_range, most=MOST_TICKS):
        y = down(mark)
        shapes.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(
            f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(panel.y_text(mark)))}</text>'
        )
    for mark in _powers_of_two(*panel.x_range):
        x = across(mark)
        shapes.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y0}" y2="{y1}"/>')
        shapes.append(f'<text x="{x:.1f}" y="{y0 + 18}" text-anchor="middle">{mark}</text>')
    if panel.above is not None:
        (first, _), (last, _) = panel.above.points[0], panel.above.points[-1]
        top = panel.y_range[1]
        corners = f"{path(panel.above.points)} {path([(last, top), (first, top)])}"
        shapes.append(f'<polygon class="region" clip-path="url(#{clip})" points="{corners}"/>')
    for line in panel.lines:
        style = f"line {line.color}{' dashed' if line.dashed else ''}"
        shapes.append(f'<polyline class="{style}" clip-path="url(#{clip})" points="{path(line.points)}"/>')
    shapes.append(f'<rect class="frame" x="{x0}" y="{y1}" width="{x1 - x0:.1f}" height="{y0 - y1}"/>')
    shapes += [_note(note, across(note.x), down(note.y)) for note in panel.notes]
    legend_x = x0
    for line in panel.lines:
        dash = " dashed" if line.dashed else ""
        ends = f'x1="{legend_x}" x2="{legend_x + 24}" y1="{y1 - 12}" y2="{y1 - 12}"'
        shapes.append(
            f'<line class="line {line.color}{dash}" {ends}/>'
            f'<text class="{line.color}" x="{legend_x + 30}" y="{y1 - 8}">{escape(line.label)}</text>'
        )
        legend_x += 50 + round(LETTER * len(line.label))
    middle = (x0 + x1) / 2
    shapes.append(f'<text class="title" x="{x0}" y="20">{escape(panel.title)}</text>')
    shapes.append(f'<text x="{middle:.1f}" y="{y0 + 38}" text-anchor="middle">{escape(panel.x_title)}</text>')
    turned = f"rotate(-90 {left + 14:.1f} {(y0 + y1) / 2:.1f})"
    shapes.append(
        f'<text x="{left + 14:.1f}" y="{(y0 + y1) / 2:.1f}" text-anchor="middle" transform="{turned}">'
        f"{escape(panel.y_title)}</text>"
    )
    return "".join(shapes)


def _note(note: Note, x: float, y: float) -> str:
    y_text = y - ABOVE if note.dot else y + 4
    text = f'<text class="strong" x="{x:.1f}" y="{y_text:.1f}" text-anchor="{note.anchor}">{escape(note.text)}</text>'
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/>{text}' if note.dot else text


def _share(value: float, limits: tuple[float, float]) -> float:
    return math.log(value / limits[0]) / math.log(limits[1] / limits[0])


def _short(text: str) -> str:
    """ "10.0 kB" as "10 kB"."""
    return re.sub(r"\.0+(?= )", "", text)


def _powers_of_two(low: float, high: float) -> list[int]:
    """Those from `low` to `high`, every second one where there are many."""
    powers = [2**power for power in range(40) if low <= 2**power <= high]
    return powers[:: 1 if len(powers) <= MOST_TICKS else 2]
