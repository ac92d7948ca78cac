"""The paper's figures: arithmetic by hand, the small models' budgets, measurements on tiny ones, pages, bad input."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import math
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ultramem
from ultramem.cli import main
from ultramem.counts import count
from ultramem.figure_cli import DEVICES as CLI_DEVICES
from ultramem.figure_cli import FIGURES as CLI_FIGURES
from ultramem.machine import Machine
from ultramem.presets import preset
from ultramem.runtime.figures import (
    DEVICE_NAMES,
    DEVICES,
    FIGURES,
    check_document,
    decode_costs,
    expected_distinct,
    make_figure,
    render_figure,
    roofline_us,
    to_json,
)
from ultramem.runtime.figures.agreement import WrongResultError, is_near, require_logits, require_moe
from ultramem.runtime.figures.by_arithmetic import figure_claims, figure_points
from ultramem.runtime.figures.cases import Case, Rates, Timed, summarize
from ultramem.runtime.figures.devices import Roofs
from ultramem.runtime.figures.expected import resident_bytes, sparse_bytes
from ultramem.runtime.figures.grown_table import make_buffer, memory_config, memory_layer, moe_layer, num_experts
from ultramem.runtime.figures.log_chart import LogCurve, log_chart, log_ticks
from ultramem.runtime.figures.measured_batch import batch_checks, batch_points
from ultramem.runtime.figures.measured_table import Sweep, table_checks, table_points
from ultramem.runtime.figures.paper import PaperModel, paper_models, sparser
from ultramem.runtime.figures.rates import (
    cycle,
    expert_product_rate,
    measured_roofs,
    product_rate,
    product_rates,
    read_rate,
    read_rates,
)
from ultramem.runtime.figures.schema import Measured, MeasuredPoint, ProductRate, ReadRate
from ultramem.runtime.figures.small_models import SMALL, tiny_twin
from ultramem.runtime.figures.watched import Watched
from ultramem.runtime.profile.arithmetic import StageCost
from ultramem.runtime.profile.measure import Cell

H100 = DEVICES["h100"]
ROOFS = Roofs(
    name="this", label="a processor", bytes_per_second=1e10, flops_per_second=1e11, memory_bytes=None, element_bytes=4,
    source="made up",
)  # fmt: skip
MACHINE = Machine(
    device="a processor",
    cores=2,
    threads=1,
    last_level_cache_bytes=2**25,
    read_bytes_per_second=1e10,
    copy_bytes_per_second=8e9,
    gemm_flops_per_second=1e11,
    system="Linux",
    python="3.12",
    versions={"torch": "2.13"},
    cpu_flags="AVX2",
)
RATES = Rates(
    roofs=ROOFS,
    reads=(ReadRate(array_bytes=2**20, bytes_per_second=1e11), ReadRate(array_bytes=2**28, bytes_per_second=1e10)),
    products=(ProductRate(rows=1, flops_per_second=1e10), ProductRate(rows=1024, flops_per_second=1e11)),
)
CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs/figures"


def step_bytes(name: str, batch: int, cached: int = 0) -> int:
    return sum(
        cost.total_bytes for cost in decode_costs(preset(name), batch=batch, cached_tokens=cached, element_bytes=2)
    )


@pytest.mark.parametrize(("draws", "among", "at_once"), [(1, 5, 2), (2, 4, 2), (3, 4, 1), (2, 3, 3), (4, 3, 1)])
def test_expected_distinct_is_the_mean_over_every_outcome(draws, among, at_once):
    choices = list(itertools.combinations(range(among), at_once))
    outcomes = [len(set(itertools.chain(*picked))) for picked in itertools.product(choices, repeat=draws)]
    assert expected_distinct(draws, among, at_once=at_once) == pytest.approx(sum(outcomes) / len(outcomes))


def test_expected_distinct_of_nothing_and_of_too_many():
    assert expected_distinct(0, 7) == expected_distinct(0, 2, at_once=2) == 0
    with pytest.raises(ValueError, match=r"at_once must be in 1\.\.2 .* got at_once 3"):
        expected_distinct(1, 2, at_once=3)


def test_a_dense_step_reads_every_weight_and_the_whole_cache_once():
    config = preset("dense-1.6b")
    costs = decode_costs(config, batch=3, cached_tokens=2048, element_bytes=2)
    # The embedding is read by row; the head is a weight.
    assert sum(cost.weight_bytes for cost in costs) == 2 * (count(config).total + 50432 * 2048)
    assert sum(cost.cache_bytes for cost in costs) == 2 * 2 * 3 * 2049 * 2048 * 32
    assert {cost.row_bytes for cost in costs if cost.stage == "other"} == {round(expected_distinct(3, 50432) * 4096)}


def test_moe_reads_two_experts_a_token_and_all_of_them_in_the_end():
    """Section 4.1 of the paper: min(2B, experts) * 2 * d * inner a layer, here the expected number of experts."""
    config = preset("moe-1.6b-2in34")
    expert = 2 * 2048 * 4672 * 2

    def experts(batch):
        costs = decode_costs(config, batch=batch, cached_tokens=0, element_bytes=2)
        return sparse_bytes(costs, config, element_bytes=2) / (32 * expert)

    assert experts(1) == pytest.approx(2)
    assert experts(2) == pytest.approx(34 * (1 - (32 / 34) ** 2))
    assert experts(64) == pytest.approx(34 * (1 - (32 / 34) ** 64))
    assert experts(131072) == pytest.approx(34)
    grown = [step_bytes("moe-1.6b-2in34", 2**power) for power in range(8)]
    assert all(later > 1.2 * before for before, later in itertools.pairwise(grown[:4]))
    assert grown[7] < 1.05 * grown[6]


def test_ultramem_stays_near_dense_up_to_batch_64():
    rows = 64 * 84
    (lookup,) = (
        cost
        for cost in decode_costs(preset("ultramem-1.6b-x12"), batch=64, cached_tokens=0, element_bytes=2)
        if cost.stage == "lookup"
    )
    # 6 layers, 1792^2 rows of 1024 numbers: hardly any row is read twice.
    assert 0.998 * rows < lookup.row_bytes / (6 * 1024 * 2) < rows
    for batch in (1, 64):
        dense, ultramem = (step_bytes(name, batch) for name in ("dense-1.6b", "ultramem-1.6b-x12"))
        assert dense < ultramem < 1.15 * dense
    assert step_bytes("moe-1.6b-2in34", 64) > 10 * step_bytes("ultramem-1.6b-x12", 64)


def test_rows_of_pkm_and_the_used_instead_of_the_expected():
    config = preset("pkm-151m-x12")
    (lookup,) = (
        cost
        for cost in decode_costs(config, batch=4, cached_tokens=0, element_bytes=2, used=100.0)
        if cost.stage == "lookup"
    )
    assert lookup.row_bytes == 100 * 1024 * 2
    moe = preset("moe-151m-2in32")
    costs = decode_costs(moe, batch=4, cached_tokens=0, element_bytes=2, used=3.0)
    assert sparse_bytes(costs, moe, element_bytes=2) == 12 * 3 * 2 * 1024 * 2528 * 2
    assert sparse_bytes(decode_costs(preset("dense-151m"), batch=1, cached_tokens=0, element_bytes=2),
                        preset("dense-151m"), element_bytes=2) == 0  # fmt: skip


def test_roofline_takes_the_slower_of_moving_and_computing_stage_by_stage():
    costs = (StageCost("mlp", 5 * 10**11, 10**10, 0, 0, 0), StageCost("head", 10**10, 10**10, 0, 10**10, 0))
    assert roofline_us(costs, ROOFS) == pytest.approx(5e6 + 2e6)


def test_what_must_lie_in_memory():
    config = preset("moe-1.6b-2in34")
    assert resident_bytes(config, batch=0, cached_tokens=0, element_bytes=2) == 2 * count(config).total_with_embeddings
    added = resident_bytes(config, batch=512, cached_tokens=2047, element_bytes=2) - resident_bytes(
        config, batch=0, cached_tokens=0, element_bytes=2
    )
    assert added == 512 * 2048 * 2 * 2048 * 32 * 2  # 275 GB, more than any of the devices holds


@pytest.mark.parametrize("ratio", [1.5, 12.0, 96.0])
def test_figure_6_grows_sparse_parameters_and_nothing_that_a_token_computes(ratio):
    dense = count(preset("dense-1.6b")).total
    for model in paper_models(("1.6b",)):
        if model.family not in ("moe", "ultramem"):
            continue
        grown = count(sparser(model, ratio).config)
        assert grown.sparse / dense == pytest.approx(ratio, rel=0.05)
        if model.family == "moe":  # the router alone grows
            assert grown.flops_per_token == pytest.approx(count(model.config).flops_per_token, rel=0.01)
        else:  # keys grow with the root of the rows
            keys = 6 * 2 * 2 * 2 * 448 * 2 * (math.isqrt(round(ratio * dense / 6 / 1024)) - 1792) * 2
            assert grown.flops_per_token - count(model.config).flops_per_token == pytest.approx(keys, abs=5e5)
    with pytest.raises(ValueError, match=r"must have experts or a memory to be made sparser, got 'dense-1\.6b'"):
        sparser(PaperModel("dense", "1.6b", "dense-1.6b", preset("dense-1.6b")), 12)


def test_figure_7_finds_the_papers_batch_at_which_memory_access_aligns():
    """131,072 tokens touch N (1 - (1 - 1/N)^(84 T)) of 1792^2 rows in 6 layers; MoE has read all experts by then."""
    points = figure_points(7, H100)
    n = 1792**2
    rows = {batch: 6 * n * -math.expm1(84 * batch * math.log1p(-1 / n)) * 1024 for batch in (65536, 131072)}
    experts = 32 * 34 * 2 * 2048 * 4672
    assert rows[65536] < 0.9 * experts < rows[131072]
    (claim,) = (claim for claim in figure_claims(7, points) if "aligns" in claim.paper)
    assert claim.value == 131072
    assert claim.agrees


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_claims_and_points_of_every_device(figure, device):
    points = figure_points(figure, DEVICES[device])
    for point in points:
        parts = point.weight_bytes + point.row_bytes + point.cache_bytes + point.activation_bytes
        assert point.total_bytes == parts
        assert point.sparse_bytes <= point.total_bytes
        roofs = DEVICES[device]
        least = max(point.total_bytes / roofs.bytes_per_second, point.flops / roofs.flops_per_second)
        both = point.total_bytes / roofs.bytes_per_second + point.flops / roofs.flops_per_second
        assert 0.999e6 * least <= point.roofline_us <= 1.001e6 * both
    for claim in figure_claims(figure, points):
        within = (
            claim.value is not None and claim.low <= claim.value and (claim.high is None or claim.value <= claim.high)
        )
        assert claim.agrees is within


def test_small_families_have_equal_flops_and_the_sparse_ones_equal_parameters():
    counts = {family: count(config) for family, config in SMALL.items()}
    assert set(counts) == {"dense", "moe", "pkm", "ultramem"}
    flops = [each.flops_per_token for each in counts.values()]
    assert max(flops) < 1.02 * min(flops)
    sparse = [each.total for family, each in counts.items() if family != "dense"]
    assert max(sparse) < 1.02 * min(sparse)


def test_rates_lie_on_lines_between_what_was_measured():
    assert read_rate(RATES.reads, 2**24) == pytest.approx((1e11 + 1e10) / 2)
    assert read_rate(RATES.reads, 1) == 1e11
    assert read_rate(RATES.reads, 2**40) == 1e10
    assert product_rate(RATES.products, 32) == pytest.approx((1e10 + 1e11) / 2)
    assert [rate.array_bytes for rate in read_rates(CPU, (4096, 8192))] == [4096, 8192]
    assert all(rate.flops_per_second > 0 for rate in product_rates(CPU, (1, 2)))
    roofs = measured_roofs(MACHINE, CPU)
    assert (roofs.name, roofs.label, roofs.element_bytes) == ("this", "a processor", 4)
    assert min(roofs.bytes_per_second, roofs.flops_per_second) > 1e8


def test_experts_multiply_as_many_rows_as_tokens_choose_them():
    """Three tokens, of which each chooses an expert by a toss: one row with 3/8, two with 3/8, three with 1/8."""
    rates = tuple(ProductRate(rows=rows, flops_per_second=rate) for rows, rate in ((1, 1e10), (2, 4e10), (3, 2e10)))
    flops = 3 / 8 * 1 + 3 / 8 * 2 + 1 / 8 * 3
    seconds = 3 / 8 * 1 / 1e10 + 3 / 8 * 2 / 4e10 + 1 / 8 * 3 / 2e10
    assert expert_product_rate(rates, 3, 0.5) == pytest.approx(flops / seconds)
    assert expert_product_rate(rates, 3, 1.0) == 2e10
    # Many tokens of an expert: hardly any difference to their mean.
    assert expert_product_rate(RATES.products, 4096, 0.01) == pytest.approx(product_rate(RATES.products, 41), rel=0.02)


def test_a_cycle_starts_again():
    call = cycle([lambda: "a", lambda: "b", lambda: "c"])
    assert "".join(call() for _ in range(7)) == "abcabca"


def case_of(**fields: Any) -> Case:
    cost = StageCost("lookup", 0, 0, 10**6, 0, 10**6)
    given = {
        "series": "lookup", "engine": "eager", "x": 2**20, "batch": 4, "costs": (cost,), "used_costs": (cost,),
        "call": lambda: None, **fields,
    }  # fmt: skip
    return Case(**given)


def cell_of(*us: float, busy: float = math.inf) -> Timed:
    """A call that took `us` in as many rounds, `busy` of it with the processor."""
    cell = Cell("eager", 4, "decode", lambda: None)
    cell.round_us = [[each] for each in us]
    return Timed(cell, Watched(lambda: None, [busy]))


def test_a_time_near_the_roofline_needs_no_reason():
    point = summarize(case_of(), cell_of(200.0, 220.0, 240.0), None, None, RATES)  # 2 MB at 10 GB/s
    assert point.roofline_us == pytest.approx(200)
    assert (point.p50_us, point.round_p50_low_us, point.round_p50_high_us) == (220.0, 200.0, 240.0)
    assert point.ratio == pytest.approx(1.1)
    assert point.reason == ""


def test_reasons_name_the_parts_that_were_measured():
    own, twin, rows = cell_of(1000.0), cell_of(300.0), cell_of(600.0)
    point = summarize(case_of(), own, twin, rows, RATES)
    assert (point.overhead_us, point.rows_us) == (300.0, 600.0)
    assert point.explained_us == pytest.approx(300 + 600 + point.dense_us)
    assert "the same call takes 300 µs on a model of tiny widths" in point.reason
    assert "rows at random places take 600 µs" in point.reason
    assert "in a row would take 100 µs" in point.reason
    assert "not explained" not in point.reason


def test_time_of_other_processes_is_a_part_of_its_own():
    own, twin, rows = cell_of(900.0, busy=400.0), cell_of(700.0, busy=150.0), cell_of(500.0, busy=230.0)
    point = summarize(case_of(), own, twin, rows, RATES)
    assert (point.waiting_us, point.overhead_us, point.rows_us) == (500.0, 150.0, 230.0)
    assert "other processes had the processor for 500 µs" in point.reason
    watched = Watched(lambda: sum(range(20000)))
    watched()
    assert watched.cpu_us[0] > 0


def test_what_the_parts_do_not_explain_is_said():
    point = summarize(case_of(), cell_of(5000.0), cell_of(300.0), cell_of(100.0), RATES)
    assert point.reason.startswith("not explained")
    quick = summarize(case_of(), cell_of(50.0), None, cell_of(20.0), RATES)
    assert quick.ratio == pytest.approx(0.25)
    assert "rows at random places take 20.0 µs" in quick.reason


def test_is_near_refuses_wrong_numbers_and_nan():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert is_near(exact.float(), exact.float(), exact)
    assert not is_near(exact.float() + 1e-3, exact.float(), exact)
    assert not is_near(torch.tensor([1.0, torch.nan]), exact.float(), exact)


def test_an_engine_with_wrong_logits_is_not_timed():
    model = ultramem.build_model(tiny_twin(SMALL["ultramem"])).eval()

    class Wrong:
        name = "wrong"

        def prefill(self, tokens, mask=None):
            output = model(tokens)
            return output.logits, output.cache

        def decode(self, tokens, cache, mask=None):
            output = model(tokens, cache=cache)
            return output.logits + 1e-3, output.cache

    with pytest.raises(WrongResultError, match="tiny: differs from float64"):
        require_logits("tiny", model, Wrong(), 4)


def test_layers_on_one_buffer_have_equal_parameters_and_share_them():
    buffer = make_buffer(2**14 * 64, CPU)
    layer, moe = memory_layer(memory_config(2**14), buffer), moe_layer(2**14, buffer)
    assert num_experts(2**14) == 2
    assert layer.table.values_NV.numel() == moe.up_EDI.numel() + moe.down_EID.numel() == buffer.numel()
    assert layer.table.values_NV.data_ptr() == moe.up_EDI.data_ptr() == buffer.data_ptr()
    require_moe("a MoE layer", moe, torch.randn(3, 1, 512))
    with torch.no_grad():
        moe.router.weight.mul_(torch.nan)
    with pytest.raises(WrongResultError, match="a MoE layer"):
        require_moe("a MoE layer", moe, torch.randn(3, 1, 512))
    with pytest.raises(ValueError, match="rows must be a square, got 12"):
        memory_config(12)


@pytest.fixture(scope="module")
def measured_batches() -> list[MeasuredPoint]:
    models = {family: tiny_twin(config) for family, config in SMALL.items()}
    return batch_points(1, RATES, CPU, models=models, batches=(1, 16), seconds_per_cell=0.01)


def test_a_sweep_over_batches_measures_every_family(measured_batches):
    assert [(point.series, point.batch) for point in measured_batches] == [
        (family, batch) for batch in (1, 16) for family in SMALL
    ]
    for point in measured_batches:
        assert point.samples >= 5
        assert point.p25_us <= point.p50_us <= point.p75_us
        assert point.ratio == pytest.approx(point.p50_us / point.roofline_us)
        assert point.explained_us == pytest.approx(
            point.overhead_us + point.rows_us + point.dense_us + point.waiting_us
        )
    used = {(point.series, point.batch): point for point in measured_batches}
    assert used["moe", 1].used == 2  # of 31 experts
    assert 10 < used["moe", 16].used <= 31
    assert 16 <= used["ultramem", 1].used <= 32  # slots, two heads of 16
    assert used["dense", 16].used == used["dense", 16].rows_us == 0
    check, explained = batch_checks(measured_batches)
    assert explained.value == check.value
    assert explained.predicted == pytest.approx(
        used["moe", 16].explained_busy_us / used["ultramem", 16].explained_busy_us
    )
    assert check.value == pytest.approx(used["moe", 16].busy_us / used["ultramem", 16].busy_us)
    assert check.predicted == pytest.approx(used["moe", 16].roofline_us / used["ultramem", 16].roofline_us)
    assert check.met is (check.low <= check.value <= check.high)


SWEEP = Sweep(
    rows=(2**14, 2**16), lookup_rows=(2**14, 3 * 2**13), wide_rows=(2**10,), lookup_tokens=3, layer_tokens=(2,),
    engines=("eager",), step_batches=(1,),
)  # fmt: skip


@pytest.fixture(scope="module")
def measured_tables() -> list[MeasuredPoint]:
    return table_points(RATES, CPU, sweep=SWEEP, seconds_per_cell=0.01)


def test_a_sweep_over_tables_measures_lookups_layers_and_steps(measured_tables):
    assert [(point.series, point.x) for point in measured_tables] == [
        ("lookup", 2**14), ("lookup", 3 * 2**13), ("lookup", 2**10),
        ("memory layer", 2**14), ("MoE layer", 2**14), ("memory layer", 2**16), ("MoE layer", 2**16),
        ("decode step", 2**14), ("decode step", 2**16),
    ]  # fmt: skip
    lookup = measured_tables[0]
    # 3 tokens of 32 slots: rows of 64 floats, an index and two scores a slot, four blocks a token.
    assert lookup.total_bytes == round(expected_distinct(96, 2**14) * 256) + 3 * (32 * 16 + 4 * 256)
    assert 0.9 * 96 < lookup.used <= 96
    small, large = (point for point in measured_tables if point.series == "MoE layer")
    assert (small.experts, large.experts) == (2, 8)
    assert small.used == 2 < large.used <= 4
    small, large = (point for point in measured_tables if point.series == "memory layer")
    keys = 2 * 2 * 2 * 64 * 2 * (256 - 128) * 4
    scores = 2 * 2 * 2 * 2 * 2 * (256 - 128) * 4 * 2  # of two tokens, written and read
    assert large.total_bytes - small.total_bytes == pytest.approx(keys + scores, rel=0.01)
    (check,) = table_checks(measured_tables, SWEEP)
    assert check.name == "decode step's time at 65,536 rows over that at 16,384, batch 1"


def test_the_lookup_is_flat_where_its_time_grows_by_less_than_a_third():
    wide = dataclasses.asdict(summarize(case_of(row_bytes=1024), cell_of(100.0), None, None, RATES))
    first, last = (MeasuredPoint(**{**wide, "x": x, "p50_us": us}) for x, us in ((2**17, 100.0), (2**22, 129.0)))
    (check,) = table_checks([first, last])
    assert check.met
    assert check.value == pytest.approx(1.29)
    slower = dataclasses.replace(last, p50_us=131.0)
    (check,) = table_checks([first, slower])
    assert not check.met
    (check,) = table_checks([first, dataclasses.replace(slower, waiting_us=2.0)])  # that others took
    assert check.met


@pytest.mark.parametrize(("low", "high", "marks"), [
    (1, 1000, [1, 10, 100, 1000]), (3, 40, [5, 10, 20]), (1, 10**8, [1, 10**2, 10**4, 10**6, 10**8]), (6, 7, [6, 7]),
    (6.1, 6.9, [6.1]),
])  # fmt: skip
def test_log_ticks(low, high, marks):
    assert log_ticks(low, high, most=6) == pytest.approx(marks)


def test_a_chart_takes_positive_points_only():
    text = partial(str)
    with pytest.raises(ValueError, match="all of them positive"):
        log_chart(
            [LogCurve(label="a", points=[(1, 0.0)], color="red")],
            x_marks=[1], x_text=text, y_text=text, x_title="x", y_title="y", summary="s",
        )  # fmt: skip
    chart = log_chart(
        [LogCurve(label="a<b", points=[(1, 10.0), (100, 1000.0)], color="red", has_dots=True)],
        x_marks=[1, 10, 100], x_text=text, y_text=text, x_title="x", y_title="y", summary="s",
    )  # fmt: skip
    assert 'style="left:50.00%">10<' in chart
    assert "a&lt;b, 100: 1000.0" in chart


class Shown(html.parser.HTMLParser):
    """Texts of elements that point into the JSON or carry a value, and everything that the page asks for."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.attributes: dict[str, str | None] = {}
        self.pointed: list[tuple[str, str]] = []
        self.valued: list[tuple[str, str]] = []
        self.data = ""
        self.links: list[str] = []
        self.tag = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tag, self.attributes = tag, dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.attributes = {}

    def handle_data(self, text):
        if self.tag == "script":
            self.data += text
        if self.attributes.get("data-path"):
            self.pointed.append((self.attributes["data-path"], text))
        if self.attributes.get("data-value"):
            self.valued.append((self.attributes["data-value"], text))


UNITS = {"µs": 1, "ms": 1e3, "s": 1e6, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "": 1}


def value_of(text: str) -> float:
    number, _, unit = text.partition(" ")
    prefix = unit.removesuffix("FLOP").removesuffix("B") if unit not in ("µs", "ms", "s") else unit
    return float(number.replace(",", "")) * UNITS[prefix.strip()]


def check_page(document: dict[str, Any]) -> None:
    """Every number that points into the JSON is what stands there, to three digits; nothing is fetched."""
    shown = Shown(render_figure(document))
    assert json.loads(shown.data) == document
    assert shown.links == []
    assert len(shown.pointed) > 20
    for pointer, text in shown.pointed:
        value = document
        for part in pointer.removeprefix("/").split("/"):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert value_of(text) == pytest.approx(value, rel=0.006), pointer
    for value, text in shown.valued:
        assert float(value) == float(text)


@pytest.mark.parametrize("figure", FIGURES)
def test_pages_show_what_the_json_says(figure, measured_batches, measured_tables):
    made = make_figure(figure, "h100")
    assert made.measured is None
    check_page(to_json(made))
    points = measured_tables if figure == 6 else measured_batches
    checks = table_checks(points, SWEEP) if figure == 6 else batch_checks(points)
    measured = Measured(
        machine=MACHINE, cached_tokens=16, rounds=5, seconds_per_cell=0.01, load_average=0.5, conditions="a <test>",
        read_rates=RATES.reads, product_rates=RATES.products, points=tuple(points), checks=tuple(checks),
    )  # fmt: skip
    document = to_json(dataclasses.replace(made, device=ROOFS, measured=measured))
    assert check_document(json.loads(json.dumps(document))) == document
    check_page(document)
    assert "a &lt;test&gt;" in render_figure(document)


def test_other_documents_are_refused():
    with pytest.raises(ValueError, match="a figure must have kind 'ultramem-figure', got 'ultramem-profile'"):
        render_figure({"kind": "ultramem-profile"})
    with pytest.raises(ValueError, match="format_version 1, got 2"):
        check_document({"kind": "ultramem-figure", "format_version": 2})
    with pytest.raises(ValueError, match="figure must be one of 1, 6, 7, got 2"):
        make_figure(2, "h100")
    with pytest.raises(ValueError, match="device must be one of a100, h100, h200, this, got 'abacus'"):
        make_figure(1, "abacus")


def test_the_command_line_knows_every_figure_and_device():
    assert CLI_DEVICES == DEVICE_NAMES
    assert tuple(map(int, CLI_FIGURES)) == FIGURES


def test_the_command_writes_json_and_page(tmp_path, capsys):
    assert main(["profile", "--figure", "7", "--device", "h200", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "out" / "figure-7.json").read_text())
    assert printed["device"]["label"] == "H200 SXM"
    assert (tmp_path / "out" / "figure-7.html").read_text() == render_figure(printed)
    assert main(["profile", "--figure", "1", "--device", "h200", "--out", str(tmp_path / "out")]) == 0
    assert "UltraMem is up to 6 times faster than MoE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--out", "x"], "target must be a run folder or a preset where --figure 1, 6, 7 is not given"),
        (["--figure", "2", "--out", "x"], "argument --figure: invalid choice: '2' (choose from "),
        (
            ["--figure", "1", "--device", "abacus", "--out", "x"],
            "device must be one of a100, h100, h200, this with --figure",
        ),
        (["--figure", "1"], "the following arguments are required: --out"),
        (["dense-tiny", "--device", "h100", "--out", "x"], "device needs --figure 1, 6, 7, got 'h100'"),
        (["dense-tiny", "--figure", "1", "--out", "x"], "target must not be given with --figure, which takes --device"),
        (["--figure", "1", "--engine", "onnx", "--out", "x"], "engine must not be given with --figure"),
        (["--figure", "1", "--batch", "4", "--out", "x"], "batch must not be given with --figure"),
        (["--figure", "1", "--device", "h100", "--out", "FILE"], "exists and is not a folder"),
    ],
)
def test_wrong_combinations_are_one_line(words, line, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("taken")
    assert main(["profile", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (error,) = captured.err.splitlines()
    assert line in error
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_the_committed_page_is_what_the_committed_results_give():
    make_page = runpy.run_path(str(DOCS / "make_page.py"))
    documents = make_page["read"](DOCS)
    text = make_page["readme"](documents)
    assert (DOCS / "README.md").read_text() == text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCS / target).exists(), target
    for (device, figure), document in documents.items():
        assert document["figure"] == figure
        if device != "this":  # arithmetic comes out the same again
            again = json.loads(
                json.dumps([dataclasses.asdict(each) for each in figure_points(figure, DEVICES[device])])
            )
            assert document["arithmetic"] == again
