"""The sections that both pages share: latency, stages, roofs and machine, for one profile or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ultramem.runtime.profile.arithmetic import STAGES
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text
from ultramem.runtime.report.charts import Bar, Segment, bar_chart, stacked_bars
from ultramem.runtime.report.page import (
    Cell,
    definitions,
    details,
    escape,
    legend,
    number,
    section,
    table,
    text_cell,
)

SERIES = tuple(f"var(--series-{index})" for index in range(6))
PHASES = ("prefill", "decode")
ENGINE_NAMES = {"compile": "torch.compile", "onnx": "ONNX Runtime", "aoti": "AOTInductor", "tensorrt": "TensorRT"}
STAGE_NAMES = {"mlp": "MLP"}
_DARK_STAGES = ("select", "attention", "mlp", "head")


class Source(NamedTuple):
    """A profile, and where it is in the page's JSON."""

    profile: dict[str, Any]
    pointer: str

    @property
    def name(self) -> str:
        return str(self.profile["model"]["name"])


def engine_name(engine: str) -> str:
    return ENGINE_NAMES.get(engine, engine)


def stage_name(stages: Sequence[str]) -> str:
    """ "query", or "score + select" for what is fused."""
    return " + ".join(STAGE_NAMES.get(stage, stage) for stage in stages)


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
        f"<h3>{escape(_phase_title(phase, settings['prompt_tokens']))}</h3><div class='panels'>"
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


def _phase_title(phase: str, tokens: int) -> str:
    return f"Prefill of {tokens} tokens" if phase == "prefill" else f"Decode step, {tokens} tokens in the cache"


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
    unit, scale = _time_scale([bar.value for row in rows for bar in row])
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
            ]
        )
    headings = (
        "engine", "phase", "batch", "p50", "p90", "p99", "p50 of each round", "samples", "tokens/s",
        "of bandwidth", "of GEMM rate",
    )  # fmt: skip
    return table(headings, rows, group_starts=starts)


def stage_section(sources: Sequence[Source]) -> str:
    """Stacked bars of the stages for every engine, phase and batch, and their times in tables."""
    settings = sources[0].profile["settings"]
    batches = settings["batches"]
    blocks = [
        f"<h3>{escape(_phase_title(phase, settings['prompt_tokens']))}</h3><div class='panels'>"
        f"{''.join(_stage_panel(sources, phase, batch) for batch in batches)}</div>"
        for phase in PHASES
    ]
    present = [stage for stage in STAGES if any((stage,) == tuple(row["stages"]) for row in _all_rows(sources))]
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
    return section(
        _stage_headline(sources[0]),
        legend(entries),
        f"<figure>{''.join(blocks)}<figcaption>Each bar is one instrumented forward, slower than the latency above "
        f"by the cost of the timers. How the stages are told apart:</figcaption></figure><ul>{how}</ul>",
        details("Time of every stage, and of what compilers fused", tables),
    )


def _all_rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [row for source in sources for times in source.profile["stages"] for row in times["rows"]]


def _stage_headline(source: Source) -> str:
    """The largest stages of the first engine's decode step."""
    times = next((times for times in source.profile["stages"] if times["phase"] == "decode" and times["rows"]), None)
    if times is None:
        return "Time by stage: no engine's stages can be told apart"
    rows = sorted(times["rows"], key=lambda row: -row["time_us"])[:2]
    parts = " and ".join(f"{stage_name(row['stages'])} {share_text(row['time_us'] / times['wall_us'])}" for row in rows)
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
            rows.append((label, time_text(times["wall_us"]), _segments(times)))
    unit, scale = _time_scale([sum(segment.value for segment in segments) for _, _, segments in rows])
    chart = stacked_bars(
        rows, unit=f"{unit} per forward, batch {batch}", scale=scale, summary=f"{phase}, batch {batch}"
    )
    return chart


def _segments(times: dict[str, Any]) -> list[Segment]:
    wall_us = times["wall_us"]

    def segment(label: str, value_us: float, look: str, *, is_dark: bool = False) -> Segment:
        tooltip = f"{label}: {time_text(value_us)}, {share_text(value_us / wall_us)}"
        return Segment(label=label, value=value_us, look=look, is_dark=is_dark, tooltip=tooltip)

    segments = []
    for row in times["rows"]:
        if len(row["stages"]) == 1:
            (stage,) = row["stages"]
            segments.append(
                segment(stage_name((stage,)), row["time_us"], f"var(--{stage})", is_dark=stage in _DARK_STAGES)
            )
    fused = [row for row in times["rows"] if len(row["stages"]) > 1]
    if fused:
        names = "; ".join(f"{stage_name(row['stages'])} {time_text(row['time_us'])}" for row in fused)
        segments.append(segment(f"fused over stages ({names})", sum(row["time_us"] for row in fused), "fused"))
    label = "outside every stage" if times["rows"] else "not separable"
    return [*segments, segment(label, max(0.0, times["unattributed_us"]), "outside")]


def _stage_table(source: Source, phase: str, batch: int) -> str:
    """Stages down, engines across."""
    chosen = [
        (index, times)
        for index, times in enumerate(source.profile["stages"])
        if (times["phase"], times["batch"]) == (phase, batch)
    ]
    places = {
        (index, tuple(row["stages"])): (f"{source.pointer}/stages/{index}/rows/{place}/time_us", row["time_us"])
        for index, times in chosen
        for place, row in enumerate(times["rows"])
    }
    keys = sorted(
        {stages for _, stages in places}, key=lambda key: (len(key) > 1, [STAGES.index(stage) for stage in key])
    )
    rows = []
    for key in keys:
        cells = [text_cell(stage_name(key))]
        for index, _ in chosen:
            place = places.get((index, key))
            cells.append(Cell(text="–") if place is None else Cell(text=time_text(place[1]), path=place[0]))  # noqa: RUF001  # an en dash for "none"
        rows.append(cells)
    for name, label in (("unattributed_us", "outside every stage"), ("wall_us", "sum")):
        rows.append(
            [
                text_cell(label),
                *(
                    Cell(text=time_text(times[name]), path=f"{source.pointer}/stages/{index}/{name}")
                    for index, times in chosen
                ),
            ]
        )
    rows.append(
        [
            text_cell("explained by stages"),
            *(
                Cell(text=share_text(times["coverage"]), path=f"{source.pointer}/stages/{index}/coverage")
                for index, times in chosen
            ),
        ]
    )
    headings = ("stage", *(engine_name(times["engine"]) for _, times in chosen))
    title = f"{source.name}, {phase}, batch {batch}"
    return f"<h3>{escape(title)}</h3>{table(headings, rows, total_rows=[len(rows) - 2])}"


def roofline_section(source: Source) -> str:
    """Bytes, FLOPs and the shortest possible time by stage, against the time measured."""
    profile = source.profile
    machine = profile["machine"]
    batch = profile["settings"]["batches"][0]
    cost = [row for row in profile["arithmetic"] if (row["phase"], row["batch"]) == ("decode", batch)]
    total = sum(row["total_bytes"] for row in cost)
    heaviest = max(cost, key=lambda row: row["total_bytes"])
    title = (
        f"{source.name} must move {bytes_text(total)} for a decode step at batch {batch}, "
        f"{share_text(heaviest['total_bytes'] / total)} of it in {stage_name((heaviest['stage'],))}"
    )
    cache = machine["last_level_cache_bytes"]
    weight_bytes = profile["model"]["weight_bytes"]
    caution = (
        f" The weights ({bytes_text(weight_bytes)}) fit in the last-level cache ({bytes_text(cache)}), which is faster "
        "than memory: shares above 100 % are possible."
        if cache and weight_bytes <= cache
        else ""
    )
    note = (
        f"By arithmetic: every weight, row and activation crosses the memory bus once. Shortest time: the longer of "
        f"bytes at {bytes_text(machine['bytes_per_second'])}/s and FLOPs at "
        f"{scaled_text(machine['gemm_flops_per_second'], 'FLOP')}/s, both measured on this machine; the share is that "
        f"time over the stage's measured time.{caution}"
    )
    blocks: list[str] = []
    for phase in ("decode", "prefill"):
        for each in profile["settings"]["batches"]:
            block = f"<h3>{escape(f'{phase}, batch {each}'.capitalize())}</h3>{_roofline_table(source, phase, each)}"
            is_first = not blocks
            blocks.append(block if is_first else details(f"{phase}, batch {each}".capitalize(), block))
    return section(title, *blocks, note=note)


def _roofline_table(source: Source, phase: str, batch: int) -> str:
    profile = source.profile
    engines = [
        times for times in profile["stages"] if (times["phase"], times["batch"]) == (phase, batch) and times["rows"]
    ]
    rows = []
    totals = {"flops": 0, "weight_bytes": 0, "row_bytes": 0, "cache_bytes": 0, "activation_bytes": 0, "total_bytes": 0}
    shortest_us = 0.0
    for index, cost in enumerate(profile["arithmetic"]):
        if (cost["phase"], cost["batch"]) != (phase, batch):
            continue
        here = f"{source.pointer}/arithmetic/{index}"
        cells = [text_cell(stage_name((cost["stage"],)))]
        for name in totals:
            totals[name] += cost[name]
            cells.append(Cell(text=_amount(name, cost[name]), path=f"{here}/{name}"))
        shortest_us += cost["roofline_us"]
        cells.append(Cell(text=time_text(cost["roofline_us"]), path=f"{here}/roofline_us"))
        for times in engines:
            measured = {tuple(row["stages"]): row["time_us"] for row in times["rows"]}.get((cost["stage"],))
            share = cost["roofline_us"] / measured if measured else None
            cells.append(
                Cell(text="–") if share is None else Cell(text=share_text(share), value=share)  # noqa: RUF001  # an en dash for "none"
            )
        rows.append(cells)
    total = [text_cell("whole forward")]
    total += [Cell(text=_amount(name, value), value=value) for name, value in totals.items()]
    total.append(Cell(text=time_text(shortest_us), value=shortest_us))
    for times in engines:
        row = next(
            row
            for row in profile["latency"]
            if (row["phase"], row["batch"], row["engine"]) == (phase, batch, times["engine"])
        )
        share = shortest_us / row["p50_us"]
        total.append(Cell(text=share_text(share), value=share))
    headings = (
        "stage", "FLOPs", "weights", "rows", "caches", "activations", "bytes", "shortest time",
        *(f"share, {engine_name(times['engine'])}" for times in engines),
    )  # fmt: skip
    return table(headings, [*rows, total], total_rows=[len(rows)])


def _amount(name: str, value: float) -> str:
    if value == 0:
        return "–"  # noqa: RUF001  # an en dash for "none"
    return scaled_text(value, "FLOP") if name == "flops" else bytes_text(value)


def machine_section(sources: Sequence[Source]) -> str:
    """The machine, the versions, and how all of it was measured."""
    source = sources[0]
    machine, settings = source.profile["machine"], source.profile["settings"]
    here = f"{source.pointer}/machine"
    cache = machine["last_level_cache_bytes"]
    pairs = [
        ("Processor", f"{escape(machine['device'])}, cores: {machine['cores']}, threads: {machine['threads']}"),
        ("Instructions", escape(machine["cpu_flags"])),
        (
            "Memory bandwidth",
            f"{number(bytes_text(machine['bytes_per_second']), f'{here}/bytes_per_second')}/s "
            f"(reading {number(bytes_text(machine['read_bytes_per_second']), f'{here}/read_bytes_per_second')}/s, "
            f"copying {number(bytes_text(machine['copy_bytes_per_second']), f'{here}/copy_bytes_per_second')}/s)",
        ),
        (
            "float32 GEMM",
            f"{number(scaled_text(machine['gemm_flops_per_second'], 'FLOP'), f'{here}/gemm_flops_per_second')}/s",
        ),
        *([("Last-level cache", number(bytes_text(cache), f"{here}/last_level_cache_bytes"))] if cache else []),
        ("System", f"{escape(machine['system'])}, Python {escape(machine['python'])}"),
        ("Versions", escape(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))),
        ("Measured", escape(source.profile["created"].replace("T", " ").replace("+00:00", " UTC"))),
    ]
    method = (
        "Every engine's logits, for prefill and decode at each batch, are compared with eager's first; the accepted "
        "difference is four times eager's own error against float64, and nothing is reported beyond it.",
        f"The engines take turns in {settings['rounds']} rounds after a warm-up; each engine, batch and phase has "
        f"{number_text(settings['seconds_per_cell'])} s or {settings['max_samples']} samples, whichever ends first. "
        "A decode step always starts from the same cache.",
        "Stage times come from a separate instrumented forward, the mean of the faster half of its runs.",
    )
    rows = [
        [
            text_cell(engine_name(engine["name"])),
            *([text_cell(each.name)] if len(sources) > 1 else []),
            Cell(text=f"{engine['max_abs_difference']:.2g}", path=f"{each.pointer}/engines/{index}/max_abs_difference"),
            Cell(text=f"{engine['tolerance']:.2g}", path=f"{each.pointer}/engines/{index}/tolerance"),
            Cell(text=f"{engine['prepare_seconds']:.1f} s", path=f"{each.pointer}/engines/{index}/prepare_seconds"),
        ]
        for each in sources
        for index, engine in enumerate(each.profile["engines"])
    ]
    headings = ("engine", *(["model"] if len(sources) > 1 else []), "largest difference", "accepted", "preparation")
    return section(
        "Machine, versions, and how this was measured",
        definitions(pairs),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in method)}</ul>",
        "<h3>Agreement with eager</h3>",
        table(headings, rows),
    )


def _time_scale(values_us: Sequence[float]) -> tuple[str, float]:
    high = max(values_us, default=1.0)
    return ("s", 1e6) if high >= 1e6 else ("ms", 1e3) if high >= 1e3 else ("µs", 1.0)
