"""The programs in C++ under examples/ build, run, and say what Python says."""

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from exported import CONFIG, build, export_once

from ultramem.export.onnx_plugin import find_plugin
from ultramem.ops.native.build import FOLDER

ROOT = Path(__file__).parents[1]
PROMPT = [3, 14, 15, 9, 2, 6]
STEPS = 12


@pytest.fixture(scope="module")
def onnx_generate(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this build of onnxruntime has no shared library to link with")
    runtime = tmp_path_factory.mktemp("examples")
    (runtime / "libonnxruntime.so.1").symlink_to(libraries[0])
    program = runtime / "onnx_generate"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER / 'third_party/onnxruntime'}"),
            *(ROOT / "examples/onnx_generate.cc", "-o", program),
            *(f"-L{runtime}", "-l:libonnxruntime.so.1", f"-Wl,-rpath,{runtime}"),
        ],
        check=True,
    )
    return program


def greedy_tokens():
    model, tokens = build(CONFIG), list(PROMPT)
    with torch.no_grad():
        for _ in range(STEPS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_onnx_generate_with_the_plugin_and_without(onnx_generate, tmp_path_factory):
    model = export_once(tmp_path_factory, "onnx") / "model.onnx"
    words = [str(STEPS), *map(str, PROMPT)]
    for plugin in (find_plugin().file, "-"):
        done = subprocess.run([onnx_generate, model, plugin, *words], check=True, capture_output=True, text=True)
        assert [int(word) for word in done.stdout.split()] == greedy_tokens()
        assert done.stderr == ""


def test_onnx_generate_says_in_one_line_what_is_wrong(onnx_generate, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for plugin, message in (("-", "error: "), (tmp_path / "none.so", "error: ")):
        done = subprocess.run(
            [onnx_generate, tmp_path / "model.onnx", plugin, "1", "1"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
