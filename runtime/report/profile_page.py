"""The page of a profile, and of others beside it."""

from __future__ import annotations

from typing import Any

from ultramem.runtime.profile.baseline import check_comparable
from ultramem.runtime.profile.schema import check_document
from ultramem.runtime.profile.units import bytes_text, number_text, scaled_text, share_text, time_text
from ultramem.runtime.report.latency_section import latency_headline, latency_section
from ultramem.runtime.report.machine_section import machine_section
from ultramem.runtime.report.matrix_section import matrix_section
from ultramem.runtime.report.node_section import node_section
from ultramem.runtime.report.page import escape, heading, number, page
from ultramem.runtime.report.request_section import request_section
from ultramem.runtime.report.roofline_section import roofline_section
from ultramem.runtime.report.source import Source, chosen, engine_name
from ultramem.runtime.report.stage_section import stage_section
from ultramem.runtime.report.sweep_section import sweep_section

KIND = "ultramem-profiles"
FORMAT_VERSION = 1


def render_profile(profile_json: dict[str, Any], *others: dict[str, Any]) -> str:
    """One self-contained HTML page of a profile (the document of `ultramem.runtime.profile.to_json`), or of several.

    Args:
        profile_json: the profile.
        others: of other models, on the same machine with the same settings.

    Raises:
        ValueError: a document is not a profile, or of a format that this version does not read, or of another machine
            or settings than the first.
    """
    first, *rest = (check_document(each) for each in (profile_json, *others))
    for other in rest:
        check_comparable(
            other,
            machine=first["machine"],
            settings=first["settings"],
            called=f"the profile of {other['model']['name']} beside it",
        )
    if not rest:
        sources = [Source(first, "")]
        data: Any = first
    else:
        sources = [Source(each, f"/profiles/{index}") for index, each in enumerate((first, *rest))]
        data = {"kind": KIND, "format_version": FORMAT_VERSION, "profiles": [first, *rest]}
    source = sources[0]
    model = source.profile["model"]
    title = f"{source.name}: {latency_headline(source)}"
    lead = (
        f"Latency of {source.name} ({scaled_text(model['parameters'], '').strip()} parameters, {model['dtype']}) on "
        f"{', '.join(engine_name(engine['name']) for engine in source.profile['engines'])}: how long a request and a "
        "forward take, in which stage and node, and how far that is from what the machine can move and compute."
    )
    if rest:
        lead += f" Beside it: {', '.join(each.name for each in sources[1:])}."
    body = [
        f'<header><h1>{heading(title)}</h1><p class="lead">{escape(lead)}</p>{_tiles(source)}</header>',
        *([matrix_section(sources)] if rest else []),
        request_section(sources),
        latency_section(sources),
        sweep_section(sources),
        stage_section(sources),
        *(roofline_section(each) for each in sources),
        *(node_section(each) for each in sources),
        machine_section(sources),
    ]
    return page(f"{source.name}, profile", body, data)


def _tiles(source: Source) -> str:
    profile = source.profile
    here, batch = source.pointer, min(profile["settings"]["batches"])
    index, row = min(chosen(profile["requests"], batch=batch), key=lambda pair: pair[1]["tpot_us"])
    engine = engine_name(row["engine"])
    tiles = [
        (time_text(row["ttft_us"]), f"{here}/requests/{index}/ttft_us", f"to the first token, batch {batch}, {engine}"),
        (time_text(row["tpot_us"]), f"{here}/requests/{index}/tpot_us", "per token after it, same engine"),
        (number_text(row["tokens_per_second"]), f"{here}/requests/{index}/tokens_per_second", "tokens per second"),
    ]
    decode = chosen(profile["latency"], phase="decode", batch=batch)
    index, row = min(decode, key=lambda pair: pair[1]["p50_us"])
    label = f"of the measured memory bandwidth, decode step, {engine_name(row['engine'])}"
    tiles.append((share_text(row["bandwidth_share"]), f"{here}/latency/{index}/bandwidth_share", label))
    text = bytes_text(profile["model"]["weight_bytes"])
    tiles.append((text, f"{here}/model/weight_bytes", f"of weights, {profile['model']['dtype']}"))
    cells = "".join(
        f'<div class="tile">{number(text, path, tag="b")}<span>{escape(label)}</span></div>'
        for text, path, label in tiles
    )
    return f'<div class="tiles">{cells}</div>'
