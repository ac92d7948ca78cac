"""Families, types of weights, types of rows and engines, pairwise; the whole product is slow."""

import json
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from exported import build
from families import FAMILIES
from torch._inductor import config as inductor

from ultramem.export import ENGINES, ExportOptions, artifact, export_model

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


@pytest.fixture
def record(request):
    """Puts a result into the file of `--parity-file`, by name; skips the test if it is there already."""
    file = request.config.getoption("--parity-file")
    name = dict(request.node.callspec.params)
    if file is None:
        return lambda result: None
    path = Path(file)
    known = path.read_text().splitlines() if path.exists() else []
    if any(name.items() <= json.loads(line).items() for line in known):
        pytest.skip("the file has it")

    def write(result):
        with path.open("a") as lines:  # one write: two workers append whole lines
            lines.write(json.dumps({**name, **result}) + "\n")

    return write


def check(folder, record, family, dtype, table, engine):
    start = time.perf_counter()
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
    seconds = round(time.perf_counter() - start, 1)
    commit, versions = manifest.source_commit, manifest.versions
    record({"commit": commit, "versions": versions, "seconds": seconds, "parity": asdict(parity)})


@pytest.mark.parametrize(("family", "dtype", "table", "engine"), PAIRWISE)
def test_pairwise(tmp_path, record, family, dtype, table, engine):
    check(tmp_path / "out", record, family, dtype, table, engine)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "table", "engine"), [each for each in EVERY if each not in PAIRWISE])
def test_the_rest(tmp_path, record, family, dtype, table, engine):
    check(tmp_path / "out", record, family, dtype, table, engine)
