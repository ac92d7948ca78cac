"""A package of two graphs, for any sizes and for one token, whose weights stand beside it and are mapped."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from exported import DENSE, build, once

from ultramem.export import ExportOptions, export_model, load_artifact
from ultramem.export.aot_inductor import FILE, WEIGHTS_FILE
from ultramem.export.feeding import Case, eager_run, greedy_tokens
from ultramem.export.program import empty_state, flat_inputs
from ultramem.export.weights_file import write_weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti_generate.cc"
PROMPT, STEPS = [5, 9, 33, 60, 2], 20


@pytest.fixture(scope="session")
def decode_folder(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "export-aoti-decode"
    with once(tmp_path_factory, folder.name):
        if not folder.exists():
            export_model(build(DENSE), "aoti", folder, options=ExportOptions(decode=True))
    return folder


def eager_tokens():
    """Greedy tokens after PROMPT."""
    model = build(DENSE)
    run, tokens, found = eager_run(model), torch.tensor([PROMPT]), []
    state, total = empty_state(DENSE, 1), len(PROMPT)
    for _ in range(STEPS):
        logits, *new = run(flat_inputs(tokens, torch.ones(1, total, dtype=torch.int64), state))
        tokens, state, total = logits[:, -1:].argmax(-1), tuple(new), total + 1
        found.append(int(tokens))
    return found


def test_the_folder_holds_code_and_weights_apart(decode_folder):
    manifest = json.loads((decode_folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {FILE, WEIGHTS_FILE}
    assert manifest["inputs"][0]["shape"] == ["batch", "seq"]
    assert {each["graph"] for each in manifest["passes"]} == {"model", "decode"}
    assert manifest["parity"]["greedy_equal"] == manifest["parity"]["greedy_tokens"] == 128
    model = build(DENSE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights <= manifest["files"][WEIGHTS_FILE]["bytes"] <= weights + 4096  # once, for both graphs
    assert model.head.weight.detach().numpy().tobytes() in (decode_folder / WEIGHTS_FILE).read_bytes()


def test_calls_of_one_token_go_to_the_graph_of_one_token(decode_folder):
    artifact = load_artifact(decode_folder)
    case = Case(3, 7, 12, None)
    found = greedy_tokens(artifact.run, DENSE, case, torch.float32, seed=1)
    assert found == greedy_tokens(eager_run(build(DENSE)), DENSE, case, torch.float32, seed=1)
    maps = Path("/proc/self/maps").read_text()
    assert str(decode_folder / WEIGHTS_FILE) in maps


def test_the_four_lines_of_the_manifest_load_it_without_the_package(decode_folder, tmp_path):
    lines = json.loads((decode_folder / "manifest.json").read_text())["how_to_load"]
    inputs = flat_inputs(torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.int64), empty_state(DENSE, 1))
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
        import sys
        sys.modules["ultramem"] = None
        import torch
        inputs = torch.load({str(tmp_path / "inputs.pt")!r})
    """
    code = "\n".join(
        [textwrap.dedent(code), *lines, f"torch.save((logits, present), {str(tmp_path / 'outputs.pt')!r})"]
    )
    subprocess.run([sys.executable, "-c", code], cwd=decode_folder, check=True)
    logits, present = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        expected = build(DENSE)(torch.tensor([[5]])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(present) == 2


def test_weights_of_another_package_are_refused(decode_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(decode_folder, folder)
    write_weights(folder / WEIGHTS_FILE, {"model.head.weight": torch.zeros(64, 16)})
    document = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"model.safetensors has .* bytes, the manifest says"):
        load_artifact(folder)
    from ultramem.export.manifest import file_record

    record = file_record(folder / WEIGHTS_FILE)
    document["files"][WEIGHTS_FILE] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"model.safetensors does not belong to the package: it lacks ") as error:
        load_artifact(folder)
    assert "\n" not in str(error.value)


def test_a_file_of_weights_is_what_safetensors_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "half": torch.randn(3).half(),
        "bytes": torch.arange(7, dtype=torch.uint8).view(1, 7),
        "wide": torch.randn(5, 3),
        "brain": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(3),
        "strided": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 3),
    }
    write_weights(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor)
        assert found[name].data_ptr() % tensor.element_size() == 0


def test_the_example_in_cpp_generates_what_eager_does(decode_folder, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(torch.__file__).parent
    binary = tmp_path / "aoti_generate"
    command = [compiler, "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-isystem", str(root / "include")]
    command += [str(EXAMPLE), "-o", str(binary), "-L", str(root / "lib"), f"-Wl,-rpath,{root / 'lib'}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    call = [str(binary), str(decode_folder), str(STEPS), *map(str, PROMPT)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == eager_tokens()
    for arguments, status, message in (([], 2, "usage:"), ([str(tmp_path), "1", "1"], 1, "error: ")):
        done = subprocess.run([str(binary), *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr[: len(message)]) == (status, message)
