"""Quantised tables compute what their integers stand for, and share all else with the model that they come from."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build

from ultramem import ops
from ultramem.graph.gathered_table import in_precision, rounded_to
from ultramem.graph.quantized_table import QuantizedValueTable, _numbers, quantize_tables
from ultramem.graph.value_table import ValueTable
from ultramem.optim import build_optimizers

PEER = replace(MEMORY, rank=1, num_cores=1, expert_dim=32, score_function="softmax")
WINDOWS = replace(MEMORY, expert_dim=8, expert_project=True, table="windows", table_layers=2)
FAMILIES = {
    "ultramem": CONFIG,
    "peer": replace(CONFIG, memory=PEER, insertions="1:1", replace_mlp=True),
    "ultramem-v2": replace(CONFIG, memory=WINDOWS, insertions="1:1/2:2"),
}
TOKENS = torch.arange(22).view(2, 11) % 64


def tables(model):
    return [each for each in model.modules() if isinstance(each, ValueTable | QuantizedValueTable)]


@torch.no_grad()
def with_values_of(model, quantized):
    """The unquantised model with the values that the integers stand for."""
    twin = rounded_to(model, torch.float32)
    twin.load_state_dict(model.state_dict())
    for table, source in zip(tables(twin), tables(quantized), strict=True):
        every = torch.arange(table.values_NV.shape[0])
        table.values_NV = torch.nn.Parameter(source.gather(every).float())
        if table.experts_NP is not None:
            table.experts_NP = torch.nn.Parameter(source.gather_experts(every).float())
    return twin


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_computes_what_the_integers_stand_for(family, bits):
    model = build(FAMILIES[family])
    quantized = quantize_tables(model, bits)
    expected = with_values_of(model, quantized)(TOKENS).logits
    exact = in_precision(quantized, torch.float64)(TOKENS).logits
    allowed = 4 * (expected - exact).abs().max().item()
    assert 0 < (quantized(TOKENS).logits - exact).abs().max().item() <= allowed < 1e-4
    assert (model(TOKENS).logits - exact).abs().max().item() > allowed  # rounding is seen


def test_only_tables_are_new():
    model = build(FAMILIES["ultramem-v2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize_tables(model, 8)
    shared = dict(quantized.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("table."):
            assert shared.pop(name) is parameter
    assert shared == {}
    assert {name for name, _ in quantized.named_buffers() if "table" in name} == {
        "table.rows_NB", "table.scales_N", "table.expert_rows_NB", "table.expert_scales_N",
    }  # fmt: skip
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.head.weight.zero_()
    assert not quantized.head.weight.any()


def test_int4_packs_two_columns_a_byte():
    (table,) = tables(quantize_tables(build(CONFIG), 4))
    assert (table.rows_NB.dtype, table.rows_NB.shape) == (torch.uint8, (64, 8))
    assert table.scales_N.dtype == torch.float32
    assert table.gather(torch.tensor([3])).shape == (1, 16)


@torch.no_grad()
def test_scales_stay_float32_in_a_narrow_model():
    half = rounded_to(quantize_tables(build(CONFIG), 8), torch.bfloat16)
    (table,) = tables(half)
    assert table.scales_N.dtype == torch.float32
    assert half.head.weight.dtype == torch.bfloat16
    assert half(TOKENS).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_the_oracle_is_the_model_in_a_wider_type():
    for config in FAMILIES.values():
        model = build(config)
        exact = in_precision(model, torch.float64)
        expected = build(config).double()(TOKENS).logits
        torch.testing.assert_close(exact(TOKENS).logits, expected, rtol=1e-12, atol=1e-12)
        assert not any("values_NV" in name for name, _ in exact.named_parameters())
        assert model.head.weight.dtype == torch.float32


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(ValueError, match="must have memory layers"):
        quantize_tables(build(DENSE), 8)
    with pytest.raises(ValueError, match="eval mode"):
        quantize_tables(build(CONFIG).train(), 8)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantize_tables(build(CONFIG), 3)
    odd = build(replace(CONFIG, memory=replace(MEMORY, value_dim=18)))
    with pytest.raises(ValueError, match=r"must be even for 4 bits, got 18 / 2 and 0"):
        quantize_tables(odd, 4)
    assert tables(quantize_tables(odd, 8))
    lazy = build(CONFIG)
    build_optimizers(lazy, lr=1e-3, tables="lazy_adamw")
    with pytest.raises(ValueError, match="must be up to date"):
        quantize_tables(lazy, 8)


def test_quantising_takes_little_memory_beside_the_rows():
    """A table of 256 MB: the int8 copy, and less than 20 % of the table on top."""
    code = """
        import resource, torch
        from ultramem import ops
        table = torch.ones(2**20, 64)
        ops.quantize_rows(table[:1000], 8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows = ops.quantize_rows(table, 8)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(table.nbytes, peak - rows.rows_NB.nbytes)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table_bytes, extra = map(int, done.stdout.split())
    assert extra < 0.2 * table_bytes


def test_every_byte_is_unpacked_alike():
    rows = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert _numbers(rows).equal(ops.unpack_rows(rows).float())
    assert _numbers(rows.view(torch.int8)).equal(rows.view(torch.int8).float())
