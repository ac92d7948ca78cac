"""The plots, as SVG: the same bytes from the same raw files and the same matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiment_page.paper import expected_change
from experiment_page.raw import BASELINE, Experiment, Run
from experiment_page.words import UNIT

Json = dict[str, Any]


class Look(NamedTuple):
    """Colour (of Okabe and Ito), marker and dash: a family is told apart without colour too."""

    color: str
    marker: str
    dash: str


LOOKS = {
    "dense-tiny": Look("#4d4d4d", "o", "-"),
    "moe-tiny": Look("#d55e00", "s", "--"),
    "pkm-tiny": Look("#009e73", "^", "-."),
    "ultramem-tiny": Look("#0072b2", "D", "-"),
}
OTHERS = Look("#b0578f", "v", ":")
SMOOTHED = 20
"""Steps that a point of the training curve is the mean of."""
SHOWN_FROM = 40
"""The first steps would flatten the rest."""
STYLE: Any = {
    "svg.hashsalt": "ultramem",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
}


def write_plots(experiment: Experiment, results: Json, out: Path) -> list[Path]:
    """curves.svg, families.svg, and ablations.svg and memory.svg where there is something to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ultramem[plot]'") from error
    written = []
    with matplotlib.rc_context(STYLE):
        figures = {
            "curves": lambda: _curves(Figure(figsize=(10, 4), layout="constrained"), experiment),
            "families": lambda: _families(Figure(figsize=(10, 3.4), layout="constrained"), results),
            "ablations": lambda: _ablations(Figure(figsize=(10, 4.6), layout="constrained"), results),
            "memory": lambda: _memory(Figure(figsize=(10, 6), layout="constrained"), experiment),
        }
        if not results["ablations"]:
            del figures["ablations"]
        if not results["memory_health"]:
            del figures["memory"]
        for name, draw in figures.items():
            path = out / f"{name}.svg"
            draw().savefig(path, format="svg", metadata={"Date": None})
            written.append(path)
    return written


def _curves(figure: Any, experiment: Experiment) -> Any:
    held_out, training = figure.subplots(1, 2)
    for name, runs in experiment.families.items():
        look = LOOKS.get(name, OTHERS)
        line = {"color": look.color, "linestyle": look.dash, "label": name}
        sample = [[(row["step"], row["bits_per_byte"]) for row in run.evaluations("held_out_sample")] for run in runs]
        _band(held_out, sample, marker=look.marker, markersize=5, **line)
        _band(training, [_smoothed(run) for run in runs], linewidth=1.3, **line)
    sampled = next(iter(experiment.families.values()))[0].evaluations("held_out_sample")[-1]["tokens"]
    held_out.set(title=f"Held-out text: a sample of {sampled:,} bytes", ylabel=UNIT, xlabel="training step")
    training.set(title=f"Training loss, mean of {SMOOTHED} steps", ylabel=UNIT, xlabel="training step")
    held_out.legend(title="mean of seeds, band: lowest to highest")
    return figure


def _band(axes: Any, curves: list[list[tuple[int, float]]], **line: Any) -> None:
    """The mean of curves, and from the lowest to the highest of them."""
    steps = [step for step, _ in curves[0]]
    columns = [[curve[place][1] for curve in curves] for place in range(len(steps))]
    axes.plot(steps, [statistics.fmean(column) for column in columns], **line)
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(steps, lows, highs, color=line["color"], alpha=0.15, linewidth=0)


def _smoothed(run: Run) -> list[tuple[int, float]]:
    losses = [row["loss"] / math.log(2) for row in run.steps]
    return [
        (end, statistics.fmean(losses[end - SMOOTHED : end]))
        for end in range(min(SHOWN_FROM, len(losses)), len(losses) + 1, 2)
    ]


def _families(figure: Any, results: Json) -> Any:
    names = list(results["families"])
    for axes, (split, title) in zip(
        figure.subplots(1, 2), {"held_out": "Held-out text", "out_of_domain": "Out of domain"}.items(), strict=True
    ):
        for place, name in enumerate(names):
            look = LOOKS.get(name, OTHERS)
            spread = results["families"][name][f"{split}_bits_per_byte"]
            values = list(spread["by_seed"].values())
            axes.plot(_around(place, len(values)), values, look.marker, color=look.color, markersize=6, alpha=0.55)
            axes.hlines(spread["mean"], place - 0.22, place + 0.22, color=look.color, linewidth=2)
            axes.annotate(
                f"{spread['mean']:.3f}",
                (place + 0.25, spread["mean"]),
                va="center",
                fontsize=9,
                color=look.color,
            )
        axes.set(title=f"{title}, final weights", ylabel=UNIT, xlim=(-0.5, len(names) - 0.2))
        axes.set_xticks(range(len(names)), names)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
    figure.supxlabel("points: seeds; line: their mean; the axes do not start at zero", fontsize=9, color="#444444")
    return figure


def _around(place: int, count: int) -> list[float]:
    """Places of `count` points side by side."""
    return [place + 0.16 * (index - (count - 1) / 2) for index in range(count)]


def _ablations(figure: Any, results: Json) -> Any:
    names = list(results["ablations"])
    places = [len(names) - 1 - index for index in range(len(names))]
    axes_of = figure.subplots(1, 2, sharey=True)
    for axes, (split, title) in zip(
        axes_of, {"held_out": "Held-out text", "out_of_domain": "Out of domain"}.items(), strict=True
    ):
        told = (LOOKS[BASELINE].color, LOOKS[BASELINE].color)
        noise = ("#777777", "white")
        for name, place in zip(names, places, strict=True):
            difference = results["ablations"][name]["difference_to_baseline"][split]
            if difference is None:
                continue
            color, fill = told if difference["verdict"] in ("a hint", "a difference") else noise
            values = list(difference["by_seed"].values())
            axes.plot(values, [place - 0.25] * len(values), "|", color="#555555", markersize=7)
            axes.errorbar(
                difference["mean"],
                place,
                xerr=None if difference["standard_error"] is None else 2 * difference["standard_error"],
                fmt="o",
                color=color,
                markerfacecolor=fill,
                markersize=7,
                capsize=4,
                linewidth=1.5,
            )
        std = next(iter(results["ablations"].values()))["baseline_std"][split]
        if std is not None:
            axes.axvspan(-std, std, color="#e69f00", alpha=0.15, linewidth=0)
        axes.axvline(0, color="black", linewidth=1)
        axes.locator_params(axis="x", nbins=6)
        axes.set(title=f"{title}: difference to {BASELINE}", xlabel=f"{UNIT} (right: worse)")
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(names) - 0.4)
    axes_of[0].set_yticks(places, [f"{name}\n{_paper_mark(name)}" for name in names])
    figure.supxlabel(
        "bars: two standard errors of the paired difference (filled: beyond them); ticks: seeds; "
        f"band: std of {BASELINE} over seeds;\nunder each name: what the paper's Table 2 lets expect",
        fontsize=9,
        color="#444444",
    )
    return figure


def _paper_mark(name: str) -> str:
    expected = expected_change(name)
    return "(not in the paper)" if expected is None else "(paper: worse)" if expected > 0 else "(paper: better)"


def _memory(figure: Any, experiment: Experiment) -> Any:
    runs = experiment.runs[BASELINE]
    panels = (
        ("value_table", "used_ever", "Share of rows used at least once", (0, 1)),
        ("value_table", "used_lately", "Share used since the last report", (0, 1)),
        ("value_table", "kl_from_uniform_nats", "KL of row use from uniform, nats", (0, None)),
        ("memory_layer", "score_mean", "Mean kept score (starts near 1)", (0, None)),
        ("memory_layer", "output_rms", "RMS of the layer's output", (0, None)),
    )
    grid = figure.subplots(2, 3).flatten()
    looks = (LOOKS["ultramem-tiny"], LOOKS["moe-tiny"], LOOKS["pkm-tiny"], LOOKS["dense-tiny"])
    for axes, (kind, field, title, limits) in zip(grid, panels, strict=False):
        for look, name in zip(looks, _names(runs, kind), strict=False):
            curves = [[(row["step"], row[field]) for row in run.health(kind) if row["name"] == name] for run in runs]
            label = name.removesuffix(".table")
            _band(axes, curves, color=look.color, linestyle=look.dash, marker=look.marker, markersize=4, label=label)
        axes.set(title=title, xlabel="training step", xlim=(0, runs[0].train.steps * 1.05), ylim=limits)
        axes.title.set_fontsize(9.5)
    handles, labels = grid[0].get_legend_handles_labels()
    legend = grid[5]
    legend.axis("off")
    legend.legend(handles, labels, loc="center", title="layer and its table\n(mean of seeds, band: lowest to highest)")
    return figure


def _names(runs: Iterable[Run], kind: str) -> list[str]:
    return list(dict.fromkeys(row["name"] for run in runs for row in run.health(kind)))
