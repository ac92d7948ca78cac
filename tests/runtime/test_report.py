"""Reports: what a reader sees is what the JSON in the page says, and the file needs nothing but itself."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_profile import make_document
from shown_page import Page, check_numbers

from ultramem.runtime.report import (
    DemoRun,
    TrainingRun,
    read_training_run,
    render_demo,
    render_profile,
    render_training,
    write_report,
)
from ultramem.runtime.report.charts import binned, ticks


def make_run(model: str = "ultramem-tiny", seed: int = 0, bits: float = 1.9876) -> DemoRun:
    metrics: list[dict[str, Any]] = []
    for step in range(1, 801):
        metrics.append({"step": step, "loss": bits + 3 * math.exp(-step / 50), "lr": 1e-3})
        if step % 200 == 0:
            metrics.append({"step": step, "eval_loss": bits * math.log(2), "bits_per_byte": bits})
    return DemoRun(
        model=model,
        parameters=3_971_904,
        flops_per_token=4_301_234,
        steps=800,
        seconds=512.3,
        seed=seed,
        bits_per_byte={"held-out": bits, "out-of-domain": bits + 0.5},
        metrics=metrics,
        prompt="It is a <truth>",
        sample=" universally & so on</script>",
    )


def make_training_run(name: str = "ultramem-tiny", *, memories: int = 2, bits: float = 1.9876) -> TrainingRun:
    steps = range(1, 401)
    reports = range(50, 401, 50)
    return TrainingRun(
        name=name,
        parameters=3_971_904,
        flops_per_token=4_301_234,
        step=400,
        steps=800,
        seed=3,
        seconds=512.3,
        training={
            "loss": [(step, bits + 3 * math.exp(-step / 50)) for step in steps],
            "grad_norm": [(step, 1.5 if step % 97 else 80.0) for step in steps],
            "lr": [(step, 1e-3 * step / 400) for step in steps],
            "value_lr": [(step, 1e-2 * step / 400) for step in steps],
            "tokens_per_second": [(step, 4321.0) for step in steps],
            "mfu": [(step, 0.4321) for step in steps],
        },
        evaluations=[
            {"step": step, "split": split, "eval_loss": bits * math.log(2), "bits_per_byte": bits}
            for step in (200, 400)
            for split in ("held_out_sample", "held_out")
        ],
        tables={
            f"memories.{index}.table": [
                {
                    "step": step, "rows": 9216, "reads": 123_456, "used_lately": 0.4, "used_ever": 1 - 40 / step,
                    "dead_rows": round(9216 * 40 / step), "kl_from_uniform_nats": 1.234 if step > 50 else None,
                }
                for step in reports
            ]
            for index in range(memories)
        },
        layers={
            f"memories.{index}": [
                {
                    "step": step, "score_mean": 1.05, "score_variance": 0.31, "output_rms": 0.35,
                    "singular_values": [[1.9, 0.2], [2.1, 0.1]],
                }
                for step in reports
            ]
            for index in range(memories)
        },
    )  # fmt: skip


def test_training_page_shows_the_numbers_of_its_json() -> None:
    runs = [make_training_run(), make_training_run("dense-tiny", memories=0, bits=2.0123)]
    page = Page(render_training(runs))
    check_numbers(page)
    pointers = {pointer for pointer, _ in page.shown}
    assert {"/runs/0/evaluations/3/bits_per_byte", "/runs/1/evaluations/3/eval_loss", "/runs/0/step"} <= pointers
    assert "/runs/0/tables/memories.1.table/7/dead_rows" in pointers
    assert "/runs/0/layers/memories.0/7/output_rms" in pointers
    assert "ultramem-tiny is at 1.988 bits per byte on held-out text after 400 steps, dense-tiny at 2.012" in page.text
    assert "at least 90 % of each table's rows were used, 1,844 never" in page.text.replace("\u00a0", " ")


def test_every_figure_of_the_memory_has_its_plot() -> None:
    page = Page(render_training([make_training_run()]))
    plots = [str(attributes["aria-label"]) for tag, attributes in page.tags if attributes.get("class") == "plot"]
    for name in (
        "Rows used since the start", "Rows used since the report before", "Rows never used",
        "Unevenness of use: KL from uniform", "Mean of the kept scores", "Variance of the kept scores",
        "Size of the layer's output", "Singular values of the cores, memories.0",
        "Singular values of the cores, memories.1",
    ):  # fmt: skip
        assert name in plots


def test_runs_of_one_name_are_told_apart() -> None:
    page = Page(render_training([make_training_run(), make_training_run()]))
    assert "ultramem-tiny (1)" in page.text
    assert "ultramem-tiny (2)" in page.text
    with pytest.raises(ValueError, match="at least one run"):
        render_training([])


def test_a_run_that_goes_on_is_shown(small_model: Any, small_train: Any, text: str, tmp_path: Path) -> None:
    from ultramem.runtime.data import load_corpus
    from ultramem.runtime.train import train

    out = tmp_path / "mine"
    train(small_model, small_train, load_corpus(text), out)
    whole = read_training_run(out)
    assert (whole.name, whole.step, whole.steps) == ("mine", 6, 6)
    assert [row["step"] for row in whole.tables["memories.0.table"]] == [3, 6]
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:7])  # as a reader may find it
    assert read_training_run(out).step == 2
    check_numbers(Page(render_training([read_training_run(out)])))
    (out / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="no training step"):
        read_training_run(out)


def test_demo_page_shows_the_numbers_of_its_json() -> None:
    runs = [make_run(), make_run("dense-tiny", bits=2.0123), make_run("dense-tiny", seed=1, bits=2.0234)]
    page = Page(render_demo(runs, [make_document(), make_document()], about="Same text, same FLOPs."))
    document = json.loads(page.data)
    check_numbers(page)
    assert [run["bits_per_byte"]["held-out"] for run in document["runs"]] == [1.9876, 2.0123, 2.0234]
    pointers = {pointer for pointer, _ in page.shown}
    assert {"/runs/0/bits_per_byte/held-out", "/runs/2/bits_per_byte/out-of-domain", "/runs/1/seed"} <= pointers
    assert "/profiles/1/latency/0/p50_us" in pointers
    assert "ultramem-tiny reaches 1.988 bits per byte on held-out text, dense-tiny 2.018" in page.text


@pytest.mark.parametrize(
    "render",
    [
        lambda: render_profile(make_document()),
        lambda: render_demo([make_run()], []),
        lambda: render_training([make_training_run()]),
    ],
)
def test_the_file_is_self_contained(render: Any) -> None:
    document = render()
    page = Page(document)
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "onclick"} & attributes.keys(), (tag, attributes)
        assert tag not in ("link", "img", "iframe")
        assert tag != "script" or attributes.get("type") == "application/json"
    assert not re.search(r"https?://|@import|url\(", document)


def test_text_is_escaped() -> None:
    profile_page = Page(render_profile(make_document()))
    assert "a<b>&c" in profile_page.text
    demo_page = Page(render_demo([make_run()], []))
    assert "It is a <truth> universally & so on</script>" in demo_page.text.replace("\n", "")
    assert json.loads(demo_page.data)["runs"][0]["sample"] == " universally & so on</script>"


@pytest.mark.parametrize(
    "render",
    [
        lambda: render_demo([make_run()], []),
        lambda: render_training([make_training_run()]),
        lambda: render_profile(make_document()),
    ],
)
def test_plots_stay_inside_their_boxes(render: Any) -> None:
    document = render()
    for points in re.findall(r'points="([^"]+)"', document):
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        assert all(0 <= x <= 100 and y <= 100 for x, y in places)
    for x, y in re.findall(r'class="dot" style="left:([\d.-]+)%;top:([\d.-]+)%', document):
        assert 0 <= float(x) <= 100
        assert 0 <= float(y) <= 100


def test_long_curves_are_thinned_to_means() -> None:
    points = binned([(step, 2.0 * step) for step in range(1, 1001)])
    assert len(points) == 250
    assert points[0] == (2.5, 5.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.37), (0, 162), (1.2, 1.45), (0, 7.5), (0, 2e-3)])
def test_ticks_are_round_and_in_range(low: float, high: float) -> None:
    marks = ticks(high, low)
    assert 3 <= len(marks) <= 6
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    assert all(len(f"{mark:g}") <= 6 for mark in marks)


def test_a_foreign_document_is_refused() -> None:
    document = copy.deepcopy(make_document())
    document["format_version"] = 1
    with pytest.raises(ValueError, match="format_version 5, got 1"):
        render_profile(document)
    with pytest.raises(ValueError, match="at least one run"):
        render_demo([], [])


def test_write_report_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, "a µs")
    assert path.read_text(encoding="utf-8") == "a µs"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
