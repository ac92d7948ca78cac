"""An export folder is whole, true to eager, and refused when it is not."""

import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build

from ultramem.export import export_model, load_artifact, parity
from ultramem.export.manifest import read_manifest
from ultramem.export.program import empty_state, example_inputs, flat_inputs


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["onnx", "aoti"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def test_manifest_describes_the_folder(folder):
    document = json.loads((folder / "manifest.json").read_text())
    engine = document["engine"]
    assert document["format_version"] == 2
    nothing = dict.fromkeys(("table", "static", "coarse_keys", "sizes", "kernels"))
    assert document["options"] == nothing | {"dtype": "fp32", "decode": False, "device": "cpu"}
    assert document["model"]["memory"]["knum"] == MEMORY.knum
    (name,) = document["files"]
    assert name == {"onnx": "model.onnx", "aoti": "model.pt2"}[engine]
    data = (folder / name).read_bytes()
    assert document["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert document["inputs"][0] == {"name": "input_ids", "shape": ["batch", "seq"], "dtype": "int64"}
    assert document["inputs"][3]["shape"] == ["batch", 2, "past", 16]
    assert document["outputs"][-1] == {"name": "present_conv.0", "shape": ["batch", 32, 3], "dtype": "float32"}
    common = ["remove_no_ops", "fold_constants"]
    expected = {"onnx": ["split_einsums", *common], "aoti": ["split_experts", *common, "lower_ops", *common]}[engine]
    assert [each["name"] for each in document["passes"]] == expected
    assert len(document["how_to_load"]) == 4
    record = document["parity"]
    assert 0 < record["max_error"] <= record["allowed"] == 4 * record["eager_error"]
    assert record["mean_error"] <= record["max_error"]
    assert record["greedy_equal"] == record["greedy_tokens"] == 128
    assert [(each["batch"], each["prompt"], each["steps"]) for each in record["cases"]] == [
        (batch, prompt, 32 if prompt == 7 else 0) for batch in (1, 3) for prompt in (1, 7, 128)
    ]
    assert max(each["max_error"] for each in record["cases"]) == record["max_error"]
    assert record["rounding"] is None


def test_passes_are_recorded_with_their_effect(folder):
    passes = read_manifest(folder).passes
    assert {each.graph for each in passes} == {"model"}
    first = next(each for each in passes if each.name == "remove_no_ops")
    assert first.nodes_after < first.nodes_before
    assert passes[0].constant_bytes_before > 4 * 64 * 32
    for before, after in pairwise(passes):
        assert (before.nodes_after, before.constant_bytes_after) == (after.nodes_before, after.constant_bytes_before)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 2, 7])
@pytest.mark.parametrize("past", [0, 1, 5])
def test_any_sizes(folder, batch, seq, past):
    model = build(CONFIG)
    inputs = list(example_inputs(model, batch=batch, seq=seq, past=past))
    inputs[0] = torch.randint(64, (batch, seq))
    inputs[3:] = [torch.randn_like(each) for each in inputs[3:]]
    inputs[1][0, : (past + seq) // 3] = 0
    from ultramem.export.program import FlatModel

    with torch.no_grad():
        expected = FlatModel(model)(*inputs)
        exact = FlatModel(build(CONFIG).double())(*(x.double() if x.is_floating_point() else x for x in inputs))
    found = load_artifact(folder)(inputs)
    for ours, eager, double in zip(found, expected, exact, strict=True):
        assert ours.is_contiguous()  # whoever feeds it back unseen may rely on that
        assert ours.shape == eager.shape
        if eager.numel():
            # Float32's own error, or that of a rounding of the largest element where eager made none.
            allowed = 4 * max((eager - double).abs().max().item(), 2**-24 * double.abs().max().item())
            assert (ours - eager).abs().max().item() <= allowed


def test_aoti_runs_where_the_package_cannot_be_imported(aoti_folder, tmp_path):
    model = build(CONFIG)
    inputs = flat_inputs(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.int64), empty_state(CONFIG, 1))
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
        import sys
        sys.modules["ultramem"] = None
        import torch
        model = torch._inductor.aoti_load_package({str(aoti_folder / "model.pt2")!r})
        outputs = model(*torch.load({str(tmp_path / "inputs.pt")!r}))
        torch.save(outputs[0], {str(tmp_path / "logits.pt")!r})
        try:
            import ultramem
        except ImportError:
            print("not importable")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "not importable"
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def damaged(folder, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


def flip_a_byte(folder):
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-10])


def change_version(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 99'))


def change_model(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"knum": 8', '"knum": "eight"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "was altered"),
        (truncate, "bytes, the manifest says"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a manifest"),
        (change_version, "format_version 2, got 99"),
        (change_model, "is damaged: MemoryConfig.knum must be of type int"),
    ],
)
def test_a_damaged_export_is_refused_in_one_line(onnx_folder, tmp_path, damage, message):
    with pytest.raises(ValueError, match=message) as error:
        load_artifact(damaged(onnx_folder, tmp_path, damage))
    assert "\n" not in str(error.value)


def test_an_export_of_another_engine_is_refused(onnx_folder):
    with pytest.raises(ValueError, match="is an export for onnx, not for aoti"):
        load_artifact(onnx_folder, engine="aoti")


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not an export folder: it has no manifest"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("to", ["openvino", "ONNX"])
def test_unknown_engines_are_refused(tmp_path, to):
    with pytest.raises(ValueError, match=f"one of onnx, aoti, tensorrt, huggingface, got '{to}'"):
        export_model(build(DENSE), to, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_export_replaces_only_exports_and_only_when_told(tmp_path):
    model, out = build(DENSE), tmp_path / "out"
    lines = []
    manifest = export_model(model, "onnx", out, progress=lines.append)
    assert lines == ["rounding the weights", "writing onnx", "comparing with eager"]
    assert read_manifest(out) == manifest
    assert "0 of" not in str(manifest)
    assert "onnx" in str(manifest)
    with pytest.raises(FileExistsError, match="already holds an export"):
        export_model(model, "onnx", out)
    (out / "stale").touch()
    export_model(model, "onnx", out, overwrite=True)
    assert leftovers(out) == ["manifest.json", "model.onnx"]

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").touch()
    with pytest.raises(FileExistsError, match="is not an export"):
        export_model(model, "onnx", tmp_path / "other", overwrite=True)
    assert leftovers(tmp_path) == ["other", "out"]


def test_an_export_that_differs_from_eager_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "FACTOR", 0)
    with pytest.raises(ValueError, match="does not compute what eager does: largest logit error"):
        export_model(build(DENSE), "onnx", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupt(line):
        if line == "comparing with eager":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(build(DENSE), "onnx", tmp_path / "out", progress=interrupt)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "memory",
    [
        replace(MEMORY, candidates="two_tailed", expansion=1, conv_width=1),
        replace(MEMORY, rank=1, num_cores=1, permutation="stored", qk_norm="none"),
        replace(MEMORY, rank=3, rank_layout="split", key_dim=12, shared_query=False, expansion=9, permutation="none"),
    ],
    ids=["two-tailed", "product-keys", "split"],
)
def test_onnx_of_every_kind_of_layer(tmp_path, memory):
    config = replace(CONFIG, memory=replace(memory, num_layers=1), num_layers=1, insertions="1:1")
    manifest = export_model(build(config), "onnx", tmp_path / "out")
    assert manifest.parity.max_error <= manifest.parity.allowed
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens


FAMILIES = {
    "pkm": {"rank": 1, "num_cores": 1, "expansion": 1, "conv_width": 1, "score_function": "softmax"},
    "peer": {"rank": 1, "num_cores": 1, "expert_dim": 32, "score_function": "softmax"},
    "memory-plus": {"rank": 1, "num_cores": 1, "table": "shared", "output": "gated"},
    "ultramem-v2": {"expert_dim": 8, "expert_project": True, "table": "windows", "table_layers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "aoti"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_a_memory(tmp_path, family, engine):
    config = replace(CONFIG, memory=replace(MEMORY, **FAMILIES[family]), insertions="1:1/2:2", replace_mlp=True)
    manifest = export_model(build(config), engine, tmp_path / "out")
    assert manifest.parity.max_error <= manifest.parity.allowed
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens
