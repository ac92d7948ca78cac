"""Results as text: one screen of goals for a terminal, tables for the documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

SYMBOLS = {True: "reached", False: "missed", None: "not measured"}


def goals_table(document: Record) -> str:
    """Tests, rows that gave no result, and every goal with what was reached."""
    lines = []
    for test in document.get("tests", ()):
        if test["status"] not in ("passed", "nothing to run"):
            names = " ".join(each["test"] for each in test.get("failed", ())[:3])
            lines.append(f"TESTS {test['file']}: {test['status']} {names}")
    passed = sum(test.get("tests", 0) - test.get("skipped", 0) for test in document.get("tests", ()))
    lines.append(f"{passed} tests ran")
    lines.append(f"{'row':52} {'us':>10} {'floor':>10}  goal")
    for row in document["rows"]:
        lines += _row_lines(row)
    states = Counter(row["status"] for row in document["rows"])
    goals = Counter(goal["reached"] for row in document["rows"] for goal in row.get("goals", ()))
    lines.append(
        f"rows: {', '.join(f'{n} {state}' for state, n in states.items())}; "
        f"goals: {goals[True]} reached, {goals[False]} missed, {goals[None]} not measured"
    )
    if any(row["rehearsal"] for row in document["rows"]):
        lines.append("A REHEARSAL: small shapes on a CPU. The times are no figures.")
    return "\n".join(lines)


def _row_lines(row: Record) -> list[str]:
    if row["status"] != "measured":
        reason = row["reason"].splitlines()[-1] if row["reason"] else ""
        return [f"{row['row']:52} {row['status']}: {reason[:60]}"]
    ours = next((c for c in row["contenders"] if c["role"] == "ours" and "median_us" in c), None)
    time_us = f"{ours['median_us']:10.1f}" if ours else f"{'':10}"
    floor_us = f"{row['floor']['us']:10.1f}" if row["floor"] else f"{'':10}"
    goals = [f"{goal['goal']}: {value_text(goal)} {SYMBOLS[goal['reached']]}" for goal in row["goals"]] or [""]
    lines = [f"{row['row']:52} {time_us} {floor_us}  {goals[0]}"]
    lines += [f"{'':52} {'':10} {'':10}  {goal}" for goal in goals[1:]]
    bad = [c for c in row["contenders"] if c["status"] in ("wrong", "failed")]
    return lines + [f"    {c['name']} {c['status'].upper()}: {c['reason'].splitlines()[0][:90]}" for c in bad]


def value_text(goal: Record) -> str:
    """A goal's value with its unit."""
    value = goal["value"]
    if value is None:
        return "-"
    if goal["quantity"] == "bandwidth_share":
        return f"{100 * value:.0f} %"
    if goal["quantity"] == "launches":
        return f"{value:.0f}"
    return f"{value:.2f} us" if goal["quantity"] == "over_floor_us" else f"{value:.2f}x"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """The first columns are text, the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
