"""The page of a profile: what a reader sees is what the JSON says; plots stand where their values are."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest
from made_up_profile import NODES, make_document
from shown_page import Page, check_numbers

from ultramem.runtime.profile import STAGES, schema
from ultramem.runtime.report import render_profile
from ultramem.runtime.report.charts import LABEL_ROOM
from ultramem.runtime.report.roofline_plot import Point, decades, roofline_plot
from ultramem.runtime.report.sweep_plot import SweepCurve, SweepPoint, marks_between, sweep_plot


def test_the_made_up_profile_has_the_fields_of_the_schema() -> None:
    document = make_document()
    for rows, of in (
        ([document], schema.Profile),
        ([document["settings"]], schema.Settings),
        (document["engines"], schema.EngineRecord),
        (document["requests"], schema.Request),
        (document["row_use"], schema.RowUse),
        (document["latency"], schema.Latency),
        (document["stages"], schema.StageTimes),
        ([row for times in document["stages"] for row in times["rows"]], schema.StageRow),
        ([row for times in document["stages"] for row in times["modules"]], schema.ModuleRow),
        ([row for times in document["stages"] for row in times["nodes"]], schema.NodeRow),
        (document["arithmetic"], schema.StageArithmetic),
    ):
        expected = {field.name for field in dataclasses.fields(of)}
        assert all(row.keys() - {"kind", "format_version"} == expected - {"kind"} for row in rows), of


def test_profile_page_shows_the_numbers_of_its_json() -> None:
    document = make_document()
    page = Page(render_profile(document))
    assert json.loads(page.data) == document
    check_numbers(page)
    pointers = {pointer for pointer, _ in page.shown}
    for index in range(len(document["latency"])):
        for name in ("p50_us", "p90_us", "p99_us", "tokens_per_second", "bandwidth_share", "compute_share"):
            assert f"/latency/{index}/{name}" in pointers
    for index, times in enumerate(document["stages"]):
        assert {
            f"/stages/{index}/{name}"
            for name in ("coverage", "sum_ratio", "plain_us", "instrument_us", "max_abs_difference")
        } <= pointers
        assert all(f"/stages/{index}/rows/{place}/time_us" in pointers for place in range(len(times["rows"])))
        for place, row in enumerate(times["rows"]):
            for name in ("p50_us", "p99_us", "calls", "flops", "bytes", "flops_per_byte", "bandwidth_share"):
                assert (f"/stages/{index}/rows/{place}/{name}" in pointers) == (row[name] is not None)
        assert all(f"/stages/{index}/nodes/{place}/p90_us" in pointers for place in range(NODES))
        for place, row in enumerate(times["modules"]):
            for name in ("time_us", "bandwidth_share", "compute_share"):
                assert (f"/stages/{index}/modules/{place}/{name}" in pointers) == (row[name] is not None)
    for index in range(len(document["arithmetic"])):
        assert f"/arithmetic/{index}/total_bytes" in pointers
    for index, row in enumerate(document["requests"]):
        for name in ("ttft_us", "tpot_us", "gap_p99_us", "tokens_per_second", "recompiles", "minor_faults"):
            assert f"/requests/{index}/{name}" in pointers
        assert (f"/requests/{index}/launches_per_step" in pointers) == (row["launches_per_step"] is not None)
    for index in range(len(document["engines"])):
        for name in (
            "export_seconds",
            "open_seconds",
            "warm_up_seconds",
            "graphs",
            "graph_breaks",
            "cached_graphs",
            "memory_bytes",
        ):
            assert f"/engines/{index}/{name}" in pointers
    assert {f"/row_use/{index}/rows_touched" for index in range(4)} <= pointers


def test_profiles_side_by_side_have_a_matrix() -> None:
    one, two = make_document("one"), make_document("two")
    for row in two["requests"]:
        row["tpot_us"] *= 0.77
    two["engines"].pop()
    two["requests"] = [row for row in two["requests"] if row["engine"] == "eager"]
    page = Page(render_profile(one, two))
    check_numbers(page)
    data = json.loads(page.data)
    assert (data["kind"], data["profiles"]) == ("ultramem-profiles", [one, two])
    pointers = {pointer for pointer, _ in page.shown}
    assert {"/profiles/0/requests/1/tpot_us", "/profiles/1/requests/0/tpot_us"} <= pointers
    assert {"/profiles/1/latency/3/p50_us", "/profiles/1/stages/0/nodes/0/p50_us"} <= pointers
    fastest = "Fastest token at batch 1: one 667 µs (torch.compile), two 1.03 ms (eager)"
    assert fastest in page.text.replace("\u00a0", " ")


@pytest.mark.parametrize(("section", "field"), [("settings", "prompt_tokens"), ("machine", "device")])
def test_profiles_that_do_not_compare_are_not_shown_together(section: str, field: str) -> None:
    other = make_document("two")
    other[section][field] = "another"
    with pytest.raises(ValueError, match=f"^{section}.{field} must be that of the profile of two beside it"):
        render_profile(make_document(), other)


def test_a_waterfall_adds_up_to_the_wall_time() -> None:
    document = make_document()
    text = render_profile(document)
    (chart, *_) = re.findall(r'aria-label="eager, a decode step">(.*?)<div class="axis-title">', text)
    bars = re.findall(r'class="bar part[^"]*" style="left:([\d.]+)%;width:([\d.]+)%', chart)
    assert len(bars) == len(STAGES) + 1
    end = 0.0
    for left, width in bars:
        assert float(left) == pytest.approx(end, abs=0.02)
        end = float(left) + float(width)
    assert end == pytest.approx(100 * (1 - LABEL_ROOM), abs=0.1)


def test_points_of_a_roofline_stand_where_they_compute() -> None:
    def point(flops_per_byte: float, flops_per_second: float, *, is_bound: bool = False) -> Point:
        return Point(
            label="a", flops_per_byte=flops_per_byte, flops_per_second=flops_per_second, color="red",
            is_bound=is_bound, tooltip="",
        )  # fmt: skip

    # On the slope, at the corner and on the level part; below the level part by a factor of ten.
    points = [point(1, 1e9), point(10, 1e10), point(100, 1e10), point(100, 1e9, is_bound=True)]
    text = roofline_plot(points, bytes_per_second=1e9, flops_per_second=1e10, summary="")
    (roof,) = re.findall(r'class="roof" points="([^"]+)"', text)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in roof.split())
    places = [
        (float(x), float(y)) for x, y in re.findall(r'class="dot(?: ring)?" style="left:([\d.]+)%;top:([\d.]+)%', text)
    ]
    assert places[1] == pytest.approx((x1, y1), abs=0.02)
    slope = (y1 - y0) / (x1 - x0)
    assert places[0][1] == pytest.approx(y0 + slope * (places[0][0] - x0), abs=0.05)
    assert places[2][1] == pytest.approx(y2, abs=0.02)
    assert x1 < places[2][0] < x2 <= 100
    # A factor of ten is the same length anywhere.
    assert places[2][0] - places[1][0] == pytest.approx(places[1][0] - places[0][0], abs=0.05)
    assert places[3][1] - places[2][1] == pytest.approx(places[0][1] - places[1][1], abs=0.05)
    assert text.count("dot ring") == 1


def test_sweeps_show_every_engine_and_model_at_every_batch() -> None:
    one, two = make_document("one"), make_document("two")
    page = Page(render_profile(one, two))
    shown = [attributes["data-point"] for _, attributes in page.tags if "data-point" in attributes]
    expected = [
        f"/profiles/{profile}/{kind}/{index}/{name}"
        for profile in range(2)
        for kind, names in (("latency", ["p50_us"]), ("requests", ["ttft_us", "tpot_us"]))
        for index in range(len(one[kind]))
        for name in names
    ]
    assert sorted(str(each) for each in shown) == sorted(expected)
    pointers = [pointer for pointer, _ in page.shown]
    assert set(expected) <= set(pointers)
    # An engine is a colour, a model a kind of line.
    lines = re.findall(r'class="strong" style="(stroke:[^"]+)"', render_profile(one, two))
    assert len(lines) == 4 * 4
    assert len(set(lines)) == 4
    assert "From batch 1 to 8 a decode step of one takes 8.0 times as long on torch.compile" in page.text.replace(
        "\u00a0", " "
    )


def test_one_batch_is_no_sweep() -> None:
    document = make_document()
    document["settings"]["batches"] = [1]
    for kind in ("latency", "requests", "stages", "arithmetic", "row_use"):
        document[kind] = [row for row in document[kind] if row["batch"] == 1]
    assert "data-point" not in render_profile(document)


def test_points_of_a_sweep_stand_where_their_values_are() -> None:
    def point(x: float, y: float, *, spread: float = 1.1) -> SweepPoint:
        return SweepPoint(x=x, y=y, low=y / spread, high=y * spread, path="/a", tooltip="")

    curve = SweepCurve(label="a", color="red", dashes="", points=[point(1, 1e3), point(4, 1e4), point(16, 1e5)])
    text = sweep_plot([curve], x_title="", y_title="", unit="ms", scale=1e3, summary="")
    (left, top), (middle, half), (right, low) = (
        (float(x), float(y)) for x, y in re.findall(r'class="dot" style="left:([\d.]+)%;top:([\d.]+)%', text)
    )
    assert middle - left == pytest.approx(right - middle)
    assert top - half == pytest.approx(half - low)
    assert top > half > low
    marks = re.findall(r'<span style="top:([\d.]+)%">([\d.]+)</span>', text)
    assert {label: float(place) for place, label in marks}["10"] == pytest.approx(half, abs=0.02)
    (band,) = re.findall(r'class="band" style="fill:red" points="([^"]+)"', text)
    corners = [tuple(map(float, pair.split(","))) for pair in band.split()]
    assert len(corners) == 6
    assert [x for x, _ in corners] == [left, middle, right, right, middle, left]
    assert all(upper[1] < lower[1] for upper, lower in zip(corners[:3], corners[:2:-1], strict=True))


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.9, 12, [1, 2, 5, 10]),
        (0.3, 0.7, [0.5]),
        (0.02, 30, [0.1, 1, 10]),
        (1, 10.0**8, [1, 100, 1e4, 1e6, 1e8]),
    ],
)
def test_marks_of_a_sweep(low: float, high: float, marks: list[float]) -> None:
    assert marks_between(low, high) == pytest.approx(marks)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0.3, 20, [1, 10]), (1, 100, [1, 10, 100]), (0.01, 1e6, [0.01, 1, 100, 1e4, 1e6])],
)
def test_decades(low: float, high: float, marks: list[float]) -> None:
    assert decades(low, high) == pytest.approx(marks)


def test_what_is_not_separable_says_so() -> None:
    document = make_document()
    for times in document["stages"]:
        whole = {"unattributed_us": times["sum_us"], "coverage": 0.0, "method": "not separable", "note": "as it is"}
        times.update(rows=[], modules=[], turn_sum_ratios=[], **whole)
    page = Page(render_profile(document))
    check_numbers(page)
    assert "not separable: as it is" in page.text


def test_a_name_that_a_table_may_cut_shows_whole_under_the_pointer() -> None:
    document = make_document()
    long = "torch.ops.aten._scaled_dot_product_<flash>_attention"
    document["stages"][0]["nodes"][1]["kind"] = long
    document["stages"][0]["nodes"][2]["kind"] = "short"
    page = render_profile(document)
    assert f'title="{html.escape(long)}"' in page
    assert 'title="short"' not in page
