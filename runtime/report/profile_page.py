"""The page of one profile."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.profile.schema import check_document
from ultramem.runtime.profile.units import bytes_text, scaled_text, share_text, time_text
from ultramem.runtime.report.page import escape, heading, number, page
from ultramem.runtime.report.sections import (
    Source,
    engine_name,
    latency_headline,
    latency_section,
    machine_section,
    roofline_section,
    stage_section,
)


def render_profile(profile_json: dict[str, Any]) -> str:
    """One self-contained HTML page of a profile (the document of `ultramem.runtime.profile.to_json`).

    Raises:
        ValueError: the document is not a profile, or of a format that this version does not read.
    """
    source = Source(check_document(profile_json), "")
    model = source.profile["model"]
    title = f"{source.name}: {latency_headline(source)}"
    lead = (
        f"Latency of {source.name} ({scaled_text(model['parameters'], '').strip()} parameters, {model['dtype']}) on "
        f"{', '.join(engine_name(engine['name']) for engine in source.profile['engines'])}: how long a forward takes, "
        "in which stage, and how far that is from what the machine can move and compute."
    )
    body = [
        f'<header><h1>{heading(title)}</h1><p class="lead">{escape(lead)}</p>{_tiles(source)}</header>',
        latency_section([source]),
        stage_section([source]),
        roofline_section(source),
        machine_section([source]),
    ]
    return page(f"{source.name}, profile", body, source.profile)


def _tiles(source: Source) -> str:
    profile = source.profile
    batch = min(profile["settings"]["batches"])
    tiles = []
    for phase in ("decode", "prefill"):
        chosen = [
            (index, row)
            for index, row in enumerate(profile["latency"])
            if (row["phase"], row["batch"]) == (phase, batch)
        ]
        index, row = min(chosen, key=lambda pair: pair[1]["p50_us"])
        label = f"{phase}, median, batch {batch}, {engine_name(row['engine'])}"
        tiles.append((time_text(row["p50_us"]), f"/latency/{index}/p50_us", label))
        if phase == "decode":
            text = share_text(row["bandwidth_share"])
            tiles.append((text, f"/latency/{index}/bandwidth_share", "of the measured memory bandwidth, same step"))
    text = bytes_text(profile["model"]["weight_bytes"])
    tiles.append((text, "/model/weight_bytes", f"of weights, {profile['model']['dtype']}"))
    cells = "".join(
        f'<div class="tile">{number(text, path, tag="b")}<span>{escape(label)}</span></div>'
        for text, path, label in tiles
    )
    return f'<div class="tiles">{cells}</div>'
