"""The section of stages: stacked bars for every engine, phase and batch, a waterfall of a decode step, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultramem.runtime.profile.arithmetic import ALL_STAGES
from ultramem.runtime.profile.sums import SUM_TOLERANCE, adds_up
from ultramem.runtime.profile.units import share_text, time_text
from ultramem.runtime.report.charts import Segment, stacked_bars
from ultramem.runtime.report.page import Cell, details, escape, legend, section, table, text_cell
from ultramem.runtime.report.source import (
    DARK_STAGES,
    NONE,
    PHASES,
    Source,
    chosen,
    engine_name,
    phase_title,
    stage_name,
    time_scale,
)
from ultramem.runtime.report.waterfall import Step, waterfall


def stage_section(sources: Sequence[Source]) -> str:
    """Stacked bars of the stages for every engine, phase and batch, and their times in tables."""
    settings = sources[0].profile["settings"]
    batches = settings["batches"]
    blocks = [
        f"<h3>{escape(phase_title(phase, settings['prompt_tokens']))}</h3><div class='panels'>"
        f"{''.join(_stage_panel(sources, phase, batch) for batch in batches)}</div>"
        for phase in PHASES
    ]
    present = [stage for stage in ALL_STAGES if any((stage,) == tuple(row["stages"]) for row in _all_rows(sources))]
    entries = [(stage_name((stage,)), f"var(--{stage})") for stage in present]
    if any(len(row["stages"]) > 1 for row in _all_rows(sources)):
        entries.append(("kernels fused over several stages", "fused"))
    entries.append(("outside every stage", "outside"))
    methods = dict.fromkeys(
        (times["engine"], times["method"], times["note"]) for source in sources for times in source.profile["stages"]
    )
    how = "".join(
        f"<li>{escape(engine_name(engine))}: {escape(method)}{escape(': ' + note if note else '')}</li>"
        for engine, method, note in methods
    )
    tables = "".join(_stage_table(source, phase, batch) for source in sources for phase in PHASES for batch in batches)
    waterfalls = "".join(_waterfalls(source, min(batches)) for source in sources)
    return section(
        _stage_headline(sources[0]),
        legend(entries),
        f"<figure>{''.join(blocks)}<figcaption>Each bar is an instrumented forward, without what the "
        "instruments cost by a measurement of their own. How the stages are told apart:"
        f"</figcaption></figure><ul>{how}</ul>",
        f"<h3>What the stages add up to, beside the same forward without instruments</h3>{_sum_table(sources)}",
        waterfalls,
        details("Time of every stage, and of what compilers fused", tables),
    )


def _waterfalls(source: Source, batch: int) -> str:
    """One for each engine's decode step, from its start to its end."""
    charts = []
    for place, times in chosen(source.profile["stages"], phase="decode", batch=batch):
        if not times["rows"]:
            continue
        here = f"{source.pointer}/stages/{place}"
        steps = [
            Step(
                label=_short_name(row["stages"]),
                value=row["time_us"],
                text=time_text(row["time_us"]),
                path=f"{here}/rows/{index}/time_us",
                look=f"var(--{row['stages'][0]})" if len(row["stages"]) == 1 else "fused",
                tooltip=f"{stage_name(row['stages'])}: p50 {time_text(row['p50_us'])}, p90 {time_text(row['p90_us'])}, "
                f"p99 {time_text(row['p99_us'])}, nodes: {row['calls']}",
            )
            for index, row in enumerate(times["rows"])
        ]
        outside = Step(
            label="outside",
            value=max(0.0, times["unattributed_us"]),
            text=time_text(times["unattributed_us"]),
            path=f"{here}/unattributed_us",
            look="outside",
            tooltip="the framework's own work, between kernels and operators",
        )
        unit, scale = time_scale([times["sum_us"]])
        chart = waterfall([*steps, outside], unit=unit, scale=scale, summary=f"{times['engine']}, a decode step")
        charts.append(f"<div><h4>{escape(engine_name(times['engine']))}</h4>{chart}</div>")
    title = f"Waterfall of a decode step of {source.name}, batch {batch}"
    return f"<h3>{escape(title)}</h3><div class='panels'>{''.join(charts)}</div>" if charts else ""


def _short_name(stages: Sequence[str]) -> str:
    """Of at most two stages; the tooltip has them all."""
    return stage_name(stages) if len(stages) <= 2 else f"{stage_name(stages[:1])} + {len(stages) - 1} more"


def _all_rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [row for source in sources for times in source.profile["stages"] for row in times["rows"]]


def _stage_headline(source: Source) -> str:
    """The largest stages of the first engine's decode step."""
    times = next((times for times in source.profile["stages"] if times["phase"] == "decode" and times["rows"]), None)
    if times is None:
        return "Time by stage: no engine's stages can be told apart"
    rows = sorted(times["rows"], key=lambda row: -row["time_us"])[:2]
    parts = " and ".join(f"{stage_name(row['stages'])} {share_text(row['time_us'] / times['sum_us'])}" for row in rows)
    engine = engine_name(times["engine"])
    return f"Where the time goes: of a decode step of {source.name} on {engine} at batch {times['batch']}, {parts}"


def _stage_panel(sources: Sequence[Source], phase: str, batch: int) -> str:
    rows = []
    for source in sources:
        for times in source.profile["stages"]:
            if (times["phase"], times["batch"]) != (phase, batch):
                continue
            label = engine_name(times["engine"])
            label = label if len(sources) == 1 else f"{label} · {source.name}"
            rows.append((label, time_text(times["sum_us"]), _segments(times)))
    unit, scale = time_scale([sum(segment.value for segment in segments) for _, _, segments in rows])
    chart = stacked_bars(
        rows, unit=f"{unit} per forward, batch {batch}", scale=scale, summary=f"{phase}, batch {batch}"
    )
    return chart


def _segments(times: dict[str, Any]) -> list[Segment]:
    sum_us = times["sum_us"]

    def segment(label: str, value_us: float, look: str, *, is_dark: bool = False) -> Segment:
        tooltip = f"{label}: {time_text(value_us)}, {share_text(value_us / sum_us)}"
        return Segment(label=label, value=value_us, look=look, is_dark=is_dark, tooltip=tooltip)

    segments = []
    for row in times["rows"]:
        if len(row["stages"]) == 1:
            (stage,) = row["stages"]
            segments.append(
                segment(stage_name((stage,)), row["time_us"], f"var(--{stage})", is_dark=stage in DARK_STAGES)
            )
    fused = [row for row in times["rows"] if len(row["stages"]) > 1]
    if fused:
        names = "; ".join(f"{stage_name(row['stages'])} {time_text(row['time_us'])}" for row in fused)
        segments.append(segment(f"fused over stages ({names})", sum(row["time_us"] for row in fused), "fused"))
    label = "outside every stage" if times["rows"] else "not separable"
    return [*segments, segment(label, max(0.0, times["unattributed_us"]), "outside")]


def _stage_table(source: Source, phase: str, batch: int) -> str:
    """Stages down, engines across."""
    found = [
        (index, times)
        for index, times in enumerate(source.profile["stages"])
        if (times["phase"], times["batch"]) == (phase, batch)
    ]
    places = {
        (index, tuple(row["stages"])): (f"{source.pointer}/stages/{index}/rows/{place}/time_us", row["time_us"])
        for index, times in found
        for place, row in enumerate(times["rows"])
    }
    keys = sorted(
        {stages for _, stages in places}, key=lambda key: (len(key) > 1, [ALL_STAGES.index(stage) for stage in key])
    )
    rows = []
    for key in keys:
        cells = [text_cell(stage_name(key))]
        for index, _ in found:
            place = places.get((index, key))
            cells.append(Cell(text=NONE) if place is None else Cell(text=time_text(place[1]), path=place[0]))
        rows.append(cells)
    for name, label in (
        ("unattributed_us", "outside every stage"),
        ("sum_us", "sum"),
        ("plain_us", "without instruments"),
        ("instrument_us", "instruments, taken off"),
    ):
        rows.append(
            [
                text_cell(label),
                *(
                    Cell(text=time_text(times[name]), path=f"{source.pointer}/stages/{index}/{name}")
                    for index, times in found
                ),
            ]
        )
    rows.append(
        [
            text_cell("explained by stages"),
            *(
                Cell(text=share_text(times["coverage"]), path=f"{source.pointer}/stages/{index}/coverage")
                for index, times in found
            ),
        ]
    )
    for name, label in (("sum_ratio", "sum / without instruments"), ("max_abs_difference", "largest difference")):
        rows.append(
            [
                text_cell(label),
                *(
                    Cell(text=_plain_text(name, times[name]), path=f"{source.pointer}/stages/{index}/{name}")
                    for index, times in found
                ),
            ]
        )
    headings = ("stage", *(engine_name(times["engine"]) for _, times in found))
    title = f"{source.name}, {phase}, batch {batch}"
    return f"<h3>{escape(title)}</h3>{table(headings, rows, total_rows=[len(keys) + 1])}"


def _sum_table(sources: Sequence[Source]) -> str:
    """A row for each engine, phase and batch whose stages are told apart."""
    rows = []
    for source in sources:
        for index, times in enumerate(source.profile["stages"]):
            if not times["rows"]:
                continue
            here = f"{source.pointer}/stages/{index}"
            ratios = times["turn_sum_ratios"]
            rows.append(
                [
                    text_cell(engine_name(times["engine"])),
                    *([text_cell(source.name)] if len(sources) > 1 else []),
                    text_cell(times["phase"]),
                    Cell(text=str(times["batch"]), path=f"{here}/batch"),
                    *(
                        Cell(text=time_text(times[name]), path=f"{here}/{name}")
                        for name in ("instrumented_us", "instrument_us", "sum_us", "plain_us")
                    ),
                    Cell(text=f"{times['sum_ratio']:.2f}", path=f"{here}/sum_ratio"),
                    Cell(text=f"{min(ratios):.2f} – {max(ratios):.2f}"),  # noqa: RUF001  # an en dash
                    text_cell("" if adds_up(times) else f"by over {share_text(SUM_TOLERANCE)}"),
                ]
            )
    headings = (
        "engine", *(["model"] if len(sources) > 1 else []), "phase", "batch", "with instruments", "they cost", "sum",
        "without instruments", "ratio", "of each turn", "differ",
    )  # fmt: skip
    return table(headings, rows) if rows else ""


def _plain_text(name: str, value: float) -> str:
    return f"{value:.2g}" if name == "max_abs_difference" else f"{value:.2f}"
