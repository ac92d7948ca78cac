"""The sections on how the numbers came about: what was equal, what was tuned, what they cannot tell, once more."""

from __future__ import annotations

import math
from typing import Any

from experiment_page.words import listed

Json = dict[str, Any]


def conditions_section(results: Json) -> str:
    train, families = results["train"], results["families"]
    flops = [row["flops_per_token"] for row in families.values()]
    sparse = [row["parameters"]["total"] for row in families.values() if row["parameters"]["sparse"]]
    same = f"FLOPs per token of the families (within {_percent(flops)})"
    if sparse:
        same += f", parameters of the sparse ones (within {_percent(sparse)}; the dense model has fewer)"
    return (
        "## What was held equal\n\n"
        f"{same}; the text, the bytes of every step and their order for a seed; {tokens(results):,} bytes of training; "
        f"one precision ({train['precision']}); one optimiser (AdamW {train['beta1']}/{train['beta2']}, weight decay "
        f"{train['weight_decay']}, clipping at {train['max_grad_norm']:g}), learning rate {train['lr']:g} with "
        f"{train['warmup_ratio']:.0%} warm-up and a cosine to {train['lr_end_ratio']:.0%}, for all; dropout "
        f"{results['dropout']:g}. Value tables, wherever there are some, learn at {train['value_lr_ratio']:g} times "
        "that, which falls to once, as in the paper; PKM's too (but not those of `no-value-lr`). The final evaluation "
        f"is of the last weights, on {results['evaluated_tokens']['held_out']:,} bytes of held-out prose (the ends of "
        f"the books that are trained on) and {results['evaluated_tokens']['out_of_domain']:,} of verse and drama, "
        "which is out of domain.\n\n"
        "## What was tuned\n\n"
        f"Nothing, for no family: one learning rate ({train['lr']:g}), schedule and budget, fixed beforehand and taken "
        "from the project's demo, which trains UltraMem and dense models. It may suit one family better than "
        "another; that was not looked into for any of them.\n"
    )


def _percent(values: list[int]) -> str:
    return f"{math.ceil((max(values) / min(values) - 1) * 1000) / 10:.1f} %"


def limits_section(results: Json) -> str:
    millions = tokens(results) / 1e6
    sizes = [row["parameters"]["total"] for row in results["families"].values()]
    largest, share = max(sizes) / 1e6, max(sizes) / min(sizes)
    return (
        "## What this scale cannot tell\n\n"
        f"- {millions:.1f} M bytes is the very beginning of training: all models still learn spelling and common "
        "words. The paper trains on up to a trillion tokens, and a large table pays where there are many facts to "
        "keep and time to visit its rows.\n"
        f"- {largest:.0f} M parameters, {share:.0f} times those of the dense model; the paper's smallest sparse "
        "ones have 2,000 M and 13 times.\n"
        f'- {results["seeds_planned"]} seeds bound only large differences. "Within the noise" means not seen, not '
        "absent.\n"
        "- Bytes, not tokens of a large vocabulary: the next byte mostly depends on the few before it.\n"
        "- One learning rate: a family whose best one lies elsewhere is shown below its worth.\n"
        "- Seeds change the weights' start and the order of the text together; the text itself is one corpus.\n"
    )


def again_section(results: Json) -> str:
    environments = listed(
        [
            f"ultramem {each['ultramem']}, torch {each['torch']}, Python {each['python']}, {each['device']}, "
            f"{each['threads']} thread{'s' if each['threads'] > 1 else ''}"
            for each in results["environments"]
        ]
    )
    commits = listed([f"`{commit}`" for commit in results["commits"]])
    seconds = sum(
        value
        for row in (*results["families"].values(), *results["ablations"].values())
        for value in row["seconds_with_compilation"]["by_seed"].values()
    )
    return (
        "## Run it again\n\n"
        "```bash\n"
        "make experiment                          # trains what is not trained yet, then writes this page\n"
        "python docs/experiment/make_page.py      # this page, its plots and results.json again, from raw/ alone\n"
        "```\n\n"
        f"The seconds of all runs add up to {seconds / 3600:.1f} hours; two runs at a time, as is the default, take "
        "half of that. Stop `make experiment` when you like; it goes on where it was.\n\n"
        f"Commits: {commits}. Versions: {environments}. Data: {results['data']['name']}, sha256 "
        f"`{results['data']['sha256']}`. Options of every run: `{' '.join(results['training_options'])}`. "
        "All figures: [results.json](results.json); the runs' own: [raw](raw); the first seed's curves in one page: "
        "[report.html](report.html).\n"
    )


def tokens(results: Json) -> int:
    """Tokens, which are bytes, that each run was trained on."""
    train = results["train"]
    return int(train["steps"] * train["batch_size"] * train["sequence_length"])
