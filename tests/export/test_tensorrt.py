"""ONNX to a TensorRT engine, against a stand-in that records what is asked and refuses what TensorRT does not have."""

import re
import shlex
from dataclasses import replace

import onnx
import pytest
import torch
from exported import CONFIG, DENSE, build

from benchmarks.tensorrt_stand_in import CALLS, stand_in
from benchmarks.tensorrt_stand_in.rehearsal import rehearsal
from ultramem.export import ExportOptions, export_model, load_artifact, tensorrt, tensorrt_plugins
from ultramem.export.onnx import write_onnx
from ultramem.export.program import example_inputs
from ultramem.export.rounding import rounded
from ultramem.export.signature import tensor_specs
from ultramem.export.tensorrt_build import build_engine
from ultramem.export.tensorrt_profiles import Range, Sizes, parse_ranges, profiles, sizes_of
from ultramem.export.tensorrt_run import TensorrtModel
from ultramem.ops.triton.ahead_of_time import Compiled
from ultramem.runtime.engine import EagerEngine, TensorrtEngine
from ultramem.runtime.generate import generate


@pytest.fixture
def trt(monkeypatch):
    """TensorRT's stand-in."""
    # Triton may be the interpreter here: tests/export/test_tensorrt_kernels.py compiles, in a process of its own.
    monkeypatch.setattr(tensorrt_plugins, "compile_ahead", lambda *given: Compiled("k", ".entry k(", b"", 128, 2048))
    with rehearsal() as module:
        yield module


def test_without_tensorrt_one_line_says_what_to_install_and_nothing_is_left(tmp_path):
    with pytest.raises(
        ImportError, match=r"TensorRT is not installed \(pip install tensorrt.*docs/tensorrt.md\)"
    ) as error:
        export_model(build(DENSE), "tensorrt", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_bindings_without_their_libraries_are_told_apart(monkeypatch, tmp_path):
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("libnvinfer.so.11: cannot open shared object file")')
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ImportError, match=r"libraries cannot be loaded: libnvinfer.so.11: cannot open"):
        export_model(build(DENSE), "tensorrt", tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    with stand_in(), pytest.raises(ValueError, match="built and run on an NVIDIA GPU, and PyTorch sees none here"):
        export_model(build(DENSE), "tensorrt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"table": "int4"}, r"table must be one of None, int8 for tensorrt, got 'int4' \(a network has no unsigned"),
        ({"sizes": "tokens=1:2:3"}, "sizes must name each of batch, seq and past at most once, got 'tokens=1:2:3'"),
        ({"sizes": "batch=1:2"}, "sizes must give min:opt:max of batch, three numbers, got '1:2'"),
        ({"sizes": "batch=0:1:2"}, "sizes must have 1 <= min <= opt <= max for batch, got '0:1:2'"),
        ({"sizes": "past=0:9:2"}, "sizes must have 0 <= min <= opt <= max for past, got '0:9:2'"),
        ({"sizes": "seq=1:1:1,seq=1:1:1"}, "at most once"),
    ],
)
def test_options_that_no_engine_is_built_for_are_refused(trt, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        export_model(build(CONFIG), "tensorrt", tmp_path / "out", options=ExportOptions(**fields))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"sizes": "batch=1:1:1"}, {"kernels": "body"}])
def test_ranges_and_kernels_are_for_tensorrt_alone(tmp_path, fields):
    with pytest.raises(ValueError, match=r"must be None for onnx, got .*it is for tensorrt"):
        export_model(build(DENSE), "onnx", tmp_path / "out", options=ExportOptions(**fields))
    with pytest.raises(ValueError, match="kernels must be plugin, body or None, got 'fast'"):
        ExportOptions(kernels="fast")


def test_ranges_are_read_and_completed_by_the_model():
    assert parse_ranges("batch=1:4:8,past=0:16:32") == {"batch": Range(1, 4, 8), "past": Range(0, 16, 32)}
    most = CONFIG.max_positions
    assert sizes_of(ExportOptions(), CONFIG) == Sizes(
        batch=Range(1, 1, 8), seq=Range(1, 128, most), past=Range(0, 128, most)
    )
    fixed = sizes_of(ExportOptions(static=(2, 16), sizes="past=0:16:32"), CONFIG)
    assert fixed == Sizes(batch=Range(2, 2, 2), seq=Range(16, 16, 16), past=Range(0, 16, 32))
    with pytest.raises(ValueError, match="sizes must not give batch, which is fixed to 2, got 'batch=1:1:1'"):
        sizes_of(ExportOptions(static=(2, 16), sizes="batch=1:1:1"), CONFIG)
    with pytest.raises(ValueError, match=rf"sizes must have past up to {most}, the model's positions, got {most + 1}"):
        sizes_of(ExportOptions(sizes=f"past=0:1:{most + 1}"), CONFIG)


def test_profiles_give_every_input_the_shapes_of_prefill_and_decode():
    options = ExportOptions(sizes="batch=1:4:8,seq=1:16:64,past=0:32:100")
    inputs, _ = tensor_specs(CONFIG, options, seq=None)
    prefill, decode = profiles(inputs, options, sizes_of(options, CONFIG))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert set(prefill.shapes) == set(decode.shapes) == {each.name for each in inputs}
    assert prefill.shapes["input_ids"] == ((1, 1), (4, 16), (8, 64))
    assert prefill.shapes["attention_mask"] == ((1, 1), (4, 16), (8, 164))
    assert prefill.shapes["past_key_values.0.key"] == ((1, 2, 0, 16), (4, 2, 0, 16), (8, 2, 100, 16))
    assert prefill.shapes["past_conv.0"] == ((1, 32, 3), (4, 32, 3), (8, 32, 3))
    assert decode.shapes["input_ids"] == ((1, 1), (4, 1), (8, 1))
    assert decode.shapes["attention_mask"] == ((1, 1), (4, 33), (8, 101))
    options = ExportOptions(static=(2, 16))
    inputs, _ = tensor_specs(CONFIG, options, seq=16)
    (fixed,) = profiles(inputs, options, sizes_of(options, CONFIG))
    assert fixed.name == "fixed"
    assert fixed.shapes["attention_mask"] == ((2, 16), (2, 144), (2, 16 + CONFIG.max_positions))


@pytest.mark.parametrize("kernels", ["plugin", "body"])
def test_an_export_builds_runs_and_generates(trt, tmp_path, kernels):
    options = ExportOptions(kernels=kernels, sizes="batch=1:3:8")
    manifest = export_model(build(CONFIG), "tensorrt", tmp_path / "out", options=options)
    assert set(manifest.files) == {"model.plan", "model.timing_cache", "model.onnx", "trtexec.txt"}
    assert manifest.parity.max_error <= manifest.parity.allowed
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens > 0
    executed = [call.arguments[0] for call in CALLS if call.name == "execute_async_v3"]
    assert set(executed) == {0, 1}  # prompts by the profile of the prefill, tokens by that of decoding
    defined = [call.arguments[0] for call in CALLS if call.name == "register"]
    plugins = [call.arguments[0] for call in CALLS if call.name == "add_plugin"]
    if kernels == "body":
        assert defined == plugins == []
    else:
        assert plugins == ["ultramem::TuckerTopKWithScratch", "ultramem::PermuteAddresses", "ultramem::LookupReduce"]

    engine = TensorrtEngine(tmp_path / "out")
    settings = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    ours, theirs = (
        list(generate(each, [1, 2, 3], end_of_text=None, **settings)) for each in (engine, EagerEngine(build(CONFIG)))
    )
    assert ours == theirs
    with pytest.raises(ValueError, match=r"input_ids must have a shape from \[1, 1\] to \[8, .*got \[9, 3\]"):
        engine.prefill(torch.zeros(9, 3, dtype=torch.int64))


def test_what_tensorrt_is_asked_in_order(trt, tmp_path):
    options = ExportOptions(kernels="body", sizes="batch=1:2:4,seq=1:8:16,past=0:8:16")
    wanted = tensorrt.engine_profiles(DENSE, options)
    write_onnx(build(DENSE), options, tmp_path)
    CALLS.clear()
    built = build_engine(trt, tmp_path / "model.onnx", wanted, timing_cache=b"earlier\n", workspace_bytes=2**20)
    assert [call.name for call in CALLS] == [
        "create_network", "parse_from_file", "set_memory_pool_limit", "clear_flag", "profiling_verbosity",
        "create_timing_cache", "set_timing_cache", "add_optimization_profile", "add_optimization_profile",
        "build_serialized_network",
    ]  # fmt: skip
    asked = {call.name: call.arguments for call in CALLS}
    assert asked["create_network"] == (1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)
    assert asked["set_memory_pool_limit"] == (trt.MemoryPoolType.WORKSPACE, 2**20)
    assert asked["clear_flag"] == (trt.BuilderFlag.TF32,)
    assert asked["create_timing_cache"] == (b"earlier\n",)
    assert asked["add_optimization_profile"] == (dict(wanted[1].shapes),)
    assert built.timing_cache == b"earlier\ntimed\n"
    assert built.plugin_layers == 0


def test_bodies_are_taken_also_where_the_plugins_are_registered(trt, tmp_path):
    options = ExportOptions()
    write_onnx(build(CONFIG), options, tmp_path)
    on_disk, wanted = (tmp_path / "model.onnx").read_bytes(), tensorrt.engine_profiles(CONFIG, options)
    counts = [
        tensorrt.engine_of(trt, tmp_path / "model.onnx", wanted, kernels=kernels).plugin_layers
        for kernels in ("plugin", "body", "plugin")
    ]
    assert counts == [3, 0, 3]
    assert (tmp_path / "model.onnx").read_bytes() == on_disk
    # A file as it is, in a process that has the plugins: its selections have no scratch memory and run by their bodies.
    assert build_engine(trt, tmp_path / "model.onnx", wanted, plugin_nodes=2).plugin_layers == 2


def test_every_refusal_of_tensorrt_is_one_line(trt, tmp_path):
    options = ExportOptions(kernels="body")
    wanted = tensorrt.engine_profiles(DENSE, options)
    write_onnx(build(DENSE), options, tmp_path)
    file = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="refuses the timing cache: it is of another GPU"):
        build_engine(trt, file, wanted, timing_cache=b"of another GPU")
    with pytest.raises(ValueError, match=r"made plugin layers of 0 nodes of model.onnx, 2 were asked for"):
        build_engine(trt, file, wanted, plugin_nodes=2)
    short = [replace(each, shapes={"input_ids": each.shapes["input_ids"]}) for each in wanted]
    with pytest.raises(ValueError, match=r"TensorRT finds no engine for model\.onnx"):
        build_engine(trt, file, short)
    file.write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"TensorRT cannot parse model\.onnx: ") as error:
        build_engine(trt, file, wanted)
    assert "\n" not in str(error.value)


def test_a_damaged_engine_is_refused(trt, tmp_path):
    inputs, outputs = tensor_specs(DENSE, ExportOptions(), seq=None)
    with pytest.raises(ValueError, match="does not take the engine: it is of another version or GPU"):
        TensorrtModel(trt, b"?", inputs, outputs, device=torch.device("cpu"), stream=lambda: 0)
    export_model(build(DENSE), "tensorrt", tmp_path / "out", options=ExportOptions(kernels="body"))
    plan = (tmp_path / "out" / "model.plan").read_bytes()
    (tmp_path / "out" / "model.plan").write_bytes(plan[:-1])
    with pytest.raises(ValueError, match=r"model.plan has \d+ bytes, the manifest says"):
        load_artifact(tmp_path / "out")
    with pytest.raises(ValueError, match="the engine must have tensors of"):
        TensorrtModel(trt, plan, inputs[:2], outputs, device=torch.device("cpu"), stream=lambda: 0)


@pytest.mark.parametrize("fields", [{"dtype": "fp16", "table": "int8"}, {"decode": True}, {"static": (1, 4)}])
def test_types_and_sizes_of_the_options_reach_the_engine(trt, tmp_path, fields):
    options = ExportOptions(**fields)
    tensorrt.write_tensorrt(rounded(build(CONFIG), options), options, tmp_path)
    inputs, outputs = tensor_specs(CONFIG, options, seq=options.seq)
    plan = (tmp_path / "model.plan").read_bytes()
    model = TensorrtModel(trt, plan, inputs, outputs, device=torch.device("cpu"), stream=lambda: 0)
    batch, seq = options.batch or 2, options.seq or 3
    tensors = example_inputs(rounded(build(CONFIG), options), batch=batch, seq=seq, past=5)
    logits, *state = model(tensors)
    assert logits.shape == (batch, seq, CONFIG.vocab_size)
    assert logits.dtype == state[0].dtype == options.torch_dtype
    assert len([call for call in CALLS if call.name == "add_optimization_profile"]) == (1 if options.seq else 2)
    added = {call.arguments[0] for call in CALLS if call.name == "add_plugin"}
    assert f"ultramem::LookupReduce{'Quantized' if options.table else ''}" in added


def test_bfloat16_reaches_the_file_that_the_engine_is_built_from(trt, tmp_path):
    options = ExportOptions(dtype="bf16")
    write_onnx(rounded(build(CONFIG), options), options, tmp_path)
    built = tensorrt.engine_of(
        trt, tmp_path / "model.onnx", tensorrt.engine_profiles(CONFIG, options), kernels="plugin"
    )
    assert built.plugin_layers == 3
    kinds = {each.name: each.type.tensor_type.elem_type for each in onnx.load(tmp_path / "model.onnx").graph.input}
    assert kinds["past_conv.0"] == onnx.TensorProto.BFLOAT16
    tactics = [call.arguments for call in CALLS if call.name == "compile"]
    assert ("ultramem::LookupReduce", 3) in tactics  # products, on tensor cores


def test_the_trtexec_lines_say_what_was_built(trt):
    options = ExportOptions(sizes="batch=1:2:4,seq=1:8:16,past=0:8:16")
    wanted = tensorrt.engine_profiles(DENSE, options)
    build_words, prefill, decode = (shlex.split(line) for line in tensorrt.trtexec_lines(wanted))
    assert build_words[0] == prefill[0] == decode[0] == "trtexec"
    given = [word.partition("=")[::2] for word in build_words[1:]]
    assert [value for name, value in given if name == "--profile"] == ["0", "1"]
    for flag in ("--stronglyTyped", "--noTF32", "--skipInference"):
        assert flag in build_words
    assert ("--memPoolSize", "workspace:4096") in given
    shapes = [value for name, value in given if re.fullmatch("--(min|opt|max)Shapes", name)]
    parsed = [
        {part.split(":")[0]: tuple(map(int, part.split(":")[1].split("x"))) for part in text.split(",")}
        for text in shapes
    ]
    expected = [
        {name: each[which] for name, each in profile.shapes.items()} for profile in wanted for which in range(3)
    ]
    assert parsed == expected
    assert "--useProfile=1" in decode
    assert any(word.startswith("--shapes=input_ids:2x1,attention_mask:2x9,") for word in decode)
