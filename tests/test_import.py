"""Importing the package: quick, quiet, without extras, and without Triton."""

import subprocess
import sys
import textwrap

import pytest

import ultramem

HEAVY = ("onnx", "onnxruntime", "onnxscript", "tensorrt", "torch_tensorrt", "transformers", "matplotlib", "triton")


def run_python(code, *flags):
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    ).stdout


def test_import_brings_in_no_extra():
    loaded = run_python(
        f"""
        import torch, sys
        before = set(sys.modules)
        import ultramem
        print(sorted(set({HEAVY!r}) & (set(sys.modules) - before)))
        """
    )
    assert loaded.strip() == "[]"


def test_counting_needs_no_torch():
    assert run_python("import sys, ultramem.cli; ultramem.cli.main(['params', 'ultramem-1.6b-x12', '--json'])")
    assert run_python("import sys, ultramem; ultramem.presets(); print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_is_there():
    assert run_python("import ultramem; print(all(hasattr(ultramem, n) for n in ultramem.__all__))").strip() == "True"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ultramem.nonsense  # noqa: B018  # the access is the test


def test_import_takes_at_most_0_3_s_more_than_torch():
    code = """
        import time, torch
        began = time.process_time()  # this process's own time: other load does not count
        import ultramem, ultramem.ops, ultramem.graph
        print(time.process_time() - began)
        """
    # The least of five: a shared machine makes some of them slower, and none faster.
    assert min(float(run_python(code)) for _ in range(5)) < 0.3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_triton_all_works_on_a_cpu_and_warns_of_nothing(compiled):
    output = run_python(
        f"""
        import sys
        sys.modules["triton"] = None  # any import of it fails
        import importlib.util as util
        find = util.find_spec
        util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
        import torch, ultramem
        config = ultramem.ModelConfig(
            vocab_size=61, hidden_size=32, inner_size=48, num_heads=2, num_layers=2, insertions="1:2",
            memory=ultramem.MemoryConfig(hidden_size=32, num_layers=2, value_dim=16, key_dim=8, knum=9, top_m=5),
        )
        model = ultramem.build_model(config)
        forward = torch.compile(model, fullgraph=True) if {compiled} else model
        tokens = torch.randint(0, 61, (2, 9))
        output = forward(tokens)
        (output.logits.float().logsumexp(-1).mean() + output.aux_loss).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        try:
            with ultramem.ops.use_implementation(ultramem.ops.Implementation.TRITON):
                model(tokens)
        except RuntimeError as error:
            print(error)
        """,
        "-W",
        "error" if not compiled else "default",
    )
    assert "Triton is not installed" in output


def test_the_wheel_holds_one_top_level_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        check=True,
        capture_output=True,
    )
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ultramem"}
    for needed in (
        "ops/lookup_reduce.py",
        "export/__init__.py",
        "export/huggingface/modeling_ultramem.py",
        "runtime/train.py",
        "runtime/corpus/austen/emma.txt",
    ):
        assert f"ultramem/{needed}" in names
