"""The section of requests: first token, tokens after it, and what a request costs besides time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultramem.runtime.profile.units import bytes_text, number_text, time_text
from ultramem.runtime.report.charts import Bar, bar_chart
from ultramem.runtime.report.page import Cell, details, escape, legend, section, table, text_cell
from ultramem.runtime.report.source import NONE, SERIES, Source, chosen, engine_name, time_scale


def request_section(sources: Sequence[Source]) -> str:
    """Bars of the gaps between tokens, and a table of everything."""
    settings = sources[0].profile["settings"]
    charts = "".join(_gap_chart(sources, batch) for batch in settings["batches"])
    names = (
        legend((source.name, SERIES[index % len(SERIES)]) for index, source in enumerate(sources))
        if len(sources) > 1
        else ""
    )
    note = (
        f"Greedy generation of {settings['new_tokens']} tokens after a prompt of {settings['prompt_tokens']}, with a "
        "growing cache. The first token waits for the prefill; a later one for the one before it."
    )
    caption = (
        "Bar: median time from one token to the next. Caps: 90th and 99th percentile; an arrow means that it lies "
        "beyond the axis. Lower is better."
    )
    rows_touched = _row_use_table(sources)
    methods = {row["memory_method"] for source in sources for row in source.profile["requests"]}
    explained = (
        "Launches: generated kernels of a decode step of a compiled engine, nodes of ONNX Runtime, outermost operators "
        "of eager. Recompiles: graphs that were compiled during the requests. Memory: highest resident memory of a "
        f"request, less that before it ({'; '.join(sorted(methods))}); memory that an engine keeps between requests is "
        "not in it. Page faults: of a request, without and with reading from the disk."
    )
    return section(
        _headline(sources[0]),
        names,
        f"<figure><div class='panels'>{charts}</div><figcaption>{escape(caption)}</figcaption></figure>",
        "<h3>Requests</h3>",
        *(_request_table(source, is_named=len(sources) > 1) for source in sources),
        f'<p class="note">{escape(explained)}</p>',
        details("Rows of the value tables that a forward reads", rows_touched) if rows_touched else "",
        note=note,
    )


def _headline(source: Source) -> str:
    batch = min(source.profile["settings"]["batches"])
    _, row = min(chosen(source.profile["requests"], batch=batch), key=lambda pair: pair[1]["tpot_us"])
    return (
        f"A request: {time_text(row['ttft_us'])} to the first token, {time_text(row['tpot_us'])} per token after it "
        f"({source.name}, {engine_name(row['engine'])}, batch {batch})"
    )


def _gap_chart(sources: Sequence[Source], batch: int) -> str:
    engines = dict.fromkeys(row["engine"] for source in sources for row in source.profile["requests"])
    rows = [bars for engine in engines if (bars := _gap_bars(sources, batch, engine))]
    unit, scale = time_scale([bar.value for bars in rows for bar in bars])
    summary = f"time between tokens, batch {batch}"
    return f"<div>{bar_chart(rows, unit=f'{unit} between tokens, batch {batch}', scale=scale, summary=summary)}</div>"


def _gap_bars(sources: Sequence[Source], batch: int, engine: str) -> list[Bar]:
    return [
        Bar(
            label=engine_name(engine),
            value=row["gap_p50_us"],
            middle=row["gap_p90_us"],
            end=row["gap_p99_us"],
            text=time_text(row["gap_p50_us"]),
            path=f"{source.pointer}/requests/{place}/gap_p50_us",
            color=SERIES[color % len(SERIES)],
            tooltip=f"{source.name}, {engine_name(engine)}, batch {batch}: {row['gaps']} gaps of {row['requests']} "
            "requests",
        )
        for color, source in enumerate(sources)
        for place, row in chosen(source.profile["requests"], batch=batch, engine=engine)
    ]


def _request_table(source: Source, *, is_named: bool) -> str:
    rows, starts = [], []
    requests = source.profile["requests"]
    for place, row in enumerate(requests):
        here = f"{source.pointer}/requests/{place}"
        if place and row["batch"] != requests[place - 1]["batch"]:
            starts.append(place)
        times = ("ttft_us", "ttft_p90_us", "tpot_us", "gap_p50_us", "gap_p90_us", "gap_p99_us")
        rows.append(
            [
                text_cell(engine_name(row["engine"])),
                Cell(text=str(row["batch"]), path=f"{here}/batch"),
                *(Cell(text=time_text(row[name]), path=f"{here}/{name}") for name in times),
                Cell(text=number_text(row["tokens_per_second"]), path=f"{here}/tokens_per_second"),
                _count(row, "launches_per_step", here),
                _count(row, "recompiles", here),
                Cell(text=NONE)
                if row["memory_bytes"] is None
                else Cell(text=bytes_text(row["memory_bytes"]), path=f"{here}/memory_bytes"),
                _count(row, "minor_faults", here),
                _count(row, "major_faults", here),
                _count(row, "requests", here),
                Cell(text=f"{row['max_abs_difference']:.2g}", path=f"{here}/max_abs_difference"),
            ]
        )
    headings = (
        "engine", "batch", "first token", "its p90", "per token", "gap p50", "gap p90", "gap p99", "tokens/s",
        "launches per step", "recompiles", "memory", "page faults", "from disk", "requests", "largest difference",
    )  # fmt: skip
    title = f"<h3>{escape(source.name)}</h3>" if is_named else ""
    return title + table(headings, rows, group_starts=starts)


def _count(row: dict[str, Any], name: str, here: str) -> Cell:
    return Cell(text=NONE) if row[name] is None else Cell(text=f"{row[name]:,}", path=f"{here}/{name}")


def _row_use_table(sources: Sequence[Source]) -> str:
    rows = [
        [
            text_cell(source.name),
            text_cell(row["table"]),
            text_cell(row["phase"]),
            _count(row, "batch", here),
            _count(row, "reads", here),
            _count(row, "rows_touched", here),
            _count(row, "table_rows", here),
            Cell(text=bytes_text(row["rows_touched"] * row["row_bytes"]), value=row["rows_touched"] * row["row_bytes"]),
        ]
        for source in sources
        for place, row in enumerate(source.profile["row_use"])
        for here in (f"{source.pointer}/row_use/{place}",)
    ]
    headings = ("model", "table", "phase", "batch", "reads", "different rows", "rows in all", "bytes of those read")
    return table(headings, rows) if rows else ""
