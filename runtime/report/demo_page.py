"""The page of a demonstration: models trained on the same text, compared in quality and in speed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultramem.runtime.profile.schema import check_document
from ultramem.runtime.profile.units import scaled_text
from ultramem.runtime.report.charts import Curve, binned, line_chart
from ultramem.runtime.report.latency_section import latency_section
from ultramem.runtime.report.machine_section import machine_section
from ultramem.runtime.report.page import Cell, details, escape, heading, legend, page, section, table, text_cell
from ultramem.runtime.report.roofline_section import roofline_section
from ultramem.runtime.report.source import SERIES, Source
from ultramem.runtime.report.stage_section import stage_section

KIND = "ultramem-demo"
FORMAT_VERSION = 1
SETTLED = 0.1
"""Share of the steps after which the loss sets the scale of the plot: the first ones would flatten the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRun:
    """One trained model."""

    model: str
    """Name of the model; runs of the same name share a colour."""
    parameters: int
    """All of them, embedding and head included."""
    flops_per_token: int
    steps: int
    seconds: float
    """Of training."""
    seed: int
    bits_per_byte: dict[str, float]
    """By text, as {"held-out": 1.9, "out of domain": 2.3}; the first is the one that headlines use."""
    metrics: Sequence[dict[str, Any]]
    """Lines of metrics.jsonl: "step" with "loss", or with "eval_loss" and "bits_per_byte"."""
    prompt: str = ""
    sample: str = ""
    """What the model wrote after the prompt."""


def render_demo(
    runs: Sequence[DemoRun], profiles: Sequence[dict[str, Any]], *, title: str = "", about: str = ""
) -> str:
    """One self-contained HTML page of trained models and their profiles.

    Args:
        runs: at least one.
        profiles: documents of `ultramem.runtime.profile.to_json`, one a model; may be empty.
        title: None of its own: what the runs show, in a sentence.
        about: a paragraph under the title: which text, what is held equal.

    Raises:
        ValueError: there are no runs, or a profile is not one.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    sources = [Source(check_document(profile), f"/profiles/{index}") for index, profile in enumerate(profiles)]
    data = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "runs": [dataclasses.asdict(run) for run in runs],
        "profiles": [source.profile for source in sources],
    }
    headline = title or _headline(runs)
    body = [
        f'<header><h1>{heading(headline)}</h1><p class="lead">{escape(about)}</p></header>',
        _results_section(runs),
        _loss_section(runs),
        *([latency_section(sources), stage_section(sources)] if sources else []),
        *(roofline_section(source) for source in sources),
        _sample_section(runs),
        *([machine_section(sources)] if sources else []),
    ]
    return page(headline, body, data)


def _models(runs: Sequence[DemoRun]) -> dict[str, str]:
    """Colour of each model, in the order of the runs."""
    names = dict.fromkeys(run.model for run in runs)
    return {name: SERIES[index % len(SERIES)] for index, name in enumerate(names)}


def _mean_bits(runs: Sequence[DemoRun]) -> dict[str, float]:
    """Mean over the seeds of each model, on the first text."""
    text = next(iter(runs[0].bits_per_byte))
    return {
        name: statistics.fmean(run.bits_per_byte[text] for run in runs if run.model == name) for name in _models(runs)
    }


def _headline(runs: Sequence[DemoRun]) -> str:
    bits = sorted(_mean_bits(runs).items(), key=lambda pair: pair[1])
    text = next(iter(runs[0].bits_per_byte))
    name, best = bits[0]
    if len(bits) == 1:
        return f"{name} reaches {best:.3f} bits per byte on {text} text"
    other, worse = bits[1]
    return f"{name} reaches {best:.3f} bits per byte on {text} text, {other} {worse:.3f}"


def _results_section(runs: Sequence[DemoRun]) -> str:
    texts = list(dict.fromkeys(text for run in runs for text in run.bits_per_byte))
    best = {text: min(run.bits_per_byte[text] for run in runs if text in run.bits_per_byte) for text in texts}
    rows = []
    for index, run in enumerate(runs):
        here = f"/runs/{index}"
        cells = [text_cell(run.model)]
        for text in texts:
            value = run.bits_per_byte.get(text)
            # An en dash stands for a text that this run was not evaluated on.
            cells.append(
                Cell(text="–")  # noqa: RUF001
                if value is None
                else Cell(text=f"{value:.4f}", path=f"{here}/bits_per_byte/{text}", is_best=value == best[text])
            )
        cells += [
            Cell(text=scaled_text(run.parameters, "").strip(), path=f"{here}/parameters"),
            Cell(text=scaled_text(run.flops_per_token, "FLOP"), path=f"{here}/flops_per_token"),
            Cell(text=f"{run.steps:,}", path=f"{here}/steps"),
            Cell(text=f"{run.seconds:,.0f} s", path=f"{here}/seconds"),
            Cell(text=str(run.seed), path=f"{here}/seed"),
        ]
        rows.append(cells)
    headings = (
        "model", *(f"bits per byte, {text}" for text in texts), "parameters", "FLOPs per token", "steps", "training",
        "seed",
    )  # fmt: skip
    flops = {run.model: run.flops_per_token for run in runs}
    spread = max(flops.values()) / min(flops.values()) - 1
    equal = len(flops) > 1 and spread < 0.02
    title = "At equal FLOPs per token: bits per byte, lower is better" if equal else "Bits per byte, lower is better"
    note = f"FLOPs per token differ by {100 * spread:.2g} %." if equal and spread else ""
    return section(title, table(headings, rows), note=note)


def _loss_section(runs: Sequence[DemoRun]) -> str:
    colors = _models(runs)
    curves, shown = [], []
    for run in runs:
        training = [(float(row["step"]), float(row["loss"])) for row in run.metrics if "loss" in row]
        evaluation = [(float(row["step"]), float(row["eval_loss"])) for row in run.metrics if "eval_loss" in row]
        label = f"{run.model}, seed {run.seed}"
        color = colors[run.model]
        if training:
            curves.append(Curve(label=label, points=binned(training), color=color, is_faint=True))
            shown += [y for x, y in curves[-1].points if x >= SETTLED * training[-1][0]]
        if evaluation:
            curves.append(Curve(label=f"{label}, held-out", points=evaluation, color=color, has_dots=True))
            shown += [y for x, y in evaluation if x >= SETTLED * evaluation[-1][0]]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or 0.1
    last: dict[str, list[float]] = {}
    for run in runs:
        last.setdefault(run.model, []).extend([row["eval_loss"] for row in run.metrics if "eval_loss" in row][-1:])
    ends = ", ".join(f"{name} at {statistics.fmean(values):.3f}" for name, values in last.items() if values)
    seeds = " (mean of the seeds)" if max(map(len, last.values())) > 1 else ""
    title = f"Held-out loss ends with {ends}{seeds}" if ends else "Training loss"
    chart = line_chart(
        curves,
        x_title="training step",
        y_title="loss, nats per token",
        y_low=low - margin,
        y_high=high + margin,
        summary=title,
    )
    rows = [
        [
            text_cell(run.model),
            Cell(text=str(run.seed), path=f"/runs/{index}/seed"),
            Cell(text=f"{row['step']:,}", path=f"/runs/{index}/metrics/{place}/step"),
            Cell(text=f"{row['eval_loss']:.4f}", path=f"/runs/{index}/metrics/{place}/eval_loss"),
            *(
                [Cell(text=f"{row['bits_per_byte']:.4f}", path=f"/runs/{index}/metrics/{place}/bits_per_byte")]
                if "bits_per_byte" in row
                else [Cell(text="")]
            ),
        ]
        for index, run in enumerate(runs)
        for place, row in enumerate(run.metrics)
        if "eval_loss" in row
    ]
    evaluations = (
        details("All evaluations", table(("model", "seed", "step", "held-out loss", "bits per byte"), rows))
        if rows
        else ""
    )
    note = (
        "Strong line with dots: held-out text. Faint line: training batches. The axis does not start at zero, "
        "and the first steps lie above it."
    )
    return section(
        title, legend(colors.items()), f"<figure>{chart}<figcaption>{escape(note)}</figcaption></figure>", evaluations
    )


def _sample_section(runs: Sequence[DemoRun]) -> str:
    samples = [run for run in runs if run.sample]
    if not samples:
        return ""
    blocks = []
    for run in samples:
        text = f"<b>{escape(run.prompt)}</b>{escape(run.sample)}"
        blocks.append(f"<h3>{escape(run.model)}, seed {run.seed}</h3><blockquote>{text}</blockquote>")
    return section("What the models write", *blocks, note="The prompt is in bold; what follows is generated.")
