"""What may be said of a difference. The numbers choose the words."""

from __future__ import annotations

from typing import Any

from experiment_page.paper import TABLE_1, expected_change

Json = dict[str, Any]
UNIT = "bits per byte"
SPLIT_NAMES = {"held_out": "held-out", "out_of_domain": "out-of-domain"}


def mean_and_spread(figure: Json | None, digits: int = 3) -> str:
    """3.108 ± 0.012, or the mean alone where there is one seed."""
    if figure is None:
        return ""
    text = f"{figure['mean']:.{digits}f}"
    return text if figure["std"] is None else f"{text} ± {figure['std']:.{digits}f}"


def signed(figure: Json | None) -> str:
    """+0.0123 ± 0.0040: a difference and its standard error."""
    if figure is None:
        return ""
    text = f"{figure['mean']:+.4f}"
    return text if figure["standard_error"] is None else f"{text} ± {figure['standard_error']:.4f}"


def is_told(figure: Json | None) -> bool:
    """Whether the difference is beyond the noise."""
    return figure is not None and figure["verdict"] in ("a hint", "a difference")


def comparison(model: str, other: str, figure: Json | None, split: str = "held_out") -> str:
    """A sentence on `model - other`."""
    if figure is None:
        return f"`{model}` and `{other}` have no seed in common yet."
    where = f"on {SPLIT_NAMES[split]} text"
    if figure["verdict"] == "one seed":
        return f"`{model}` is at {signed(figure)} {UNIT} to `{other}` {where}: one seed, which says nothing of chance."
    if figure["verdict"] == "within the noise":
        return f"`{model}` and `{other}` are within the noise of each other {where} ({signed(figure)} {UNIT})."
    size, sense = f"{abs(figure['mean']):.4f}", "better" if figure["mean"] < 0 else "worse"
    sentence = f"`{model}` is {sense} than `{other}` by {size} ± {figure['standard_error']:.4f} {UNIT} {where}"
    if figure["verdict"] == "a hint":
        return f"{sentence}: a hint, no more (p = {figure['p']:.2f})."
    return f"{sentence} ({p_text(figure)})."


def ablation_effect(figure: Json | None) -> str:
    """What an ablation did, in a table's words."""
    if figure is None or figure["verdict"] == "one seed":
        return "cannot tell (too few seeds)"
    if figure["verdict"] == "within the noise":
        return "within the noise"
    effect = "better" if figure["mean"] < 0 else "worse"
    return effect if figure["verdict"] == "a difference" else f"{effect} (a hint)"


def p_text(figure: Json) -> str:
    return "p < 0.001" if figure["p"] < 0.001 else f"p = {figure['p']:.3f}"


def agreement(figure: Json | None, papers: float | None) -> str:
    """Whether the sign of a difference is the paper's."""
    if papers is None:
        return "not in the paper"
    if not is_told(figure):
        return "cannot tell"
    assert figure is not None
    word = "agrees" if (figure["mean"] < 0) == (papers < 0) else "disagrees"
    return word if figure["verdict"] == "a difference" else f"{word} (a hint)"


def order(losses: dict[str, float]) -> list[str]:
    """Best first."""
    return sorted(losses, key=lambda name: losses[name])


def family_disagreements(results: Json) -> list[str]:
    """Pairs of families whose order here, beyond the noise, is not that of all of the paper's sizes."""
    found = []
    for pair in results["family_differences"]:
        sizes = [
            size
            for size, losses in TABLE_1.items()
            if agreement(pair["held_out"], losses[pair["model"]] - losses[pair["minus"]]).startswith("disagrees")
        ]
        if sizes:
            better, worse = pair["model"], pair["minus"]
            if pair["held_out"]["mean"] > 0:
                better, worse = worse, better
            hint = " (a hint only)" if pair["held_out"]["verdict"] == "a hint" else ""
            found.append(f"`{better}` is ahead of `{worse}` here{hint}; in the paper it is behind at {listed(sizes)}.")
    return found


def switch_disagreements(results: Json) -> list[str]:
    """Ablations whose effect has, beyond the noise, another sign than the paper's."""
    found = []
    for name, row in results["ablations"].items():
        figure = row["difference_to_baseline"]["held_out"]
        if agreement(figure, expected_change(name)).startswith("disagrees"):
            hint = " (a hint only)" if figure["verdict"] == "a hint" else ""
            found.append(
                f"`{name}`: {signed(figure)} {UNIT}{hint}, so the switch made the model worse here; in the paper it "
                "made it better."
            )
    return found


def disagreements(results: Json) -> list[str]:
    """Where the signs here, beyond the noise, are not the paper's; a sentence that says so where there are none."""
    found = family_disagreements(results) + switch_disagreements(results)
    return found or ["no sign that can be told from the noise is against it."]


def listed(items: list[str], last: str = "and") -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else "none"
