"""The sections that are tables: families, switches, and the paper beside them."""

from __future__ import annotations

from typing import Any

from experiment_page.paper import SWITCHES, TABLE_1, expected_change
from experiment_page.raw import BASELINE
from experiment_page.words import (
    UNIT,
    ablation_effect,
    agreement,
    disagreements,
    listed,
    mean_and_spread,
    order,
    signed,
)

Json = dict[str, Any]

WITHOUT = {
    "two-tailed": "with both tails of candidates",
    "no-half-vdim": "values of full width, half as many rows and slots",
    "no-split": "one memory layer with all rows and slots, without a skip",
    "no-ive": "without virtual expansion (E = 1)",
    "no-tdqkr-mcs": "additive product keys (r = 1, which has no cores)",
    "no-mcs": "one core",
    "no-value-lr": "values at the common learning rate",
}


def families_section(results: Json) -> str:
    rows = []
    for name, row in results["families"].items():
        parameters = row["parameters"]
        rows.append(
            [
                f"`{name}`",
                f"{parameters['total'] / 1e6:.2f} M",
                f"{parameters['sparse'] / 1e6:.2f} M",
                f"{parameters['with_embeddings'] / 1e6:.2f} M",
                f"{row['flops_per_token'] / 1e6:.2f} M",
                mean_and_spread(row["held_out_bits_per_byte"]),
                mean_and_spread(row["out_of_domain_bits_per_byte"]),
                mean_and_spread(row["train_loss_at_end"]),
                f"{row['seconds_with_compilation']['mean']:.0f} s",
                str(row["seeds_finished"]),
            ]
        )
    head = [
        "model",
        "parameters",
        "of them sparse",
        "with embeddings",
        "FLOPs per token",
        f"held-out, {UNIT}",
        f"out-of-domain, {UNIT}",
        "training loss at the end, nats per byte",
        "seconds",
        "seeds",
    ]
    pairs = [
        [
            f"`{pair['model']}` - `{pair['minus']}`",
            signed(pair["held_out"]),
            pair["held_out"]["verdict"] if pair["held_out"] else "",
            signed(pair["out_of_domain"]),
            pair["out_of_domain"]["verdict"] if pair["out_of_domain"] else "",
        ]
        for pair in results["family_differences"]
    ]
    pair_head = ["difference", "held-out ± standard error", "which is", "out-of-domain ± standard error", "which is"]
    return (
        "## The families\n\n"
        + table(head, rows)
        + "\nMean ± sample standard deviation over seeds. Parameters and FLOPs are counted as in the paper: without "
        "embedding and head, two FLOPs per active parameter. The training loss is the mean of the last 30 steps. "
        "Seconds are those of a whole run: they **include compilation** and all evaluations, with other runs on the "
        "same machine, and are no measure of speed.\n\n"
        "![Held-out bits per byte and training loss over training](curves.svg)\n\n"
        "![Final bits per byte of each family with every seed](families.svg)\n\n"
        + (table(pair_head, pairs) if pairs else "")
    )


def ablations_section(results: Json) -> str:
    if not results["ablations"]:
        return "## The switches\n\nNo ablation is finished.\n"
    rows, more = [], []
    for name, row in results["ablations"].items():
        held_out = row["difference_to_baseline"]["held_out"]
        outside = row["difference_to_baseline"]["out_of_domain"]
        switch = SWITCHES.get(name)
        rows.append(
            [
                f"`{name}`: {WITHOUT.get(name, ' '.join(row['options']))}",
                signed(held_out),
                _number(row["baseline_std"]["held_out"]),
                ablation_effect(held_out),
                "-" if switch is None else f"{switch.table_2:+.3f}",
                "-" if switch is None else f"{switch.table_8:+.3f}",
                agreement(held_out, expected_change(name)),
            ]
        )
        more.append(
            [
                f"`{name}`",
                mean_and_spread(row["held_out_bits_per_byte"]),
                "" if held_out is None else _number(held_out["std"]),
                signed(outside),
                ablation_effect(outside),
                f"{row['parameters']['total'] / 1e6:.2f} M",
                f"{row['flops_per_token'] / 1e6:.2f} M",
                str(row["seeds_finished"]),
            ]
        )
    head = [
        f"`{BASELINE}`, but",
        f"held-out difference, {UNIT} ± standard error",
        f"noise: std of `{BASELINE}` over seeds",
        "which is",
        "paper, turned on (Table 2)",
        "paper, on PKM alone (Table 8)",
        "sign here",
    ]
    more_head = [
        "",
        f"held-out, {UNIT}",
        "std of the paired differences",
        "out-of-domain difference ± standard error",
        "which is",
        "parameters",
        "FLOPs per token",
        "seeds",
    ]
    parts = [
        "## The switches\n",
        f"Differences are to `{BASELINE}` with the same seed; plus is worse. The paper's numbers are changes of the "
        "validation loss, in nats per token, when a switch is turned *on*, so a switch that helps there has a minus "
        "and should give a plus here. Table 2 adds one switch after the other, Table 8 each to PKM alone; here each "
        "is taken away from the whole. Their sizes cannot be compared with ours, only the signs: a token of theirs is "
        "several bytes. The paper has no two-tailed candidates; `no-tdqkr-mcs` stands beside the sum of its two "
        "rows.\n",
        table(head, rows),
        _multiple(results),
        "![Differences of the ablations to the whole model, with the paper's signs](ablations.svg)\n",
        table(more_head, more),
        _unequal(results, results["families"][BASELINE]),
    ]
    return "\n".join(part for part in parts if part)


def _unequal(results: Json, baseline: Json) -> str:
    unequal = []
    for name, row in results["ablations"].items():
        flops = row["flops_per_token"] / baseline["flops_per_token"] - 1
        parameters = row["parameters"]["total"] / baseline["parameters"]["total"] - 1
        if max(abs(flops), abs(parameters)) > 0.01:
            unequal.append(f"`{name}` ({flops:+.1%} FLOPs, {parameters:+.1%} parameters)")
    if not unequal:
        return ""
    return f"Not of equal cost, as in the paper, where a switch brings its own parameters: {listed(unequal)}.\n"


def _multiple(results: Json) -> str:
    chance = results["noise"]["chance_per_comparison"]
    if chance is None:
        return ""
    comparisons = len(results["ablations"])
    return (
        f"With {results['seeds_planned']} seeds, a difference of nothing passes two standard errors with a chance of "
        f"{chance:.0%}. If none of the {comparisons} changes did anything, about {comparisons * chance:.1f} would "
        f'still be more than "noise", and {comparisons * 0.05:.1f} more than a hint.\n'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def paper_section(results: Json) -> str:
    families = results["families"]
    held_out = {name: row["held_out_bits_per_byte"] for name, row in families.items()}
    head = ["", *(f"`{name}`" for name in TABLE_1["151M"]), "best first"]
    rows = [
        [f"paper, {size}, nats per token", *(f"{value:.2f}" for value in losses.values()), _ranked(losses)]
        for size, losses in TABLE_1.items()
    ]
    ours = {name: figure["mean"] for name, figure in held_out.items()}
    rows.append(
        [
            f"here, held-out, {UNIT}",
            *(mean_and_spread(held_out.get(name)) for name in TABLE_1["151M"]),
            _ranked(ours) + " (by mean)",
        ]
    )
    sign_rows = []
    for pair in results["family_differences"]:
        ours_minus_other = {size: losses[pair["model"]] - losses[pair["minus"]] for size, losses in TABLE_1.items()}
        sign_rows.append(
            [
                f"`{pair['model']}` - `{pair['minus']}`",
                *(f"{value:+.2f}" for value in ours_minus_other.values()),
                signed(pair["held_out"]),
                _agreement_by_size(pair["held_out"], ours_minus_other),
            ]
        )
    sign_head = [
        "difference",
        *(f"paper, {size}" for size in TABLE_1),
        f"here, {UNIT} ± standard error",
        "order here",
    ]
    against = "".join(f"- {text}\n" for text in disagreements(results))
    return (
        "## Beside the paper\n\nValidation losses of Table 1; the columns are the paper's models of each family.\n\n"
        + table(head, rows)
        + ("\n" + table(sign_head, sign_rows) if sign_rows else "")
        + "\nWhere this scale disagrees with the paper, beyond the noise:\n\n"
        + against
    )


def _ranked(losses: dict[str, float]) -> str:
    return ", ".join(name.removesuffix("-tiny") for name in order(losses))


def _agreement_by_size(figure: Json | None, papers: dict[str, float]) -> str:
    by_size = {size: agreement(figure, value) for size, value in papers.items()}
    if len(set(by_size.values())) == 1:
        return next(iter(by_size.values()))
    grouped: dict[str, list[str]] = {}
    for size, word in by_size.items():
        grouped.setdefault(word, []).append(size)
    return "; ".join(f"{word} with {listed(sizes)}" for word, sizes in grouped.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
