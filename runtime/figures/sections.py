"""Sections of a figure's page that come from arithmetic: curves, tables, the paper's statements, the setting."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.figures.log_chart import DASHES, HALO, LogCurve, log_chart, power_ticks
from ultramem.runtime.figures.paper import FAMILIES
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, time_text
from ultramem.runtime.report.page import Cell, definitions, details, escape, legend, number, section, table, text_cell

FAMILY_NAMES = {"dense": "dense", "moe": "MoE", "pkm": "PKM", "ultramem": "UltraMem"}
FAMILY_COLORS = {
    family: f"var(--series-{index})" for family, index in (("ultramem", 0), ("moe", 1), ("dense", 2), ("pkm", 3))
}


def with_cache(cached_tokens: int) -> str:
    return f"{cached_tokens:,} cached tokens" if cached_tokens else "no cached tokens"


def headline(document: dict[str, Any]) -> str:
    """What the figure says, in a sentence."""
    claims = document["claims"]
    agree = sum(claim["agrees"] for claim in claims)
    return f"{agree} of {len(claims)} readings of the paper's statements hold by arithmetic"


def arithmetic_sections(document: dict[str, Any]) -> list[str]:
    """A card for every size: time and bytes, with and without a cache."""
    sizes = dict.fromkeys(point["size"] for point in document["arithmetic"])
    return [_size_section(document, size) for size in sizes]


def _size_section(document: dict[str, Any], size: str) -> str:
    by_ratio = document["figure"] == 6
    points = [(index, point) for index, point in enumerate(document["arithmetic"]) if point["size"] == size]
    families = [family for family in FAMILIES if any(point["family"] == family for _, point in points)]
    panels = "".join(
        f"<div><h3>{title}, {with_cache(cached)}</h3>{_chart(points, families, cached, key, by_ratio, title)}</div>"
        for title, key in (("Time", "roofline_us"), ("Memory access", "total_bytes"))
        for cached in document["setting"]["cached_tokens"]
    )
    names = legend((FAMILY_NAMES[family], FAMILY_COLORS[family]) for family in families)
    what = "sparse parameters grow" if by_ratio else "the batch grows"
    note = (
        "A dashed line: weights and cache together are more than the memory of the device."
        if document["device"]["memory_bytes"]
        else "Models of this size may not fit into this machine: this is arithmetic alone."
    )
    return section(
        f"{size.upper()} as {what}, one decode step by arithmetic",
        f'{names}<figure><div class="panels">{panels}</div></figure>',
        details("Every point", _points_table(points, by_ratio)),
        note=note,
    )


def _chart(
    points: list[tuple[int, dict[str, Any]]], families: list[str], cached: int, key: str, by_ratio: bool, title: str
) -> str:
    curves = []
    for family in families:
        chosen = [point for _, point in points if (point["family"], point["cached_tokens"]) == (family, cached)]
        chosen.sort(key=lambda point: point["sparse_ratio"] if by_ratio else point["batch"])
        line = [(point["sparse_ratio"] if by_ratio else point["batch"], point[key]) for point in chosen]
        fitting = sum(point["fits"] is not False for point in chosen)
        name, color = FAMILY_NAMES[family], FAMILY_COLORS[family]
        under = HALO if family == "pkm" else ""  # UltraMem's line is next to it everywhere
        if fitting:
            curves.append(LogCurve(label=name, points=line[:fitting], color=color, style=under))
        if fitting < len(line):
            rest = line[max(0, fitting - 1) :]
            curves.append(LogCurve(label=name, points=rest, color=color, style=f"{under};{DASHES}"))
    text = time_text if key == "roofline_us" else bytes_text
    xs = sorted({x for curve in curves for x, _ in curve.points})
    marks = [1.5, 3, 6, 12, 24, 48, 96] if by_ratio else power_ticks([int(x) for x in xs])
    return log_chart(
        curves,
        x_marks=marks,
        x_text=lambda x: f"{x:,g}",
        y_text=text,
        x_title="sparse parameters / dense model's" if by_ratio else "batch",
        y_title="per step",
        summary=f"{title} per decode step, {with_cache(cached)}",
    )


def _points_table(points: list[tuple[int, dict[str, Any]]], by_ratio: bool) -> str:
    rows, starts = [], []
    before = None
    for index, point in points:
        here = f"/arithmetic/{index}"
        group = (point["family"], point["cached_tokens"])
        if before not in (None, group):
            starts.append(len(rows))
        before = group
        fits = {True: "yes", False: "no", None: "unknown"}[point["fits"]]
        rows.append(
            [
                text_cell(point["model"]),
                Cell(text=f"{point['batch']}", value=float(point["batch"])),
                Cell(text=f"{point['cached_tokens']}", value=float(point["cached_tokens"])),
                Cell(text=number_text(point["sparse_ratio"]), path=f"{here}/sparse_ratio"),
                Cell(text=time_text(point["roofline_us"]), path=f"{here}/roofline_us"),
                Cell(text=bytes_text(point["total_bytes"]), path=f"{here}/total_bytes"),
                Cell(text=bytes_text(point["sparse_bytes"]), path=f"{here}/sparse_bytes"),
                Cell(text=bytes_text(point["cache_bytes"]), path=f"{here}/cache_bytes"),
                Cell(text=scaled_text(point["flops"], "FLOP"), path=f"{here}/flops"),
                Cell(text=bytes_text(point["resident_bytes"]), path=f"{here}/resident_bytes"),
                text_cell(fits),
            ]
        )
    headings = (
        "model", "batch", "cached", "sparse / dense", "time", "bytes", "of experts or rows", "of caches", "FLOPs",
        "resident", "fits",
    )  # fmt: skip
    return table(headings, rows, group_starts=starts)


def claims_section(document: dict[str, Any]) -> str:
    """What the paper says, and what this arithmetic finds."""
    items = []
    for index, claim in enumerate(document["claims"]):
        value = "none"
        if claim["value"] is not None:
            value = number(number_text(claim["value"]), f"/claims/{index}/value", tag="b")
        low = number_text(claim["low"])
        accepted = f"at least {low}" if claim["high"] is None else f"{low} to {number_text(claim['high'])}"
        if claim["low"] == claim["high"]:
            accepted = low
        holds = "holds" if claim["agrees"] else "does not hold"
        items.append(
            f"<li>{escape(claim['paper'])}: <b>{holds}</b>. {escape(claim['quantity'])}: {value}, "
            f"accepted {escape(accepted)}.</li>"
        )
    return section(
        headline(document),
        f"<ul>{''.join(items)}</ul>",
        note="The paper measured its own kernels; this is what bytes and FLOPs alone say on this device.",
    )


def setting_section(document: dict[str, Any]) -> str:
    """Device, setting and assumptions."""
    device, setting = document["device"], document["setting"]
    memory = "unknown"
    if device["memory_bytes"]:
        memory = number(bytes_text(device["memory_bytes"]), "/device/memory_bytes")
    pairs = [
        ("device", escape(device["label"])),
        ("bandwidth", number(bytes_text(device["bytes_per_second"]), "/device/bytes_per_second") + " a second"),
        (
            "matrix products",
            number(scaled_text(device["flops_per_second"], "FLOP"), "/device/flops_per_second") + " a second",
        ),
        ("memory", memory),
        ("bytes of a number", escape(setting["element_bytes"])),
        ("source", escape(device["source"])),
        ("made", escape(document["created"])),
    ]
    items = "".join(f"<li>{escape(each)}</li>" for each in setting["assumptions"])
    return section("Setting and assumptions", definitions(pairs), f"<ul>{items}</ul>")
