"""The section of latencies: bars for prefill and decode, and every percentile in a table."""

from __future__ import annotations

from collections.abc import Sequence

from ultramem.runtime.profile.units import number_text, share_text, time_text
from ultramem.runtime.report.charts import Bar, bar_chart
from ultramem.runtime.report.page import Cell, details, escape, legend, section, table, text_cell
from ultramem.runtime.report.source import PHASES, SERIES, Source, engine_name, phase_title, time_scale


def latency_headline(source: Source) -> str:
    """What the decode latencies say, in a sentence."""
    rows = [row for row in source.profile["latency"] if row["phase"] == "decode"]
    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    best = min(rows, key=lambda row: row["p50_us"])
    eager = next((row for row in rows if row["engine"] == "eager"), None)
    sentence = f"{engine_name(best['engine'])} decodes a token in {time_text(best['p50_us'])} at batch {batch}"
    if eager is None or eager is best:
        return sentence
    return f"{sentence}, {number_text(eager['p50_us'] / best['p50_us'], 2)} times faster than eager"


def latency_section(sources: Sequence[Source]) -> str:
    """Bars with whiskers for prefill and decode, and every percentile in a table."""
    settings = sources[0].profile["settings"]
    blocks = "".join(
        f"<h3>{escape(phase_title(phase, settings['prompt_tokens']))}</h3><div class='panels'>"
        f"{''.join(_latency_panel(sources, phase, batch) for batch in settings['batches'])}</div>"
        for phase in PHASES
    )
    names = legend((source.name, SERIES[index % len(SERIES)]) for index, source in enumerate(sources))
    if len(sources) == 1:
        title = latency_headline(sources[0])
        names = ""
    else:
        title = _comparison(sources)
    tables = "".join(
        (f"<h3>{escape(source.name)}</h3>" if len(sources) > 1 else "") + _latency_table(source) for source in sources
    )
    return section(
        title,
        f"{names}<figure>{blocks}<figcaption>Bar: median. Caps: 90th and 99th percentile; an "
        "arrow means that the 99th lies beyond the axis. Lower is better.</figcaption></figure>",
        details("All percentiles and shares of the measured roofs", tables),
    )


def _comparison(sources: Sequence[Source]) -> str:
    """The models' best decode latencies against each other."""
    best = []
    for source in sources:
        rows = [row for row in source.profile["latency"] if row["phase"] == "decode"]
        batch = min(row["batch"] for row in rows)
        best.append(min((row for row in rows if row["batch"] == batch), key=lambda row: row["p50_us"]))
    parts = [
        f"{source.name} {time_text(row['p50_us'])} ({engine_name(row['engine'])})"
        for source, row in zip(sources, best, strict=True)
    ]
    return f"Fastest decode step at batch {best[0]['batch']}: {', '.join(parts)}"


def _latency_panel(sources: Sequence[Source], phase: str, batch: int) -> str:
    engines = dict.fromkeys(row["engine"] for source in sources for row in source.profile["latency"])
    rows = [row for engine in engines if (row := _latency_bars(sources, phase, batch, engine))]
    unit, scale = time_scale([bar.value for row in rows for bar in row])
    return bar_chart(rows, unit=f"{unit} per forward, batch {batch}", scale=scale, summary=f"{phase}, batch {batch}")


def _latency_bars(sources: Sequence[Source], phase: str, batch: int, engine: str) -> list[Bar]:
    bars = []
    for color, source in enumerate(sources):
        for index, row in enumerate(source.profile["latency"]):
            if (row["phase"], row["batch"], row["engine"]) != (phase, batch, engine):
                continue
            percentiles = ", ".join(f"{name} {time_text(row[f'{name}_us'])}" for name in ("p50", "p90", "p99"))
            bars.append(
                Bar(
                    label=engine_name(engine),
                    value=row["p50_us"],
                    middle=row["p90_us"],
                    end=row["p99_us"],
                    text=time_text(row["p50_us"]),
                    path=f"{source.pointer}/latency/{index}/p50_us",
                    color=SERIES[color % len(SERIES)],
                    tooltip=f"{source.name}, {engine_name(engine)}, batch {batch}, {phase}: {percentiles}",
                )
            )
    return bars


def _latency_table(source: Source) -> str:
    rows, starts = [], []
    latency = source.profile["latency"]
    best: dict[tuple[str, int], float] = {}
    for row in latency:
        key = (row["phase"], row["batch"])
        best[key] = min(best.get(key, row["p50_us"]), row["p50_us"])
    for index, row in enumerate(latency):
        here = f"{source.pointer}/latency/{index}"
        if index and (row["phase"], row["batch"]) != (latency[index - 1]["phase"], latency[index - 1]["batch"]):
            starts.append(index)
        low, high = time_text(row["round_p50_low_us"]), time_text(row["round_p50_high_us"])
        is_best = row["p50_us"] == best[(row["phase"], row["batch"])]
        rows.append(
            [
                text_cell(engine_name(row["engine"])),
                text_cell(row["phase"]),
                Cell(text=str(row["batch"]), path=f"{here}/batch"),
                Cell(text=time_text(row["p50_us"]), path=f"{here}/p50_us", is_best=is_best),
                Cell(text=time_text(row["p90_us"]), path=f"{here}/p90_us"),
                Cell(text=time_text(row["p99_us"]), path=f"{here}/p99_us"),
                Cell(text=f"{low} – {high}"),  # noqa: RUF001  # an en dash between the ends of a range
                Cell(text=str(row["samples"]), path=f"{here}/samples"),
                Cell(text=number_text(row["tokens_per_second"]), path=f"{here}/tokens_per_second"),
                Cell(text=share_text(row["bandwidth_share"]), path=f"{here}/bandwidth_share"),
                Cell(text=share_text(row["compute_share"]), path=f"{here}/compute_share"),
                Cell(text=f"{row['max_abs_difference']:.2g}", path=f"{here}/max_abs_difference"),
            ]
        )
    headings = (
        "engine", "phase", "batch", "p50", "p90", "p99", "p50 of each round", "samples", "tokens/s",
        "of bandwidth", "of GEMM rate", "largest difference",
    )  # fmt: skip
    return table(headings, rows, group_starts=starts)
