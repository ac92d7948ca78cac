"""Reports: what a reader sees is what the JSON in the page says, and the file needs nothing but itself."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ultramem.runtime.profile import STAGES
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

UNITS = {
    "µs": 1.0, "ms": 1e3, "s": 1e6, "%": 1e-2, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "FLOP": 1.0, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "k": 1e3, "M": 1e6, "G": 1e9, "": 1.0,
}  # fmt: skip
VOID = {"meta", "br", "line", "polyline"}


class Page(html.parser.HTMLParser):
    """Shown text by the JSON pointer or the value that its element carries; and a check that elements nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[tuple[str, str]] = []
        self.values: list[tuple[float, str]] = []
        self.text = ""
        self.data = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        tag, attributes = self.open[-1]
        if tag == "script":
            self.data += data
        elif tag != "style":
            self.text += data
            if attributes.get("data-path"):
                self.shown.append((str(attributes["data-path"]), data))
            if attributes.get("data-value"):
                self.values.append((float(str(attributes["data-value"])), data))


def at(document: Any, pointer: str) -> Any:
    for part in pointer.removeprefix("/").split("/"):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def agrees(text: str, value: float, *, seconds: bool) -> bool:
    """Whether a shown number is `value`, rounded to the digits that are shown."""
    match = re.fullmatch(r"(-?[\d,]*\.?\d+(?:e[+-]\d+)?)(?: (.*))?", text)
    assert match, text
    number, unit = match[1].replace(",", ""), match[2] or ""
    scale = 1.0 if seconds and unit == "s" else UNITS[unit]
    digits, _, power = number.partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    if "." not in number:  # "12,300" has three significant digits, "12" two
        step *= 10.0 ** max(0, len(number) - 3)
    return abs(float(number) * scale - value) <= 0.501 * step * scale


def check_numbers(page: Page) -> None:
    document = json.loads(page.data)
    for pointer, text in page.shown:
        if text == "–":  # noqa: RUF001  # "none"
            assert at(document, pointer) == 0, pointer
            continue
        value = at(document, pointer)
        assert agrees(text, value, seconds=pointer.endswith("seconds")), (pointer, text, value)
    for value, text in page.values:
        assert text == "–" or agrees(text, value, seconds=False), (value, text)  # noqa: RUF001  # "none"


def fused(stages: list[str], time_us: float) -> dict[str, Any]:
    return {"stages": stages, "time_us": time_us}


def make_document() -> dict[str, Any]:
    """A profile of two engines, one of them with fused stages, as a file holds it."""
    latency, stages, arithmetic = [], [], []
    for batch in (1, 8):
        for phase in ("prefill", "decode"):
            for place, engine in enumerate(("eager", "compile")):
                p50_us = 1234.56 * batch / (1 + place) * (9 if phase == "prefill" else 1)
                latency.append(
                    {
                        "engine": engine, "batch": batch, "phase": phase,
                        "new_tokens": 128 if phase == "prefill" else 1,
                        "cached_tokens": 0 if phase == "prefill" else 128,
                        "samples": 57, "p50_us": p50_us, "p90_us": 1.11 * p50_us, "p99_us": 3.7 * p50_us,
                        "min_us": 0.9 * p50_us, "round_p50_low_us": 0.97 * p50_us, "round_p50_high_us": 1.06 * p50_us,
                        "tokens_per_second": batch / p50_us * 1e6, "bandwidth_share": 0.0876, "compute_share": 0.123,
                    }
                )  # fmt: skip
                rows = [fused([stage], 0.1 * p50_us) for stage in STAGES]
                if engine == "compile":
                    rows = [*rows[3:], fused(["query", "score"], 0.2 * p50_us), fused(["score", "select"], 7.654)]
                explained_us = sum(row["time_us"] for row in rows)
                stages.append(
                    {
                        "engine": engine, "batch": batch, "phase": phase, "method": "timers", "note": "",
                        "wall_us": 1.2 * p50_us, "rows": rows, "unattributed_us": 1.2 * p50_us - explained_us,
                        "coverage": explained_us / (1.2 * p50_us),
                    }
                )  # fmt: skip
            for place, stage in enumerate(STAGES):
                cost = {
                    "flops": 1_234_567 * place, "weight_bytes": 98_765 * place, "row_bytes": 4_096 if place == 3 else 0,
                    "cache_bytes": 0, "activation_bytes": 54_321 * batch,
                }  # fmt: skip
                total_bytes = sum(value for name, value in cost.items() if name != "flops")
                arithmetic.append(
                    {
                        "batch": batch, "phase": phase, "stage": stage, **cost, "total_bytes": total_bytes,
                        "roofline_us": total_bytes / 2e4,
                    }
                )  # fmt: skip
    return {
        "kind": "ultramem-profile",
        "format_version": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "model": {
            "name": "a<b>&c", "parameters": 3_971_904, "flops_per_token": 4_300_000, "weight_bytes": 15_887_616,
            "dtype": "float32", "config": {},
        },
        "machine": {
            "device": "A Processor", "cores": 2, "threads": 2, "last_level_cache_bytes": 33_554_432,
            "read_bytes_per_second": 2e10, "copy_bytes_per_second": 1.876e10, "bytes_per_second": 2e10,
            "gemm_flops_per_second": 6.7e10, "system": "Linux x86_64", "python": "3.12.1",
            "versions": {"torch": "2.13.0"}, "cpu_flags": "AVX2",
        },
        "settings": {
            "batches": [1, 8], "prompt_tokens": 128, "seconds_per_cell": 1.0, "max_samples": 200, "rounds": 5,
            "seed": 0,
        },
        "engines": [
            {"name": "eager", "prepare_seconds": 0.12, "max_abs_difference": 0.0, "tolerance": 1.3e-5},
            {"name": "compile", "prepare_seconds": 61.7, "max_abs_difference": 3.8e-06, "tolerance": 1.3e-5},
        ],
        "latency": latency,
        "stages": stages,
        "arithmetic": arithmetic,
    }  # fmt: skip


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
        assert f"/stages/{index}/coverage" in pointers
        assert all(f"/stages/{index}/rows/{place}/time_us" in pointers for place in range(len(times["rows"])))
    for index in range(len(document["arithmetic"])):
        assert f"/arithmetic/{index}/total_bytes" in pointers


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


def test_what_is_not_separable_says_so() -> None:
    document = make_document()
    for times in document["stages"]:
        times.update(rows=[], unattributed_us=times["wall_us"], coverage=0.0, method="not separable", note="as it is")
    page = Page(render_profile(document))
    check_numbers(page)
    assert "not separable: as it is" in page.text


@pytest.mark.parametrize(
    "render", [lambda: render_demo([make_run()], []), lambda: render_training([make_training_run()])]
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
    document["format_version"] = 2
    with pytest.raises(ValueError, match="format_version 1, got 2"):
        render_profile(document)
    with pytest.raises(ValueError, match="at least one run"):
        render_demo([], [])


def test_write_report_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, "a µs")
    assert path.read_text(encoding="utf-8") == "a µs"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
