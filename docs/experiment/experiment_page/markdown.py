"""README.md: the page, written from results.json and nothing else."""

from __future__ import annotations

from typing import Any

from experiment_page.conditions import again_section, conditions_section, limits_section, tokens
from experiment_page.raw import BASELINE
from experiment_page.tables import ablations_section, families_section, paper_section
from experiment_page.words import (
    SPLIT_NAMES,
    UNIT,
    comparison,
    disagreements,
    is_told,
    listed,
    mean_and_spread,
    order,
    signed,
)

Json = dict[str, Any]


def make_page(results: Json) -> str:
    """The whole of README.md."""
    sections = [
        "# Four families at equal cost, and UltraMem's switches\n",
        "<!-- python docs/experiment/make_page.py writes this page from raw/; edit the program, not the page -->\n",
        _lead(results),
        "## What came out\n",
        _partial(results),
        _came_out(results),
        families_section(results),
        ablations_section(results),
        paper_section(results),
        _memory(results),
        conditions_section(results),
        limits_section(results),
        again_section(results),
    ]
    return "\n".join(section for section in sections if section)


def _lead(results: Json) -> str:
    train = results["train"]
    return (
        f"Dense, MoE, PKM and UltraMem models were trained on the same {tokens(results):,} bytes of Project Gutenberg "
        f"in the same order: {train['steps']} steps of {train['batch_size']} x {train['sequence_length']} bytes, for "
        f"each of {results['seeds_planned']} seeds. Then UltraMem with one switch turned back at a time. A difference "
        "below is the mean over seeds of the difference on the same seed's text, ± its standard error.\n\n"
        "- *Within the noise*: less than two standard errors from zero. Nothing is concluded from it.\n"
        "- *A hint*: more than that, but Student's t for so few seeds gives it a chance of over 5 % where there is "
        "no difference.\n"
        "- Only what passes both is called better or worse without more ado.\n"
    )


def _partial(results: Json) -> str:
    if not results["runs_missing"]:
        return ""
    missing = listed([f"`{name}`" for name in results["runs_missing"]])
    return (
        f"**This experiment is partial: {results['runs_finished']} of {results['runs_planned']} runs are finished.** "
        f"Missing: {missing}.\n"
    )


def _came_out(results: Json) -> str:
    families = results["families"]
    lines = []
    for split, text in SPLIT_NAMES.items():
        figures = {name: row[f"{split}_bits_per_byte"] for name, row in families.items()}
        ranks = order({name: figure["mean"] for name, figure in figures.items()})
        ranked = ", ".join(f"`{name}` {mean_and_spread(figures[name])}" for name in ranks)
        lines.append(f"{text.capitalize()} {UNIT}, by mean, lowest first: {ranked}.")
    for pair in results["family_differences"]:
        if BASELINE in (pair["model"], pair["minus"]):
            lines.append(_ours_first(pair, "held_out"))
    told, hints, noise = list[str](), list[str](), list[str]()
    for name, row in results["ablations"].items():
        figure = row["difference_to_baseline"]["held_out"]
        item = f"`{name}` ({signed(figure)})"
        if is_told(figure):
            (told if figure["verdict"] == "a difference" else hints).append(item)
        else:
            noise.append(item)
    if results["ablations"]:
        lines.append(
            f"Of {len(results['ablations'])} changes to `{BASELINE}`, on held-out text, beyond the noise: "
            f"{listed(told)}; hints: {listed(hints)}; nothing can be said of: {listed(noise)}. "
            "A plus means worse than with all switches as they are."
        )
    lines += [f"Against the paper: {text}" for text in disagreements(results)]
    return "".join(f"- {line}\n" for line in lines)


def _ours_first(pair: Json, split: str) -> str:
    figure = pair[split]
    if pair["model"] == BASELINE or figure is None:
        return comparison(pair["model"], pair["minus"], figure, split)
    return comparison(BASELINE, pair["model"], figure | {"mean": -figure["mean"]}, split)


def _memory(results: Json) -> str:
    if not results["memory_health"]:
        return ""
    said = []
    for name, figures in results["memory_health"].items():
        if "used_ever" in figures:
            said.append(
                f"`{name}` had {figures['used_ever']:.0%} of its rows used at least once, "
                f"{figures['used_lately']:.0%} in the last {results['train']['eval_every']} steps, and its use was "
                f"{figures['kl_from_uniform_nats']:.2f} nats from uniform"
            )
        else:
            said.append(
                f"`{name}` kept scores of mean {figures['score_mean']:.2f} and put out an RMS of "
                f"{figures['output_rms']:.2f}"
            )
    return (
        f"## The memory of `{BASELINE}`\n\nAt the end, on average over seeds: {'; '.join(said)}.\n\n"
        "![Use of rows, kept scores and output size over training](memory.svg)\n"
    )
