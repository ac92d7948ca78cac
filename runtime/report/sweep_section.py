"""The section of sweeps: latency against batch size, a line for each engine and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ultramem.runtime.profile.units import number_text, time_text
from ultramem.runtime.report.page import Cell, details, escape, section, table
from ultramem.runtime.report.source import NONE, SERIES, Source, chosen, engine_name, phase_title, time_scale
from ultramem.runtime.report.sweep_plot import SweepCurve, SweepPoint, sweep_plot

DASHES = ("", "7 4", "2 4", "9 3 2 3")
"""Of the models, beginning anew where there are more."""


class Figure(NamedTuple):
    """One plot: which rows of a profile it shows, and the field of the value and of its rounds."""

    title: str
    what: str
    rows: str
    value: str
    rounds: str
    phase: str | None = None


class Line(NamedTuple):
    """An engine with a model, and its rows by batch: the place in the profile, and the row."""

    engine: str
    source: Source
    rows: list[tuple[int, dict[str, Any]]]


def sweep_section(sources: Sequence[Source]) -> str:
    """Plots and their numbers; nothing where there is one batch size."""
    settings = sources[0].profile["settings"]
    if len(settings["batches"]) < 2:
        return ""
    prompt = settings["prompt_tokens"]
    figures = (
        Figure(phase_title("prefill", prompt), "per prefill", "latency", "p50_us", "round_p50_us", "prefill"),
        Figure(phase_title("decode", prompt), "per decode step", "latency", "p50_us", "round_p50_us", "decode"),
        Figure("Time to the first token", "to the first token", "requests", "ttft_us", "round_ttft_us"),
        Figure("Time per token after it", "per token", "requests", "tpot_us", "round_tpot_us"),
    )
    engines = list(dict.fromkeys(row["engine"] for source in sources for row in source.profile["latency"]))
    plots = "".join(
        f"<div><h3>{escape(figure.title)}</h3>{_plot(figure, _lines(sources, engines, figure), engines, sources)}</div>"
        for figure in figures
    )
    tables = "".join(
        f"<h3>{escape(figure.title)}</h3>{_table(figure, _lines(sources, engines, figure), sources)}"
        for figure in figures
    )
    caption = (
        "Both axes are logarithmic. Where a line is level, more sequences at a time cost nothing; where the time grows "
        "by the factor that the sequences do, each costs as much as alone. Line: median. Band: from the lowest to the "
        "highest median of a round."
    )
    return section(
        _headline(sources[0]),
        _legend(engines, sources),
        f"<figure><div class='panels'>{plots}</div><figcaption>{escape(caption)}</figcaption></figure>",
        details("The numbers of these curves", tables),
    )


def _headline(source: Source) -> str:
    """How much longer the fastest engine's decode step takes for how many more sequences."""
    batches = source.profile["settings"]["batches"]
    few, many = min(batches), max(batches)
    rows = chosen(source.profile["latency"], phase="decode", batch=many)
    best = min((row for _, row in rows), key=lambda row: row["p50_us"])
    ((_, first),) = chosen(source.profile["latency"], phase="decode", batch=few, engine=best["engine"])
    return (
        f"From batch {few} to {many} a decode step of {source.name} takes "
        f"{number_text(best['p50_us'] / first['p50_us'], 2)} times as long on {engine_name(best['engine'])}, for "
        f"{number_text(many / few)} times the tokens"
    )


def _lines(sources: Sequence[Source], engines: Sequence[str], figure: Figure) -> list[Line]:
    lines = []
    for source in sources:
        for engine in engines:
            wanted = {"engine": engine} | ({"phase": figure.phase} if figure.phase else {})
            rows = sorted(chosen(source.profile[figure.rows], **wanted), key=lambda pair: pair[1]["batch"])
            if rows:
                lines.append(Line(engine, source, rows))
    return lines


def _plot(figure: Figure, lines: Sequence[Line], engines: Sequence[str], sources: Sequence[Source]) -> str:
    unit, scale = time_scale([row[figure.value] for line in lines for _, row in line.rows])
    curves = [
        SweepCurve(
            label=_name(line, sources),
            color=_color(line.engine, engines),
            dashes=_dashes(line.source, sources),
            points=[
                SweepPoint(
                    x=row["batch"],
                    y=row[figure.value],
                    low=min(row[figure.value], *row[figure.rounds]),
                    high=max(row[figure.value], *row[figure.rounds]),
                    path=f"{line.source.pointer}/{figure.rows}/{place}/{figure.value}",
                    tooltip=f"{_name(line, sources)}, batch {row['batch']}: {time_text(row[figure.value])} "
                    f"({_spread(row[figure.rounds])})",
                )
                for place, row in line.rows
            ],
        )
        for line in lines
    ]
    summary = f"{figure.title} against batch size"
    return sweep_plot(
        curves, x_title="sequences at a time", y_title=figure.what, unit=unit, scale=scale, summary=summary
    )


def _table(figure: Figure, lines: Sequence[Line], sources: Sequence[Source]) -> str:
    """Batches down; of each line the value, and the medians of its rounds."""
    rows = []
    for batch in sorted({row["batch"] for line in lines for _, row in line.rows}):
        cells = [Cell(text=str(batch), value=batch)]
        for line in lines:
            found = [(place, row) for place, row in line.rows if row["batch"] == batch]
            cells += [
                cell
                for place, row in found
                for cell in (
                    Cell(
                        text=time_text(row[figure.value]),
                        path=f"{line.source.pointer}/{figure.rows}/{place}/{figure.value}",
                    ),
                    Cell(text=_spread(row[figure.rounds])),
                )
            ] or [Cell(text=NONE), Cell(text="")]
        rows.append(cells)
    headings = ["batch"]
    for line in lines:
        headings += [_name(line, sources), "its rounds"]
    return table(headings, rows)


def _spread(rounds_us: Sequence[float]) -> str:
    return f"{time_text(min(rounds_us))} – {time_text(max(rounds_us))}"  # noqa: RUF001  # an en dash


def _name(line: Line, sources: Sequence[Source]) -> str:
    return engine_name(line.engine) if len(sources) == 1 else f"{engine_name(line.engine)} · {line.source.name}"


def _color(engine: str, engines: Sequence[str]) -> str:
    return SERIES[engines.index(engine) % len(SERIES)]


def _dashes(source: Source, sources: Sequence[Source]) -> str:
    return DASHES[[each.pointer for each in sources].index(source.pointer) % len(DASHES)]


def _legend(engines: Sequence[str], sources: Sequence[Source]) -> str:
    """Colours of the engines; and where there are several models, the dashes of their lines."""
    entries = [
        f'<span><i class="swatch" style="background:{_color(engine, engines)}"></i>{escape(engine_name(engine))}</span>'
        for engine in engines
    ]
    if len(sources) > 1:
        entries += [
            '<span><svg class="dash" viewBox="0 0 32 8" aria-hidden="true"><line x1="0" x2="32" y1="4" y2="4" '
            f'style="stroke-dasharray:{_dashes(source, sources) or "none"}"/></svg>{escape(source.name)}</span>'
            for source in sources
        ]
    return f'<div class="legend">{"".join(entries)}</div>'
