"""The page of training runs: curves side by side, and the health of each one's memory over training."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from ultramem.runtime.profile.units import number_text, scaled_text, share_text
from ultramem.runtime.report.charts import Curve, line_chart
from ultramem.runtime.report.memory_health import health_section
from ultramem.runtime.report.page import Cell, details, escape, heading, legend, page, section, table, text_cell
from ultramem.runtime.report.source import SERIES
from ultramem.runtime.report.training_run import Points, TrainingRun

KIND = "ultramem-training"
FORMAT_VERSION = 1
SETTLED = 0.1
"""Share of the steps after which the loss sets the scale of the plot: the first ones would flatten the rest."""
SPLITS = {"held_out": "held-out", "out_of_domain": "out of domain"}


def render_training(runs: Sequence[TrainingRun], *, title: str = "") -> str:
    """One self-contained HTML page of runs.

    Args:
        runs: at least one, as `read_training_run` gives them; their order is that of the colours.
        title: None of its own: what the runs show, in a sentence.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    runs = _with_distinct_names(runs)
    data = {"kind": KIND, "format_version": FORMAT_VERSION, "runs": [dataclasses.asdict(run) for run in runs]}
    headline = title or _headline(runs)
    lead = "Training curves" + (", and how the memory is used." if any(run.tables for run in runs) else ".")
    body = [
        f'<header><h1>{heading(headline)}</h1><p class="lead">{escape(lead)}</p></header>',
        _results_section(runs),
        _loss_section(runs),
        _steps_section(runs),
        *(health_section(run, f"/runs/{index}") for index, run in enumerate(runs) if run.tables),
    ]
    return page(headline, body, data)


def _with_distinct_names(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({index + 1})") if names.count(run.name) > 1 else run
        for index, run in enumerate(runs)
    ]


def _colors(runs: Sequence[TrainingRun]) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(len(runs))]


def _headline(runs: Sequence[TrainingRun]) -> str:
    """The best run, by the final evaluation or, while it goes on, the newest one."""
    found = []
    for run in runs:
        place = run.last_evaluation("held_out")
        place = run.last_evaluation("held_out_sample") if place is None else place
        if place is not None:
            found.append((run.evaluations[place]["bits_per_byte"], run))
    if not found:
        return f"{runs[0].name} after {runs[0].step:,} of {runs[0].steps:,} steps"
    (bits, best), *others = sorted(found, key=lambda pair: pair[0])
    sentence = f"{best.name} is at {bits:.3f} bits per byte on held-out text after {best.step:,} steps"
    return sentence + "".join(f", {run.name} at {bits:.3f}" for bits, run in others[:2])


def _results_section(runs: Sequence[TrainingRun]) -> str:
    splits = [split for split in SPLITS if any(run.last_evaluation(split) is not None for run in runs)]
    goes_on = any(run.step < run.steps for run in runs)
    rows = []
    for index, run in enumerate(runs):
        here = f"/runs/{index}"
        cells = [text_cell(run.name)]
        for split in splits:
            place = run.last_evaluation(split)
            for figure in ("eval_loss", "bits_per_byte"):
                # An en dash stands for an evaluation that is not done yet.
                cells.append(
                    Cell(text="–")  # noqa: RUF001
                    if place is None
                    else Cell(text=f"{run.evaluations[place][figure]:.4f}", path=f"{here}/evaluations/{place}/{figure}")
                )
        rate = statistics.median(value for _, value in run.training["tokens_per_second"])
        utilisation = statistics.median([value for _, value in run.training["mfu"]] or [0.0])
        cells += [
            Cell(text=f"{run.step:,}", path=f"{here}/step"),
            *([Cell(text=f"{run.steps:,}", path=f"{here}/steps")] if goes_on else []),
            Cell(text=str(run.seed), path=f"{here}/seed"),
            Cell(text=scaled_text(run.parameters, "").strip(), path=f"{here}/parameters"),
            Cell(text=scaled_text(run.flops_per_token, "FLOP"), path=f"{here}/flops_per_token"),
            Cell(text=number_text(rate), value=rate),
            Cell(text=share_text(utilisation), value=utilisation),
            Cell(text=f"{run.seconds:,.0f} s", path=f"{here}/seconds"),
        ]
        rows.append(cells)
    headings = ["run"]
    for split in splits:
        headings += [f"{SPLITS[split]}, nats per token", f"{SPLITS[split]}, bits per byte"]
    headings += [
        "steps",
        *(["of"] if goes_on else []),
        "seed",
        "parameters",
        "FLOPs per token",
        "tokens per second",
        "MFU",
        "time",
    ]
    note = (
        "Losses are of the final evaluation, on all of the text or on final_eval_tokens of it. Tokens per second and "
        "MFU (model FLOPs utilisation: three forwards' FLOPs per trained token, over the measured rate of a matrix "
        "product) are medians."
    )
    return section("Runs", table(headings, rows), note=note)


def _loss_section(runs: Sequence[TrainingRun]) -> str:
    curves, shown, ends = [], list[float](), []
    for run, color in zip(runs, _colors(runs), strict=True):
        training, sample = run.training["loss"], _held_out(run)
        curves.append(Curve(label=run.name, points=training, color=color, is_faint=True))
        curves.append(Curve(label=f"{run.name}, held-out", points=sample, color=color, has_dots=True))
        for points in (training, sample):
            shown += [y for x, y in points if x >= SETTLED * points[-1][0]]
        if sample:
            ends.append(f"{run.name} at {sample[-1][1]:.3f}")
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.1
    title = f"Held-out loss: {', '.join(ends)}" if ends else "Training loss"
    chart = line_chart(
        [curve for curve in curves if curve.points],
        x_title="training step",
        y_title="loss, nats per token",
        y_low=low - margin,
        y_high=high + margin,
        summary=title,
    )
    note = (
        "Strong line with dots: a sample of the held-out text. Faint line: training batches. The axis does not start "
        "at zero, and the first steps may lie above it."
    )
    rows = [
        [
            text_cell(run.name),
            text_cell(row["split"].replace("_", " ")),
            Cell(text=f"{row['step']:,}", path=f"/runs/{index}/evaluations/{place}/step"),
            Cell(text=f"{row['eval_loss']:.4f}", path=f"/runs/{index}/evaluations/{place}/eval_loss"),
            Cell(text=f"{row['bits_per_byte']:.4f}", path=f"/runs/{index}/evaluations/{place}/bits_per_byte"),
        ]
        for index, run in enumerate(runs)
        for place, row in enumerate(run.evaluations)
    ]
    every = table(("run", "text", "step", "nats per token", "bits per byte"), rows)
    return section(
        title,
        legend((run.name, color) for run, color in zip(runs, _colors(runs), strict=True)),
        f"<figure>{chart}<figcaption>{escape(note)}</figcaption></figure>",
        details("All evaluations", every) if rows else "",
    )


def _held_out(run: TrainingRun) -> Points:
    """The sample that is evaluated during training; without one, the final evaluation."""
    by_split = [
        [(float(row["step"]), float(row["eval_loss"])) for row in run.evaluations if row["split"] == split]
        for split in ("held_out_sample", "held_out")
    ]
    return by_split[0] or by_split[1]


def _steps_section(runs: Sequence[TrainingRun]) -> str:
    """Gradient norm, learning rates and speed."""
    panels = []
    for figure, name in (
        ("grad_norm", "Gradient norm before clipping"),
        ("tokens_per_second", "Tokens per second"),
        ("lr", "Learning rate"),
        ("value_lr", "Learning rate of the value tables"),
    ):
        curves = [
            Curve(label=run.name, points=run.training[figure], color=color)
            for run, color in zip(runs, _colors(runs), strict=True)
            if run.training[figure]
        ]
        # A few spikes must not flatten the rest; what lies above is cut off.
        values = sorted(y for curve in curves for _, y in curve.points)
        high = 1.15 * values[int(0.98 * (len(values) - 1))] or 1.0
        chart = line_chart(curves, x_title="training step", y_title="", y_low=0.0, y_high=high, summary=name)
        panels.append(f"<div><h3>{escape(name)}</h3>{chart}</div>")
    return section(
        "Steps",
        legend((run.name, color) for run, color in zip(runs, _colors(runs), strict=True)) if len(runs) > 1 else "",
        f'<div class="panels">{"".join(panels)}</div>',
        note="What is far above the rest is cut off.",
    )
