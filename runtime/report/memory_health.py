"""The section on one run's memory: use of its rows, scores, outputs and cores, over training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ultramem.runtime.profile.units import number_text, share_text
from ultramem.runtime.report.charts import Curve, line_chart
from ultramem.runtime.report.page import Cell, details, escape, legend, section, table, text_cell
from ultramem.runtime.report.source import SERIES
from ultramem.runtime.report.training_run import TrainingRun

DOTS_UP_TO = 40
"""Reports that are shown as dots; more make a line alone."""


class Figure(NamedTuple):
    field: str
    title: str
    unit: str


TABLE_FIGURES = (
    Figure("used_ever", "Rows used since the start", "share of the rows"),
    Figure("used_lately", "Rows used since the report before", "share of the rows"),
    Figure("dead_rows", "Rows never used", "rows"),
    Figure("kl_from_uniform_nats", "Unevenness of use: KL from uniform", "nats; 0 is even"),
)
LAYER_FIGURES = (
    Figure("score_mean", "Mean of the kept scores", "summed over cores"),
    Figure("score_variance", "Variance of the kept scores", ""),
    Figure("output_rms", "Size of the layer's output", "root mean square"),
)


def health_section(run: TrainingRun, pointer: str) -> str:
    """Plots over training, and the newest figures as a table."""
    last = [rows[-1] for rows in run.tables.values()]
    lowest = min(row["used_ever"] for row in last)
    dead = sum(row["dead_rows"] for row in last)
    title = f"Memory of {run.name}: {share_text(lowest)} of the rows were used, {dead:,} were not"
    if len(last) > 1:
        title = f"Memory of {run.name}: at least {share_text(lowest)} of each table's rows were used, {dead:,} never"
    return section(
        title,
        "<h3>Value tables</h3>",
        _names(run.tables),
        _panels(_panel(run.tables, figure) for figure in TABLE_FIGURES),
        "<h3>Memory layers, on held-out text</h3>" if run.layers else "",
        _names(run.layers) if run.layers else "",
        _panels([*(_panel(run.layers, figure) for figure in LAYER_FIGURES), *_cores(run.layers)]),
        details("Newest figures", _newest_tables(run, pointer), _newest_layers(run, pointer)),
        note="Counted in the training graph (rows) and on one batch of held-out text (scores, outputs).",
    )


def _names(rows_by_name: dict[str, list[dict[str, Any]]]) -> str:
    return legend((name, SERIES[index % len(SERIES)]) for index, name in enumerate(rows_by_name))


def _panels(panels: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>'


def _panel(rows_by_name: dict[str, list[dict[str, Any]]], figure: Figure) -> str:
    curves = []
    for index, (name, rows) in enumerate(rows_by_name.items()):
        points = [(float(row["step"]), float(row[figure.field])) for row in rows if row.get(figure.field) is not None]
        if points:
            curves.append(
                Curve(
                    label=name,
                    points=points,
                    color=SERIES[index % len(SERIES)],
                    has_dots=len(points) <= DOTS_UP_TO,
                )
            )
    return _chart(curves, figure.title, figure.unit)


def _cores(layers: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A panel per layer: the singular values of every head's summed core, a colour a head."""
    panels = []
    for name, rows in layers.items():
        if "singular_values" not in rows[0]:
            continue
        heads, rank = len(rows[0]["singular_values"]), len(rows[0]["singular_values"][0])
        curves = [
            Curve(
                label=f"head {head + 1}, singular value {place + 1}",
                points=[(float(row["step"]), float(row["singular_values"][head][place])) for row in rows],
                color=SERIES[head % len(SERIES)],
                has_dots=len(rows) <= DOTS_UP_TO,
            )
            for head in range(heads)
            for place in range(rank)
        ]
        names = legend((f"head {head + 1}", SERIES[head % len(SERIES)]) for head in range(heads))
        panels.append(_chart(curves, f"Singular values of the cores, {name}", f"{rank} of each head", names))
    return panels


def _chart(curves: Sequence[Curve], title: str, unit: str, names: str = "") -> str:
    if not curves:
        return ""
    high = 1.1 * max(y for curve in curves for _, y in curve.points) or 1.0
    low = min(0.0, 1.1 * min(y for curve in curves for _, y in curve.points))
    chart = line_chart(curves, x_title="training step", y_title=unit, y_low=low, y_high=high, summary=title)
    return f"<div><h3>{escape(title)}</h3>{names}{chart}</div>"


def _newest_tables(run: TrainingRun, pointer: str) -> str:
    rows = []
    for name, reports in run.tables.items():
        row, here = reports[-1], f"{pointer}/tables/{name}/{len(reports) - 1}"
        kl = row["kl_from_uniform_nats"]
        rows.append(
            [
                text_cell(name),
                Cell(text=f"{row['step']:,}", path=f"{here}/step"),
                Cell(text=f"{row['rows']:,}", path=f"{here}/rows"),
                Cell(text=share_text(row["used_ever"]), path=f"{here}/used_ever"),
                Cell(text=share_text(row["used_lately"]), path=f"{here}/used_lately"),
                Cell(text=f"{row['dead_rows']:,}", path=f"{here}/dead_rows"),
                Cell(text="–")  # noqa: RUF001  # nothing was read
                if kl is None
                else Cell(text=number_text(kl), path=f"{here}/kl_from_uniform_nats"),
                Cell(text=f"{row['reads']:,}", path=f"{here}/reads"),
            ]
        )
    return table(("table", "step", "rows", "used", "used lately", "never used", "KL, nats", "reads lately"), rows)


def _newest_layers(run: TrainingRun, pointer: str) -> str:
    rows = []
    for name, reports in run.layers.items():
        row, here = reports[-1], f"{pointer}/layers/{name}/{len(reports) - 1}"
        rows.append(
            [
                text_cell(name),
                Cell(text=f"{row['step']:,}", path=f"{here}/step"),
                *(Cell(text=number_text(row[field]), path=f"{here}/{field}") for field, _, _ in LAYER_FIGURES),
            ]
        )
    return table(("layer", "step", "score mean", "score variance", "output RMS"), rows) if rows else ""
