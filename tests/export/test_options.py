"""What may be chosen, and what an engine lacks, said in one line before any work."""

import pytest
import torch
from exported import CONFIG, DENSE, build

from ultramem.export import ExportOptions, artifact, export_model
from ultramem.export.options import parse_static
from ultramem.export.program import capture, example_inputs
from ultramem.export.signature import tensor_specs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be one of fp32, fp16, bf16, got 'fp8'"),
        ({"table": "int3"}, "table must be one of int8, int4 or None, got 'int3'"),
        ({"static": (0, 4)}, r"static must be \(B, S\), two numbers of at least 1, or None, got \(0, 4\)"),
        ({"static": (True, 4)}, "static must be"),
        ({"static": [1, 4]}, "static must be"),
        ({"decode": 1}, "decode must be True or False, got 1"),
        ({"coarse_keys": "no"}, "coarse_keys must be True, False or None, got 'no'"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"decode": True, "static": (2, 4)}, r"static must have S = 1 \(one new token\) with decode, got \(2, 4\)"),
    ],
)
def test_options_name_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        ExportOptions(**fields)
    assert "\n" not in str(error.value)


def test_static_sizes_are_read():
    assert parse_static("2,16") == (2, 16)
    for text in ("2", "2,0", "a,b", "1,2,3", "-1,4", ""):
        with pytest.raises(ValueError, match="static must be B,S, two numbers of at least 1, got"):
            parse_static(text)


def test_stock_onnx_runtime_has_no_bfloat16_and_the_user_is_told(tmp_path):
    message = r"dtype must be one of fp32, fp16 for onnx, got 'bf16' \(stock ONNX Runtime has no bfloat16.*on a CPU\)"
    with pytest.raises(ValueError, match=message):
        export_model(build(DENSE), "onnx", tmp_path / "out", options=ExportOptions(dtype="bf16"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ["tensorrt", "huggingface"])
def test_coarse_keys_are_for_engines_on_a_cpu(tmp_path, engine):
    with pytest.raises(ValueError, match=f"coarse_keys must be None or False for {engine} on cpu, got True"):
        export_model(build(CONFIG), engine, tmp_path / "out", options=ExportOptions(coarse_keys=True))
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_quantised_only_where_there_is_one(tmp_path):
    with pytest.raises(ValueError, match="table must be None for a model without memory layers, got 'int8'"):
        export_model(build(DENSE), "aoti", tmp_path / "out", options=ExportOptions(table="int8"))
    assert list(tmp_path.iterdir()) == []


def test_models_that_were_rounded_already_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"float32 on the CPU.*embedding\.weight is bfloat16"):
        export_model(build(DENSE).bfloat16(), "aoti", tmp_path / "out")


def test_native_code_for_a_gpu_needs_one_and_an_engine_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ExportOptions(device="cuda")
    for engine, message in (
        ("aoti", "device must be cpu where there is no CUDA device, got 'cuda'"),
        ("onnx", "device must be one of cpu for onnx, got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(build(DENSE), engine, tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", artifact.BACKENDS)
def test_every_engine_says_what_it_is(name):
    backend = artifact.BACKENDS[name]
    assert backend.name == name
    for options in (ExportOptions(), ExportOptions(decode=True)):
        for files in (frozenset(backend.files), frozenset(backend.files[:1])):
            lines = backend.how_to_load(options, files)
            assert len(lines) == 4
            compile("\n".join(lines), name, "exec")
            assert any(backend.files[0] in line for line in lines)


@pytest.mark.parametrize(("batch", "seq"), [(None, None), (None, 1), (2, 8), (1, 1)])
def test_specs_are_those_of_the_graph(batch, seq):
    model = build(CONFIG)
    inputs, outputs = tensor_specs(CONFIG, ExportOptions(static=(batch, seq) if batch else None), seq=seq)
    program = capture(model, batch=batch, seq=seq)
    assert tuple(each.name for each in inputs) == program.input_names
    assert tuple(each.name for each in outputs) == program.output_names
    sizes = {"batch": batch or 3, "seq": seq or 4, "past": 6, "past + seq": 10, f"past + {seq}": 6 + (seq or 0)}
    tensors = example_inputs(model, batch=sizes["batch"], seq=sizes["seq"], past=6)
    with torch.no_grad():
        found = program.exported.module(check_guards=False)(*tensors)
    for specs, values in ((inputs, tensors), (outputs, found)):
        for spec, value in zip(specs, values, strict=True):
            assert tuple(sizes.get(each, each) for each in spec.shape) == tuple(value.shape)
            assert spec.dtype == str(value.dtype).removeprefix("torch.")
