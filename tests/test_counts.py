"""Counts against the paper's Table 6 and against what a model on the meta device holds."""

import time

import pytest
import torch

import ultramem

# Table 6: parameters in billions, FLOPs per token in billions; tolerances from the table's rounding.
TABLE_6 = {
    "dense-151m": (0.15, 0.30),
    "dense-680m": (0.68, 1.36),
    "dense-1.6b": (1.61, 3.21),
    "dense-6.5b": (6.44, 12.88),
    "ultramem-151m-x12": (2.03, 0.35),
    "ultramem-680m-x12": (8.93, 1.49),
    "ultramem-1.6b-x12": (21.41, 3.50),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6(name):
    params, flops = TABLE_6[name]
    counts = ultramem.count(ultramem.preset(name))
    assert counts.total / 1e9 == pytest.approx(params, rel=0.007)
    assert counts.flops_per_token / 1e9 == pytest.approx(flops, rel=0.016)


@pytest.mark.parametrize("name", ultramem.presets())
def test_arithmetic_equals_the_built_model(name):
    config = ultramem.preset(name)
    with torch.device("meta"):
        model = ultramem.build_model(config)
    counts = ultramem.count(config)
    assert counts.total_with_embeddings == sum(parameter.numel() for parameter in model.parameters())
    assert counts.sparse == sum(memory.table.values_NV.numel() for memory in model.memories)
    assert counts.total == counts.dense + counts.sparse


def test_counting_is_instant():
    config = ultramem.preset("ultramem-1.6b-x12")
    began = time.perf_counter()
    ultramem.count(config)
    assert time.perf_counter() - began < 0.1  # 21 billion parameters: nothing can have been built


def test_tiny_models_have_equal_flops():
    dense, memory = (ultramem.count(ultramem.preset(name)) for name in ("dense-tiny", "ultramem-tiny"))
    assert dense.flops_per_token == pytest.approx(memory.flops_per_token, rel=0.005)
    assert memory.sparse > 0 == dense.sparse


def test_unknown_preset_is_named_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"preset must be one of .*got 'ultramem-tny' \(did you mean ultramem-tiny\?\)"
    ):
        ultramem.preset("ultramem-tny")


def test_count_wants_a_config():
    with pytest.raises(TypeError, match="config must be a ModelConfig"):
        ultramem.count("ultramem-tiny")
