"""A profile against an earlier one of the same model, machine and settings: what changed, and whether it may.

A change beyond its limit fails only if the machine's own drift cannot explain it: a profile has a value of the metric
for every round, and the intervals from the lowest to the highest of them must not overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ultramem.runtime.profile.schema import check_document
from ultramem.runtime.profile.units import time_text

LATENCY_METRICS = ("p50", "p90", "p99")
REQUEST_METRICS = ("ttft", "tpot")
METRICS = (*LATENCY_METRICS, *REQUEST_METRICS)
RULE = (
    "a metric fails where it exceeds the limit and the interval of its values in the rounds, lowest to highest, "
    "lies above the baseline's"
)

# Versions may differ: what an upgrade does is a question that one asks.
_MACHINE_FIELDS = ("device", "cores", "threads", "system", "cpu_flags")
_MODEL_FIELDS = ("parameters", "dtype", "config")
_LIMIT = re.compile(rf"({'|'.join(METRICS)})>\+(\d+(?:\.\d+)?)%")


class Limit(NamedTuple):
    """The most that a metric may grow."""

    metric: str
    growth: float
    """0.05 for "+5%"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One metric of one engine, batch and phase, before and now."""

    engine: str
    batch: int
    phase: str
    """"prefill", "decode" or "request"."""
    metric: str
    before_us: float
    now_us: float
    before_low_us: float
    """Lowest value of a round, as before_high_us is the highest."""
    before_high_us: float
    now_low_us: float
    now_high_us: float
    growth: float
    """now / before - 1."""
    limit: float | None
    """Of the growth; None: any is accepted."""
    fails: bool


def parse_limits(text: str) -> tuple[Limit, ...]:
    """Limits such as "p50>+5%,ttft>+10%".

    Raises:
        ValueError: the text is something else, or names a metric twice.
    """
    limits = []
    for word in text.split(","):
        found = _LIMIT.fullmatch(word.replace(" ", ""))
        if found is None:
            raise ValueError(
                f"fail_if must be METRIC>+N%, separated by commas, METRIC of {', '.join(METRICS)}, got {text!r}"
            )
        limits.append(Limit(found[1], float(found[2]) / 100))
    if len({limit.metric for limit in limits}) < len(limits):
        raise ValueError(f"fail_if must name each metric once, got {text!r}")
    return tuple(limits)


def read_profile(path: Path, field: str) -> dict[str, Any]:
    """The document of the profile.json that is given as `field`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a profile of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{field} must be a profile.json, got {path}, which is not a file")
    try:
        return check_document(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSON's and Unicode's errors are such too
        raise ValueError(f"{field}: {path} is not a profile: {error}") from error


def check_comparable(
    earlier: Mapping[str, Any],
    *,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    engines: Iterable[str] | None = None,
    called: str = "the baseline",
) -> None:
    """Raise unless `earlier` is of this machine and these settings, and of the model and engines where they are given.

    Args:
        earlier: a document of `to_json`.
        machine: as in such a document; fields that are missing may differ.
        settings: the same.
        model: the same; None: any.
        engines: names; None: any.
        called: the name of `earlier` in the message.

    Raises:
        ValueError: the first field that differs.
    """
    for section, now, fields in (
        ("machine", machine, [field for field in _MACHINE_FIELDS if field in machine]),
        ("model", model or {}, _MODEL_FIELDS if model is not None else ()),
        ("settings", settings, tuple(settings)),
    ):
        for field in fields:
            _check_same(f"{section}.{field}", earlier[section][field], now[field], called)
    if engines is not None:
        _check_same("engines", sorted(each["name"] for each in earlier["engines"]), sorted(engines), called)


def compare(baseline: Mapping[str, Any], now: Mapping[str, Any], limits: Sequence[Limit] = ()) -> tuple[Change, ...]:
    """Every metric of two profiles (documents of `to_json`), before and now, in the order of `now`.

    Raises:
        ValueError: they are not comparable; the message names the field.
    """
    check_comparable(
        baseline,
        model=now["model"],
        machine=now["machine"],
        settings=now["settings"],
        engines=[each["name"] for each in now["engines"]],
    )
    growths = {limit.metric: limit.growth for limit in limits}
    changes = []
    for kind, metrics in (("requests", REQUEST_METRICS), ("latency", LATENCY_METRICS)):
        earlier = {_key(row): row for row in baseline[kind]}
        for row in now[kind]:
            for metric in metrics:
                changes.append(_change(metric, earlier[_key(row)], row, growths.get(metric)))
    return tuple(changes)


def change_table(changes: Sequence[Change]) -> Table:
    """Changes of the metrics that have a limit (of all, where none has), the failing ones marked."""
    shown = [change for change in changes if change.limit is not None] or list(changes)
    table = Table(title="Against the baseline", title_justify="left", caption=f"Rule: {RULE}.", caption_justify="left")
    for heading in ("phase", "batch", "engine", "metric"):
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in ("before", "now", "change", "limit", "rounds before", "rounds now"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for change in shown:
        table.add_row(
            change.phase,
            str(change.batch),
            change.engine,
            change.metric,
            time_text(change.before_us),
            time_text(change.now_us),
            f"{change.growth:+.1%}",
            "-" if change.limit is None else f"{change.limit:+.1%}",
            f"{time_text(change.before_low_us)} - {time_text(change.before_high_us)}",
            f"{time_text(change.now_low_us)} - {time_text(change.now_high_us)}",
            "fails" if change.fails else "",
        )
    return table


def _change(metric: str, before: Mapping[str, Any], now: Mapping[str, Any], limit: float | None) -> Change:
    rounds_before, rounds_now = before[f"round_{metric}_us"], now[f"round_{metric}_us"]
    before_us, now_us = before[f"{metric}_us"], now[f"{metric}_us"]
    return Change(
        engine=now["engine"],
        batch=now["batch"],
        phase=now.get("phase", "request"),
        metric=metric,
        before_us=before_us,
        now_us=now_us,
        before_low_us=min(rounds_before),
        before_high_us=max(rounds_before),
        now_low_us=min(rounds_now),
        now_high_us=max(rounds_now),
        growth=now_us / before_us - 1,
        limit=limit,
        fails=limit is not None and now_us > before_us * (1 + limit) and min(rounds_now) > max(rounds_before),
    )


def _key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["engine"], row["batch"], row.get("phase", "request")


def _check_same(field: str, before: Any, now: Any, called: str) -> None:
    if isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            _check_same(f"{field}.{name}", before.get(name), now.get(name), called)
    elif before != now:
        raise ValueError(f"{field} must be that of {called}, {before!r}, got {now!r}")
