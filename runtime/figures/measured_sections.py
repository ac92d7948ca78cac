"""Sections of a figure's page that come from measurements: dots beside the predictions, reasons, checks, rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ultramem.runtime.figures.log_chart import DASHES, DOTS, LogCurve, log_chart, power_ticks
from ultramem.runtime.figures.sections import FAMILY_COLORS, FAMILY_NAMES
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, time_text
from ultramem.runtime.report.page import Cell, definitions, details, escape, legend, number, section, table, text_cell

Indexed = tuple[int, dict[str, Any]]


def measured_sections(document: dict[str, Any]) -> list[str]:
    """Curves with their reasons, one card a group; then the machine."""
    points = list(enumerate(document["measured"]["points"]))
    if document["figure"] == 6:
        cards = [_table_card(points, *group) for group in _groups(points)]
    else:
        cards = [_batch_card(points)]
    return [*cards, _machine_section(document)]


def _batch_card(points: list[Indexed]) -> str:
    lines = [
        (FAMILY_NAMES[family], FAMILY_COLORS[family], [(i, p) for i, p in points if p["series"] == family])
        for family in dict.fromkeys(point["series"] for _, point in points)
    ]
    return _card(
        "Measured here: a decode step of small models against the batch",
        "Four families of equal FLOPs per token, about 330 M parameters each where they are sparse; float32, eager.",
        lines,
        x_title="batch",
    )


def _groups(points: list[Indexed]) -> list[tuple[str, Callable[[dict[str, Any]], bool]]]:
    """Headings and what belongs under each."""
    found: dict[tuple[str, int, int], str] = {}
    for _, point in points:
        series, batch = point["series"], point["batch"]
        if series == "lookup":
            found[("lookup", batch, point["row_bytes"])] = (
                f"Measured here: the lookup of {_tokens(batch)}, {point['row_bytes']} bytes a row"
            )
        elif series in ("memory layer", "MoE layer"):
            found[("layer", batch, 0)] = (
                f"Measured here: a memory layer and a MoE layer of equal size, {_tokens(batch)}"
            )
        else:
            found[("step", batch, 0)] = f"Measured here: a model's decode step, batch {batch}"
    return [(title, _belongs(key)) for key, title in found.items()]


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _belongs(key: tuple[str, int, int]) -> Callable[[dict[str, Any]], bool]:
    kind, batch, row_bytes = key
    series = {"lookup": ("lookup",), "layer": ("memory layer", "MoE layer"), "step": ("decode step",)}[kind]

    def belongs(point: dict[str, Any]) -> bool:
        return point["series"] in series and point["batch"] == batch and row_bytes in (0, point["row_bytes"])

    return belongs


def _table_card(points: list[Indexed], title: str, belongs: Callable[[dict[str, Any]], bool]) -> str:
    chosen = [(index, point) for index, point in points if belongs(point)]
    lines = []
    for place, key in enumerate(dict.fromkeys((point["series"], point["engine"]) for _, point in chosen)):
        name = key[0] if key[1] == "eager" else f"{key[0]}, compiled"
        own = [(index, point) for index, point in chosen if (point["series"], point["engine"]) == key]
        color = FAMILY_COLORS["moe"] if key[0] == "MoE layer" else f"var(--series-{(0, 2, 3)[place % 3]})"
        lines.append((name, color, own))
    return _card(title, "", lines, x_title="rows of the table")


def _card(title: str, note: str, lines: list[tuple[str, str, list[Indexed]]], *, x_title: str) -> str:
    is_rows = x_title != "batch"
    shown = _chart([_curves(*line)[0] for line in lines] if len(lines) > 1 else _curves(*lines[0]), x_title, title)
    if len(lines) > 1:
        panels = "".join(
            f"<div><h3>{escape(line[0])}</h3>{_chart(_curves(*line), x_title, f'{title}: {line[0]}')}</div>"
            for line in lines
        )
        shown += f'<div class="panels">{panels}</div>'
    reasons = "".join(
        f"<li>{escape(name)}, {escape(_x_text(point, is_rows))}: {_ratio(index, point)} times the roofline: "
        f"{escape(point['reason'])}</li>"
        for name, _, points in lines
        for index, point in points
        if point["reason"]
    )
    why = f"<h3>Where time and roofline differ by over 1.5 times</h3><ul>{reasons}</ul>" if reasons else ""
    return section(
        title,
        legend((name, color) for name, color, _ in lines),
        f"<figure>{shown}<figcaption>Dots: medians. Dashes: the roofline's prediction. Small dots: overhead of calls, "
        "random rows, products of few rows and waiting for other processes, each measured by itself, added up."
        "</figcaption></figure>",
        details("Every measurement", _table(lines, is_rows)),
        why,
        note=note,
    )


def _curves(name: str, color: str, points: list[Indexed]) -> list[LogCurve]:
    """Of one series: medians, the roofline's prediction, and what explains the difference."""
    looks = (
        (name, "p50_us", ""),
        (f"{name}, roofline", "roofline_us", DASHES),
        (f"{name}, explained", "explained_us", DOTS),
    )
    return [
        LogCurve(
            label=label,
            points=[(point["x"], point[key]) for _, point in points],
            color=color,
            style=style,
            has_dots=not style,
        )
        for label, key, style in looks
    ]


def _chart(curves: list[LogCurve], x_title: str, summary: str) -> str:
    xs = sorted({int(x) for curve in curves for x, _ in curve.points})
    return log_chart(
        curves,
        x_marks=power_ticks(xs),
        x_text=(lambda x: f"{x:,g}") if x_title == "batch" else (lambda x: f"2^{math.log2(x):.3g}"),
        y_text=time_text,
        x_title=x_title,
        y_title="per call",
        summary=summary,
    )


def _x_text(point: dict[str, Any], is_rows: bool) -> str:
    return f"{point['x']:,} rows" if is_rows else f"batch {point['x']}"


def _ratio(index: int, point: dict[str, Any]) -> str:
    return number(number_text(point["ratio"]), f"/measured/points/{index}/ratio")


def _table(lines: list[tuple[str, str, list[Indexed]]], is_rows: bool) -> str:
    rows: list[list[Cell]] = []
    starts = []
    for name, _, points in lines:
        starts.append(len(rows))
        for index, point in points:
            here = f"/measured/points/{index}"
            low, high = time_text(point["p25_us"]), time_text(point["p75_us"])
            rows.append(
                [
                    text_cell(name),
                    Cell(text=str(point["x"]), value=float(point["x"])),
                    Cell(text=time_text(point["p50_us"]), path=f"{here}/p50_us", is_best=True),
                    Cell(text=f"{low} – {high}"),  # noqa: RUF001  # an en dash between the ends of a range
                    Cell(text=str(point["samples"]), value=float(point["samples"])),
                    Cell(text=time_text(point["roofline_us"]), path=f"{here}/roofline_us"),
                    Cell(text=number_text(point["ratio"]), path=f"{here}/ratio"),
                    Cell(text=time_text(point["overhead_us"]), path=f"{here}/overhead_us"),
                    Cell(text=time_text(point["rows_us"]), path=f"{here}/rows_us"),
                    Cell(text=time_text(point["dense_us"]), path=f"{here}/dense_us"),
                    Cell(text=time_text(point["waiting_us"]), path=f"{here}/waiting_us"),
                    Cell(text=time_text(point["explained_us"]), path=f"{here}/explained_us"),
                    Cell(text=number_text(point["used"]), path=f"{here}/used"),
                    Cell(text=number_text(point["used_expected"]), path=f"{here}/used_expected"),
                    Cell(text=bytes_text(point["total_bytes"]), path=f"{here}/total_bytes"),
                ]
            )
    headings = (
        "series", "rows" if is_rows else "batch", "median", "quartiles", "samples", "roofline", "ratio", "overhead",
        "random rows", "the rest", "waiting", "explained", "used", "expected", "bytes",
    )  # fmt: skip
    return table(headings, rows, group_starts=starts)


def checks_section(document: dict[str, Any]) -> str:
    """What must hold of the measurements."""
    checks = document["measured"]["checks"]
    items = []
    for index, check in enumerate(checks):
        here = f"/measured/checks/{index}"
        predicted = ""
        if check["predicted"] is not None:
            predicted = f", predicted {number(number_text(check['predicted']), f'{here}/predicted')}"
        high = number_text(check["high"])
        accepted = f"at most {high}" if check["low"] is None else f"{number_text(check['low'])} to {high}"
        verdict = "met" if check["met"] else "not met"
        items.append(
            f"<li>{escape(check['name'])}: {number(number_text(check['value']), f'{here}/value', tag='b')}{predicted}, "
            f"accepted {escape(accepted)}: <b>{verdict}</b></li>"
        )
    met = sum(check["met"] for check in checks)
    note = "Ratios of medians from which the time of other processes is taken away."
    return section(f"Checks: {met} of {len(checks)} are met", f"<ul>{''.join(items)}</ul>", note=note)


def _machine_section(document: dict[str, Any]) -> str:
    measured = document["measured"]
    machine = measured["machine"]
    reads = ", ".join(
        f"{bytes_text(rate['array_bytes'])}: {bytes_text(rate['bytes_per_second'])}/s"
        for rate in measured["read_rates"]
    )
    products = ", ".join(
        f"{rate['rows']}: {scaled_text(rate['flops_per_second'], 'FLOP')}/s" for rate in measured["product_rates"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    pairs = [
        ("processor", escape(f"{machine['device']}, {machine['threads']} threads, {machine['cpu_flags']}")),
        ("reading an array of", escape(reads)),
        ("products of so many rows with 512 x 2048 weights from memory", escape(products)),
        ("rounds", number(str(measured["rounds"]), "/measured/rounds")),
        ("cached tokens of measured steps", number(str(measured["cached_tokens"]), "/measured/cached_tokens")),
        ("load before", number(number_text(measured["load_average"]), "/measured/load_average")),
        ("other work", escape(measured["conditions"] or "not stated")),
        ("versions", escape(versions)),
    ]
    return section("The machine, and rates that a roofline leaves out", definitions(pairs))
