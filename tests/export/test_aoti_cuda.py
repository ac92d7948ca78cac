"""Packages for GPUs: what of them can be seen without one, and on one that they compute what eager does."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from exported import CONFIG, build

from ultramem.export import ExportOptions, export_model, load_artifact

LOWER = """
    import json, sys
    sys.path.insert(0, {tests!r})
    from exported import CONFIG, build
    from benchmarks.fake_cuda import fake_cuda, to_cuda
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from ultramem.export.program import capture, simplify
    from ultramem.graph.passes import lower_ops

    program = simplify(capture(build(CONFIG)))
    gm = program.exported.graph_module

    def ours():
        return [node.target for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "ultramem"]

    before = sorted({{each.__name__ for each in ours()}})
    mode = next(node.meta["val"].fake_mode for node in gm.graph.nodes if hasattr(node.meta.get("val"), "fake_mode"))
    with mode, fake_cuda():
        to_cuda(gm, [])
        lower_ops(gm)
    kernels = []
    for node in gm.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not hasattr(kernel, "__name__"):  # heuristics and autotuners are around it
                kernel = kernel.fn
            kernels.append(kernel.__name__)
    print(json.dumps([before, kernels, [str(each) for each in ours()]]))
"""


def test_ops_on_a_gpu_become_launches_of_their_triton_kernels():
    pytest.importorskip("triton")
    code = textwrap.dedent(LOWER.format(tests=str(Path(__file__).parents[1])))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    before, kernels, left = json.loads(done.stdout.splitlines()[-1])
    assert before == ["lookup_reduce.default", "tucker_topk.default"]
    assert left == []
    assert any("lookup" in name for name in kernels)
    assert any("topk" in name or "select" in name for name in kernels)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(device="cuda"),
        ExportOptions(device="cuda", dtype="bf16", decode=True),
        ExportOptions(device="cuda", table="int8"),
    ],
)
def test_a_package_for_a_gpu_computes_what_eager_does(tmp_path, options):
    """The export refuses to end otherwise."""
    manifest = export_model(build(CONFIG), "aoti", tmp_path / "out", options=options)
    assert manifest.versions["gpu"].startswith("sm_")
    assert load_artifact(tmp_path / "out").manifest == manifest
