"""The section of roofs: bytes, FLOPs and the shortest possible time by stage, and the roofline plot."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text
from ultramem.runtime.report.page import Cell, details, escape, legend, section, table, text_cell
from ultramem.runtime.report.roofline_plot import Point, roofline_plot
from ultramem.runtime.report.source import NONE, Source, chosen, engine_name, stage_name

PLOT = (
    "Both axes are logarithmic. A dot is a stage: its FLOPs by arithmetic over its measured time. The line is what the "
    "machine was measured to reach: its bandwidth times the FLOPs per byte, and no more than its rate of a large "
    "matrix product. A ring is a stage of which a part is in fused kernels, so that its own time is too short. Stages "
    "without FLOPs have no place here."
)


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
    present = [row["stage"] for row in cost if row["flops"]]
    return section(
        title,
        f"<h3>Decode step, batch {batch}, under the roofs of this machine</h3>",
        legend((stage_name((stage,)), f"var(--{stage})") for stage in present),
        f"<figure><div class='panels'>{_plots(source, batch)}</div><figcaption>{escape(PLOT)}</figcaption></figure>",
        *blocks,
        details("Every stage row: percentiles, intensity and shares of the roofs", _row_tables(source)),
        note=note,
    )


def _plots(source: Source, batch: int) -> str:
    machine, plots = source.profile["machine"], []
    for _, times in chosen(source.profile["stages"], phase="decode", batch=batch):
        points = [
            Point(
                label=stage_name(row["stages"]),
                flops_per_byte=row["flops_per_byte"],
                flops_per_second=row["flops"] / row["time_us"] * 1e6,
                color=f"var(--{row['stages'][0]})",
                is_bound=not row["is_whole"],
                tooltip=f"{stage_name(row['stages'])}: {number_text(row['flops_per_byte'])} FLOP per byte, "
                f"{scaled_text(row['flops'] / row['time_us'] * 1e6, 'FLOP')}/s, "
                f"{share_text(row['bandwidth_share'])} of the bandwidth",
            )
            for row in times["rows"]
            if row["flops"]
        ]
        if points:
            plot = roofline_plot(
                points,
                bytes_per_second=machine["bytes_per_second"],
                flops_per_second=machine["gemm_flops_per_second"],
                summary=f"roofline of {times['engine']}, decode, batch {batch}",
            )
            plots.append(f"<div><h4>{escape(engine_name(times['engine']))}</h4>{plot}</div>")
    return "".join(plots)


def _row_tables(source: Source) -> str:
    """A row for every stage row of every engine, batch and phase."""
    rows, starts = list[list[Cell]](), list[int]()
    for place, times in enumerate(source.profile["stages"]):
        starts.append(len(rows))
        for index, row in enumerate(times["rows"]):
            here = f"{source.pointer}/stages/{place}/rows/{index}"
            rows.append(
                [
                    text_cell(f"{engine_name(times['engine'])}, {times['phase']}, batch {times['batch']}"),
                    text_cell(stage_name(row["stages"]) + ("" if row["is_whole"] else " (a part)")),
                    Cell(text=str(row["calls"]), path=f"{here}/calls"),
                    *(
                        Cell(text=time_text(row[name]), path=f"{here}/{name}")
                        for name in ("p50_us", "p90_us", "p99_us")
                    ),
                    _known(row, "flops", here),
                    _known(row, "bytes", here),
                    _known(row, "flops_per_byte", here),
                    _known(row, "bandwidth_share", here),
                    _known(row, "compute_share", here),
                ]
            )
    headings = (
        "engine", "stage", "calls", "p50", "p90", "p99", "FLOPs", "bytes", "FLOP per byte", "of bandwidth",
        "of GEMM rate",
    )  # fmt: skip
    return table(headings, rows, group_starts=starts[1:])


def _known(row: dict[str, Any], name: str, here: str) -> Cell:
    value = row[name]
    if value is None:
        return Cell(text=NONE)
    if name in ("flops", "bytes"):
        text = _amount(name, value)
    else:
        text = share_text(value) if name.endswith("share") else number_text(value)
    return Cell(text=text, path=f"{here}/{name}")


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
            cells.append(Cell(text=NONE) if share is None else Cell(text=share_text(share), value=share))
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
        return NONE
    return scaled_text(value, "FLOP") if name == "flops" else bytes_text(value)
