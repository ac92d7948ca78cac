"""The section of graph nodes: the longest of each engine, and time by module, which all engines have in common."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text
from ultramem.runtime.report.page import Cell, details, escape, section, table, text_cell
from ultramem.runtime.report.source import NONE, Source, chosen, engine_name, stage_name

SHOWN = 12
"""Nodes an engine on the page; the JSON in it has them all."""


def node_section(source: Source) -> str:
    """Of the decode step at the smallest batch; other batches and phases open on a click."""
    batches = source.profile["settings"]["batches"]
    blocks: list[str] = []
    for phase in ("decode", "prefill"):
        for batch in batches:
            title = f"{phase}, batch {batch}".capitalize()
            block = (
                f"<h3>{escape(title)}, longest nodes</h3>{_node_table(source, phase, batch)}"
                f"{details(f'{title}, work of all nodes together', _work_table(source, phase, batch))}"
                f"{details(f'{title}, time by module', _module_table(source, phase, batch))}"
            )
            blocks.append(block if not blocks else details(f"{title}, nodes", block))
    note = (
        "A node is an operator or a generated kernel of the graph that really ran. Its modules are those it computes "
        "for, kept through every lowering; a kernel may be fused over several. Percentiles are over the instrumented "
        "forwards. Bytes and FLOPs follow from the shapes of its operands: each is read or written once, of a table "
        "the rows that are asked for; where they take over 100 % of the bandwidth, caches hold them. The difference "
        "is the engine's largest one from eager's logits."
    )
    return section(_headline(source), *blocks, note=note)


def _headline(source: Source) -> str:
    batch = min(source.profile["settings"]["batches"])
    parts = []
    for _, times in chosen(source.profile["stages"], phase="decode", batch=batch):
        if times["nodes"]:
            node = max(times["nodes"], key=lambda node: node["p50_us"])
            share = share_text(node["p50_us"] / times["sum_us"])
            parts.append(f"{_modules_text(node['modules'])} takes {share} on {engine_name(times['engine'])}")
    what = f"Longest node of a decode step of {source.name}: " if parts else f"Nodes of {source.name}: none are known"
    return what + ", ".join(parts)


def _node_table(source: Source, phase: str, batch: int) -> str:
    rows, starts = list[list[Cell]](), list[int]()
    for place, times in chosen(source.profile["stages"], phase=phase, batch=batch):
        order = sorted(range(len(times["nodes"])), key=lambda index: -times["nodes"][index]["p50_us"])
        starts.append(len(rows))
        for index in order[:SHOWN]:
            node, here = times["nodes"][index], f"{source.pointer}/stages/{place}/nodes/{index}"
            share = node["p50_us"] / times["sum_us"]
            rows.append(
                [
                    text_cell(engine_name(times["engine"])),
                    text_cell(_modules_text(node["modules"])),
                    text_cell(_kind_text(node)),
                    text_cell(stage_name(node["stages"])),
                    Cell(text=str(node["calls"]), path=f"{here}/calls"),
                    *(
                        Cell(text=time_text(node[name]), path=f"{here}/{name}")
                        for name in ("p50_us", "p90_us", "p99_us")
                    ),
                    Cell(text=share_text(share), value=share),
                    *_work_cells(node, here),
                    *_rate_cells(node, here),
                    Cell(
                        text=f"{times['max_abs_difference']:.2g}",
                        path=f"{source.pointer}/stages/{place}/max_abs_difference",
                    ),
                ]
            )
    headings = (
        *("engine", "module", "node", "stage", "calls", "p50", "p90", "p99", "of the forward"),
        *("FLOPs", "bytes", "FLOP per byte", "of bandwidth", "of GEMM rate", "difference"),
    )
    return table(headings, rows, group_starts=starts[1:])


def _work_table(source: Source, phase: str, batch: int) -> str:
    """All nodes of an engine together, beside the least that a forward must move."""
    costs = [cost for _, cost in chosen(source.profile["arithmetic"], phase=phase, batch=batch)]
    flops, size = sum(cost["flops"] for cost in costs), sum(cost["total_bytes"] for cost in costs)
    rows = [_work_row("arithmetic", flops, size, size, 0)]
    for _, times in chosen(source.profile["stages"], phase=phase, batch=batch):
        known = [node for node in times["nodes"] if node["bytes"] is not None]
        if known:
            unknown = sum(node["calls"] for node in times["nodes"]) - sum(node["calls"] for node in known)
            own_flops, own_size = (sum(node[name] for node in known) for name in ("flops", "bytes"))
            rows.append(_work_row(engine_name(times["engine"]), own_flops, own_size, size, unknown))
    return table(("engine", "FLOPs", "bytes", "times the least bytes", "launches that do not tell"), rows)


def _work_row(name: str, flops: int, size: int, least: int, unknown: int) -> list[Cell]:
    return [
        text_cell(name),
        Cell(text=scaled_text(flops, "FLOP"), value=flops),
        Cell(text=bytes_text(size), value=size),
        Cell(text=number_text(size / least), value=size / least),
        Cell(text=str(unknown), value=unknown),
    ]


def _module_table(source: Source, phase: str, batch: int) -> str:
    """Modules down with their arithmetic, engines across with time and shares of the roofs."""
    engines = [pair for pair in chosen(source.profile["stages"], phase=phase, batch=batch) if pair[1]["modules"]]
    found: dict[tuple[str, ...], dict[int, tuple[str, dict[str, Any]]]] = {}
    for stage_place, times in engines:
        for index, row in enumerate(times["modules"]):
            path = f"{source.pointer}/stages/{stage_place}/modules/{index}"
            found.setdefault(tuple(row["modules"]), {})[stage_place] = (path, row)
    rows = []
    for modules in sorted(found, key=len):
        path, row = next(
            (pair for pair in found[modules].values() if pair[1]["flops"] is not None),
            next(iter(found[modules].values())),
        )
        cells = [
            text_cell(" + ".join(modules)),
            *_work_cells(row, path),
        ]
        for stage_place, _ in engines:
            if stage_place not in found[modules]:
                cells += [Cell(text=NONE)] * 3
                continue
            path, row = found[modules][stage_place]
            cells.append(Cell(text=time_text(row["time_us"]), path=f"{path}/time_us"))
            cells += _rate_cells(row, path)
        rows.append(cells)
    headings = ["module", "FLOPs", "bytes", "FLOP per byte"]
    for _, times in engines:
        headings += [engine_name(times["engine"]), "of bandwidth", "of GEMM rate"]
    return table(headings, rows)


def _work_cells(row: dict[str, Any], path: str) -> list[Cell]:
    return [
        _value_cell(row, "flops", path, scaled_text(row["flops"] or 0, "FLOP")),
        _value_cell(row, "bytes", path, bytes_text(row["bytes"] or 0)),
        _value_cell(row, "flops_per_byte", path, number_text(row["flops_per_byte"] or 0)),
    ]


def _rate_cells(row: dict[str, Any], path: str) -> list[Cell]:
    return [_value_cell(row, name, path, share_text(row[name] or 0)) for name in ("bandwidth_share", "compute_share")]


def _value_cell(row: dict[str, Any], name: str, path: str, text: str) -> Cell:
    return Cell(text=NONE) if row[name] is None else Cell(text=text, path=f"{path}/{name}")


def _modules_text(modules: list[str]) -> str:
    if not modules:
        return "not known"
    return modules[0] if len(modules) == 1 else f"{modules[0]} + {len(modules) - 1} more"


def _kind_text(node: dict[str, Any]) -> str:
    return "outside its operators" if node["kind"] == "module" else str(node["kind"])
