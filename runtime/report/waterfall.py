"""A waterfall: what a whole is made of, each part beginning where the one before it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultramem.runtime.report.charts import LABEL_ROOM, percent, tracks
from ultramem.runtime.report.page import escape


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One part."""

    label: str
    value: float
    text: str
    path: str
    """JSON pointer of the value."""
    look: str
    """A CSS background, or a class name."""
    tooltip: str


def waterfall(steps: Sequence[Step], *, unit: str, scale: float, summary: str) -> str:
    """Bars that add up from left to right; values are divided by `scale` for the axis."""
    high = sum(step.value for step in steps) or 1.0
    full = high / (1 - LABEL_ROOM)
    rows, start = [], 0.0
    for step in steps:
        rows.append((step.label, _lane(step, start / full, step.value / full)))
        start += step.value
    return tracks(rows, high=high, full=full, unit=unit, scale=scale, summary=summary)


def _lane(step: Step, left: float, width: float) -> str:
    style = f"left:{percent(left)};width:{percent(width)}"
    classes = "bar part"
    if step.look.isalpha():
        classes += f" {step.look}"
    else:
        style += f";background:{step.look}"
    return (
        f'<div class="lane" title="{escape(step.tooltip)}"><div class="{classes}" style="{style}"></div>'
        f'<span class="value" style="left:{percent(left + width)}" data-path="{escape(step.path)}">'
        f"{escape(step.text)}</span></div>"
    )
