"""The section that compares models on engines: a matrix for each figure of a request."""

from __future__ import annotations

from collections.abc import Sequence

from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, time_text
from ultramem.runtime.report.page import Cell, escape, section, table, text_cell
from ultramem.runtime.report.source import NONE, Source, chosen, engine_name

FIGURES = (
    ("tpot_us", "Time per token after the first", False),
    ("ttft_us", "Time to the first token", False),
    ("tokens_per_second", "Tokens per second", True),
)
"""Field, title, and whether more is better."""


def matrix_section(sources: Sequence[Source]) -> str:
    """Engines down, models across, for every figure and batch; and what the models are."""
    batches = sources[0].profile["settings"]["batches"]
    blocks = [f"<div><h3>Models</h3>{_model_table(sources)}</div>"]
    blocks += [
        f"<div><h3>{escape(f'{title}, batch {batch}')}</h3>{_matrix(sources, name, batch, is_more_better=more)}</div>"
        for batch in batches
        for name, title, more in FIGURES
    ]
    return section(
        _headline(sources),
        f'<div class="panels">{"".join(blocks)}</div>',
        note="Engines down, models across; the best of each matrix stands out.",
    )


def _headline(sources: Sequence[Source]) -> str:
    batch = min(sources[0].profile["settings"]["batches"])
    best = []
    for source in sources:
        _, row = min(chosen(source.profile["requests"], batch=batch), key=lambda pair: pair[1]["tpot_us"])
        best.append((row["tpot_us"], f"{source.name} {time_text(row['tpot_us'])} ({engine_name(row['engine'])})"))
    return f"Fastest token at batch {batch}: {', '.join(text for _, text in sorted(best))}"


def _matrix(sources: Sequence[Source], name: str, batch: int, *, is_more_better: bool) -> str:
    engines = dict.fromkeys(row["engine"] for source in sources for row in source.profile["requests"])
    values = [row[name] for source in sources for _, row in chosen(source.profile["requests"], batch=batch)]
    best = max(values) if is_more_better else min(values)
    rows = []
    for engine in engines:
        cells = [text_cell(engine_name(engine))]
        for source in sources:
            found = chosen(source.profile["requests"], batch=batch, engine=engine)
            cells += [
                Cell(
                    text=time_text(row[name]) if name.endswith("_us") else number_text(row[name]),
                    path=f"{source.pointer}/requests/{place}/{name}",
                    is_best=row[name] == best,
                )
                for place, row in found
            ] or [Cell(text=NONE)]
        rows.append(cells)
    return table(("engine", *(source.name for source in sources)), rows)


def _model_table(sources: Sequence[Source]) -> str:
    rows = []
    for source in sources:
        model, here = source.profile["model"], f"{source.pointer}/model"
        rows.append(
            [
                text_cell(source.name),
                Cell(text=scaled_text(model["parameters"], "").strip(), path=f"{here}/parameters"),
                Cell(text=scaled_text(model["flops_per_token"], "FLOP"), path=f"{here}/flops_per_token"),
                Cell(text=bytes_text(model["weight_bytes"]), path=f"{here}/weight_bytes"),
            ]
        )
    return table(("model", "parameters", "per token", "weights"), rows)
