"""README.md and the plots of this folder from its result files alone: python docs/figures/make_page.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ultramem.runtime.figures import FIGURES, check_document
from ultramem.runtime.figures.schema import EXPLAINED_WITHIN
from ultramem.runtime.profile.units import bytes_text, number_text, share_text, time_text

HERE = Path(__file__).resolve().parent
DEVICES = ("a100", "h100", "this")
FAMILIES = {"dense": "dense", "moe": "MoE", "pkm": "PKM", "ultramem": "UltraMem"}
COLORS = {"dense": "#00866a", "moe": "#d55e00", "pkm": "#b0578f", "ultramem": "#0072b2"}
BUSY = 0.1
"""A share of the time of other processes above which a page warns of it."""
Documents = dict[tuple[str, int], dict[str, Any]]

INTRO = """# The paper's figures

Written by `python docs/figures/make_page.py` from the JSON files in this folder, which this makes:

```bash
ultramem profile --figure 1 --device a100 --out docs/figures/a100   # and 6, 7; h100, h200: arithmetic, a second each
ultramem profile --figure 1 --device this --out docs/figures/this   # measured too, minutes; figure 6 takes 6 GB
```

Each run also writes a page, `figure-N.html`: every point, every reason, every rate that was measured.

The setting is that of the paper's captions: one decode step, one new token a sequence, 2048 tokens in the cache of keys
and values; Figure 6(c) at batch 512; the paper's device is the A100-SXM-80GB. Since the cache hides what the layers do,
all is done without a cache as well. Experts and rows are chosen uniformly, and a step takes, stage by stage, the longer
of moving its bytes and computing its FLOPs: `runtime/figures/expected.py` has the equations.
"""


def read(folder: Path) -> Documents:
    """Every result file, checked."""
    return {
        (device, figure): check_document(json.loads((folder / device / f"figure-{figure}.json").read_text()))
        for device in DEVICES
        for figure in FIGURES
    }


def readme(documents: Documents) -> str:
    """The whole page."""
    parts = [INTRO]
    for figure in FIGURES:
        parts += [f"## Figure {'6(c)' if figure == 6 else figure}", f"![Figure {figure}](figure-{figure}.svg)"]
        parts += [_claims(documents, figure), READINGS[figure](documents["a100", figure])]
        parts.append(_measured(documents["this", figure]))
    parts.append(_conditions(documents["this", 1]))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _claims(documents: Documents, figure: int) -> str:
    """The paper's statements on the devices with published roofs."""
    devices = [device for device in DEVICES if device != "this"]
    labels = [documents[device, figure]["device"]["label"] for device in devices]
    lines = [
        f"| the paper says | here | {' | '.join(labels)} |",
        f"| --- | --- | {' | '.join('---:' for _ in labels)} |",
    ]
    columns = [documents[device, figure]["claims"] for device in devices]
    for claims in zip(*columns, strict=True):
        found = " | ".join(f"{_value(claim['value'])}{'' if claim['agrees'] else ', no'}" for claim in claims)
        lines.append(f"| {claims[0]['paper']} | {claims[0]['quantity']} | {found} |")
    return "\n".join(lines)


def _point(document: dict[str, Any], family: str, batch: int, cached: int) -> dict[str, Any]:
    """The last such point at 1.6B: in Figure 6 the one with the most sparse parameters."""
    return next(
        point
        for point in reversed(document["arithmetic"])
        if (point["family"], point["size"], point["batch"], point["cached_tokens"]) == (family, "1.6b", batch, cached)
    )


def _reading_1(document: dict[str, Any]) -> str:
    label = document["device"]["label"]
    moe, ultramem = (
        {cached: _point(document, each, 64, cached) for cached in (0, 2048)} for each in ("moe", "ultramem")
    )
    per_token = (ultramem[2048]["roofline_us"] - ultramem[0]["roofline_us"]) / 2048
    tokens = number_text((moe[0]["roofline_us"] - 6 * ultramem[0]["roofline_us"]) / (5 * per_token), 2)
    share = share_text(ultramem[2048]["cache_bytes"] / ultramem[2048]["total_bytes"])
    fits = max(
        point["batch"]
        for point in document["arithmetic"]
        if (point["family"], point["cached_tokens"], point["fits"]) == ("moe", 2048, True)
    )
    return f"""The statements are read as numbers: "6 times" holds between 4.8 and 7.2. At batch 64 the cache of 2048
tokens is {share} of what UltraMem's step moves, and no layer can save it: on {label} the paper's factor of 6
is what a cache of about {tokens} tokens gives. MoE at 1.6B with 2048 of them fits into that device up to
batch {fits}. That UltraMem costs hardly more than the dense model, and that the gain is largest at batch 64, is what
the bytes of the layers say, without a cache."""


def _reading_6(document: dict[str, Any]) -> str:
    point = _point(document, "ultramem", 512, 2048)
    memory = document["device"]["memory_bytes"]
    return f"""At batch 512 the cache of 2048 tokens alone is {bytes_text(point["cache_bytes"])}, where the device holds
{bytes_text(memory)}: dense attention of this size over such a cache for every sequence cannot have run on one of them,
and the paper does not say what did. UltraMem's growth, where there is any, is that of its keys, with the root of the
rows."""


def _reading_7(document: dict[str, Any]) -> str:
    moe, ultramem = (_point(document, each, 131072, 0) for each in ("moe", "ultramem"))
    cache = bytes_text(_point(document, "moe", 131072, 2048)["cache_bytes"])
    return f"""Value rows align with experts where the paper says. Of all bytes UltraMem moves more there,
{bytes_text(ultramem["total_bytes"])} against {bytes_text(moe["total_bytes"])} without a cache, for its activations
({bytes_text(ultramem["activation_bytes"])} against {bytes_text(moe["activation_bytes"])}): scores of all keys are
written by one stage and read by the next. Steps of so many sequences are bound by products, so the advantage in speed
ends before; a cache of 2048 tokens for all of them would be {cache}."""


READINGS = {1: _reading_1, 6: _reading_6, 7: _reading_7}


def _value(value: float | None) -> str:
    return "none" if value is None else number_text(value, 6 if value >= 1000 else 3)


def _measured(document: dict[str, Any]) -> str:
    measured = document["measured"]
    lines = [
        f"Measured on {measured['machine']['device']}, threads: {measured['machine']['threads']}, "
        "float32; ratios of medians without the time of other processes:",
        "",
        "| check | measured | predicted | accepted | met |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for check in measured["checks"]:
        low = "" if check["low"] is None else f"{number_text(check['low'])} to "
        accepted = f"{low}{number_text(check['high'])}" if low else f"at most {number_text(check['high'])}"
        predicted = "" if check["predicted"] is None else number_text(check["predicted"])
        met = "yes" if check["met"] else "no"
        lines.append(f"| {check['name']} | {number_text(check['value'])} | {predicted} | {accepted} | {met} |")
    far = [point for point in measured["points"] if point["reason"]]
    unexplained = [point for point in far if point["reason"].startswith("not explained")]
    lines += [
        "",
        f"Of {len(measured['points'])} measurements {len(far)} differ from the roofline by over 1.5 times; "
        f"{len(far) - len(unexplained)} of these are explained within 1.5 times by waiting for other processes, "
        "overhead of calls, random rows and products of few rows, each measured by itself; "
        f"{len(unexplained)} are not explained in full.",
        "",
    ]
    lines += [
        f"- {point['series']} ({point['engine']}), {_x(document, point)}: {time_text(point['p50_us'])}, "
        f"{number_text(point['ratio'])} times the roofline; {point['reason']}"
        for point in unexplained
    ]
    lines += ["", _without_waiting(measured["points"])]
    return "\n".join(lines)


def _without_waiting(points: list[dict[str, Any]]) -> str:
    """How far the parts explain what is left when the time of other processes is taken away."""
    near = sum(
        1 / EXPLAINED_WITHIN
        <= (point["p50_us"] - point["waiting_us"]) / (point["explained_us"] - point["waiting_us"])
        <= EXPLAINED_WITHIN
        for point in points
    )
    share = sum(point["waiting_us"] for point in points) / sum(point["p50_us"] for point in points)
    so = ", so the ratios of wall time to roofline say little by themselves" if share > BUSY else ""
    return (
        f"Other processes took {share_text(share)} of the time of these calls{so}. Of what is left, overhead, random "
        f"rows and products explain {near} of {len(points)} within {EXPLAINED_WITHIN:g} times."
    )


def _x(document: dict[str, Any], point: dict[str, Any]) -> str:
    if document["figure"] != 6:
        return f"batch {point['batch']}"
    return f"{point['x']:,} rows, {point['batch']} tokens"


def _conditions(document: dict[str, Any]) -> str:
    measured = document["measured"]
    return f"""## How it was measured

The calls of a group take turns in {measured["rounds"]} rounds; times are medians. Every result was compared with
float64 first. Inputs differ from call to call, so that caches do not hold the rows of the next one. Beside each call
ran the same call of a model of tiny widths (its time is overhead) and `embedding_bag` over as many random rows of as
large a table. Other work: {measured["conditions"] or "not stated"}
(load {number_text(measured["load_average"])} before the first figure)."""


def draw(documents: Documents, out: Path) -> None:
    """A plot a figure: the paper's setting by arithmetic on the left, this machine on the right."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ultramem[plot]'") from error
    plt.rcParams["svg.hashsalt"] = "figures"  # the same file from the same numbers
    for figure in FIGURES:
        plot, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        by_arithmetic, here = documents["a100", figure], documents["this", figure]
        _arithmetic_axes(axes[0], by_arithmetic, "roofline_us", 1e-3, "ms a step")
        _arithmetic_axes(axes[1], by_arithmetic, "total_bytes", 1e-9, "GB a step")
        _measured_axes(axes[2], here)
        for each in axes:
            each.set_xscale("log", base=2)
            each.set_yscale("log")
            each.grid(alpha=0.3)
            each.legend(fontsize=7)
        plot.savefig(out / f"figure-{figure}.svg", metadata={"Date": None})
        plt.close(plot)


def _arithmetic_axes(axes: Any, document: dict[str, Any], key: str, scale: float, unit: str) -> None:
    x = "sparse_ratio" if document["figure"] == 6 else "batch"
    for family, name in FAMILIES.items():
        for cached, style in ((2048, "-"), (0, "--")):
            points = [
                point
                for point in document["arithmetic"]
                if (point["family"], point["size"], point["cached_tokens"]) == (family, "1.6b", cached)
            ]
            if points:
                label = f"{name}, {cached} cached" if cached else f"{name}, none cached"
                values = [scale * point[key] for point in points]
                axes.plot([point[x] for point in points], values, style, color=COLORS[family], label=label)
    axes.set_xlabel("sparse parameters / dense model's" if x == "sparse_ratio" else "batch")
    axes.set_ylabel(unit)
    axes.set_title(f"1.6B, {document['device']['label']}, by arithmetic", fontsize=10)


def _measured_axes(axes: Any, document: dict[str, Any]) -> None:
    points = document["measured"]["points"]
    by_rows = document["figure"] == 6
    if by_rows:
        points = [point for point in points if point["batch"] == 64 and point["row_bytes"] in (0, 256)]
    for place, (series, engine) in enumerate(dict.fromkeys((point["series"], point["engine"]) for point in points)):
        own = [point for point in points if (point["series"], point["engine"]) == (series, engine)]
        xs = [point["x"] for point in own]
        color = COLORS.get(series, COLORS["moe"] if series == "MoE layer" else f"C{place}")
        name = FAMILIES.get(series, series if engine == "eager" else f"{series}, compiled")
        axes.plot(xs, [1e-3 * point["p50_us"] for point in own], "-o", ms=4, color=color, label=name)
        low, high = ([1e-3 * point[key] for point in own] for key in ("p25_us", "p75_us"))
        axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(xs, [1e-3 * point["roofline_us"] for point in own], "--", lw=1, color=color)
    axes.set_xlabel("rows of the table" if by_rows else "batch")
    axes.set_ylabel("ms (median, quartiles)")
    what = "measured here, 64 tokens" if by_rows else "measured here"
    axes.set_title(f"{what}; dashed: roofline", fontsize=10)


def main() -> int:
    """Write everything anew."""
    try:
        documents = read(HERE)
        draw(documents, HERE)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"make_page: {error}", file=sys.stderr)
        return 2
    (HERE / "README.md").write_text(readme(documents))
    print(HERE / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
