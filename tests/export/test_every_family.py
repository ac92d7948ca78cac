"""Families, types of weights, types of rows and engines, pairwise; the whole product is slow."""

from dataclasses import replace
from itertools import product

import pytest
from exported import DENSE, MEMORY, build
from torch._inductor import config as inductor

from ultramem import MoEConfig
from ultramem.export import ENGINES, ExportOptions, artifact, export_model

ONE_LAYER = replace(MEMORY, num_layers=1, permutation="none")  # a permutation is most of a compiler's time
BASE = replace(DENSE, hidden_size=32, inner_size=48, memory=ONE_LAYER, insertions="1:1")
PKM = replace(ONE_LAYER, rank=1, num_cores=1, expansion=1, conv_width=1, score_function="softmax")
FAMILIES = {
    "dense": DENSE,
    "moe": replace(DENSE, moe=MoEConfig(num_experts=4)),
    "pkm": replace(BASE, memory=PKM),
    "ultramem": BASE,
    "memory-plus": replace(BASE, memory=replace(PKM, table="shared", output="gated"), replace_mlp=True),
    "peer": replace(BASE, memory=replace(PKM, expert_dim=32), replace_mlp=True),
    "ultramem-v2": replace(BASE, memory=replace(ONE_LAYER, expert_dim=8, expert_project=True, table="windows")),
}
WITHOUT_TABLE = ("dense", "moe")

# TensorRT builds engines on the GPU that runs them; test_tensorrt has its export with a stand-in.
BUILT_HERE = tuple(engine for engine in ENGINES if engine != "tensorrt")

# Every value of a column at least twice; what an engine lacks is in test_options.
PAIRWISE = [
    ("dense", "fp16", None, "onnx"),
    ("dense", "bf16", None, "aoti"),
    ("moe", "fp32", None, "onnx"),
    ("moe", "fp32", None, "aoti"),
    ("pkm", "fp16", "int8", "onnx"),
    ("pkm", "fp32", None, "onnx"),
    ("ultramem", "fp32", "int8", "aoti"),
    ("ultramem", "fp16", "int4", "onnx"),
    ("memory-plus", "fp32", "int4", "onnx"),
    ("memory-plus", "fp16", None, "onnx"),
    ("peer", "bf16", "int4", "aoti"),
    ("peer", "fp32", None, "onnx"),
    ("ultramem-v2", "fp32", "int8", "onnx"),
    ("ultramem-v2", "fp16", "int4", "onnx"),
    ("moe", "fp16", None, "huggingface"),
    ("pkm", "fp32", "int4", "huggingface"),
    ("ultramem-v2", "bf16", "int8", "huggingface"),
]
EVERY = [
    (family, dtype, table, engine)
    for family, engine in product(FAMILIES, BUILT_HERE)
    for dtype in artifact.BACKENDS[engine].dtypes
    for table in (None, *artifact.BACKENDS[engine].tables)
    if table is None or family not in WITHOUT_TABLE
]


def test_the_selection_has_every_value_twice():
    for column, values in zip(
        zip(*PAIRWISE, strict=True),
        (FAMILIES, ("fp32", "fp16", "bf16"), (None, "int8", "int4"), BUILT_HERE),
        strict=True,
    ):
        for value in values:
            assert column.count(value) >= 2, value
    assert set(PAIRWISE) <= set(EVERY)


@pytest.fixture(autouse=True)
def quick_compiler():
    """The code around AOTInductor's kernels without optimisation: half of the time goes there."""
    with inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


def check(folder, family, dtype, table, engine):
    manifest = export_model(build(FAMILIES[family]), engine, folder, options=ExportOptions(dtype=dtype, table=table))
    parity = manifest.parity
    assert parity.max_error <= parity.allowed == 4 * parity.eager_error
    assert parity.max_error > 0 or engine == "huggingface"  # which may add in the same order
    assert parity.mean_error <= parity.allowed_mean == 4 * parity.eager_mean_error
    assert (parity.rounding is None) == ((dtype, table) == ("fp32", None))
    if parity.rounding is not None:
        assert 0 < parity.rounding.mean_difference <= parity.rounding.max_difference
    if dtype == "fp32":
        assert parity.greedy_equal == parity.greedy_tokens == 128
        assert parity.allowed < 1e-3
    print(f"{family:12} {dtype} {table!s:5} {engine:11} {parity}")


@pytest.mark.parametrize(("family", "dtype", "table", "engine"), PAIRWISE)
def test_pairwise(tmp_path, family, dtype, table, engine):
    check(tmp_path / "out", family, dtype, table, engine)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "table", "engine"), [each for each in EVERY if each not in PAIRWISE])
def test_the_rest(tmp_path, family, dtype, table, engine):
    check(tmp_path / "out", family, dtype, table, engine)
