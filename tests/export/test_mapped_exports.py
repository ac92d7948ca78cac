"""Large weights of an export are pages of its files, quantised rows too."""

from dataclasses import replace

import pytest
import torch
from exported import CONFIG, MEMORY, build
from mapped import mapped_bytes, permissions

from ultramem.export.aot_inductor import WEIGHTS_FILE, export_aoti, load_aoti
from ultramem.export.onnx import FILE, export_onnx, load_onnx
from ultramem.export.program import FlatModel, capture, example_inputs
from ultramem.graph.quantized_table import quantize_tables

LARGE = replace(CONFIG, memory=replace(MEMORY, knum=64, value_dim=512))  # 8 MB of float32 rows


@pytest.fixture(params=[None, 8, 4], ids=["float32", "int8", "int4"])
def model(request):
    return build(LARGE) if request.param is None else quantize_tables(build(LARGE), request.param)


def table_bytes(model):
    table = model.memories[0].table
    return (table.values_NV if hasattr(table, "values_NV") else table.rows_NB).nbytes


def assert_it_computes_what_eager_does(run, model):
    inputs = example_inputs(model, batch=1, seq=4, past=3)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs)[0], FlatModel(model)(*inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_aot_inductor_maps_its_weights_for_reading(tmp_path):
    model = quantize_tables(build(LARGE), 8)
    export_aoti({"model": capture(model)}, tmp_path, external_bytes=0)
    run = load_aoti(tmp_path)
    assert permissions(tmp_path / WEIGHTS_FILE) == {"r--s"}
    assert_it_computes_what_eager_does(run, model)


def test_onnx_runtime_maps_the_table(model, tmp_path):
    export_onnx(capture(model), tmp_path, candidates="one_tailed", external_bytes=0)
    run = load_onnx(tmp_path)
    assert mapped_bytes(tmp_path / f"{FILE}.data") >= table_bytes(model)
    assert_it_computes_what_eager_does(run, model)
