"""The section of the machine: what it is, the versions, what each engine took to prepare, and how all was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text
from ultramem.runtime.report.page import Cell, definitions, escape, number, section, table, text_cell
from ultramem.runtime.report.source import NONE, Source, engine_name


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
        "Times of stages and nodes come from separate instrumented forwards, which take turns with plain ones: the "
        "mean of the faster half of them, and percentiles of all. What the instruments cost is measured and taken off.",
        f"Requests generate {settings['new_tokens']} tokens greedily, engine after engine in each round.",
    )
    rows = [
        [
            text_cell(engine_name(engine["name"])),
            *([text_cell(each.name)] if len(sources) > 1 else []),
            Cell(text=f"{engine['max_abs_difference']:.2g}", path=f"{here}/max_abs_difference"),
            Cell(text=f"{engine['tolerance']:.2g}", path=f"{here}/tolerance"),
            *(
                Cell(text=f"{engine[f'{name}_seconds']:.1f} s", path=f"{here}/{name}_seconds")
                for name in ("prepare", "export", "open", "warm_up")
            ),
            Cell(text=str(engine["graphs"]), path=f"{here}/graphs"),
            Cell(text=str(engine["graph_breaks"]), path=f"{here}/graph_breaks"),
            Cell(text=str(engine["cached_graphs"]), path=f"{here}/cached_graphs"),
            Cell(text=NONE)
            if engine["memory_bytes"] is None
            else Cell(text=bytes_text(engine["memory_bytes"]), path=f"{here}/memory_bytes"),
        ]
        for each in sources
        for index, engine in enumerate(each.profile["engines"])
        for here in (f"{each.pointer}/engines/{index}",)
    ]
    headings = (
        "engine", *(["model"] if len(sources) > 1 else []), "largest difference", "accepted", "preparation", "export",
        "open", "compile, warm-up", "graphs", "graph breaks", "from the cache", "memory",
    )  # fmt: skip
    return section(
        "Machine, versions, and how this was measured",
        definitions(pairs),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in method)}</ul>",
        "<h3>Agreement with eager, and what comes before the first token</h3>",
        table(headings, rows),
    )
