"""Launches read out of Inductor's wrapper code."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.launches import launches_of_code, summary  # it needs Triton

CODE = """
async_compile.triton('triton_poi_fused_add_0', '''skipped_kernel.run(''')
def call(self, args):
    # Topologically Sorted Source Nodes: [mm], Original ATen: [aten.mm]
    triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=raw_stream0)
    extern_kernels.mm(buf0, arg1_1, out=buf1)
    buf2 = torch.ops.aten.sort.stable(buf1, stable=True)
    buf3 = torch.ops.ultramem.lookup_reduce_backward.default(buf2, True)
    assert_size_stride(buf3, (4, 4), (4, 1), 'torch.ops.ultramem.lookup_reduce_backward.default')
    lookup_reduce_kernel_3.run(arg2_1, buf3, 8, stream=raw_stream0)
    return (buf3, )
"""


def test_every_launch_is_found_once() -> None:
    names = launches_of_code(CODE, {"lookup_reduce_backward": ["aten sort", "row_gradient_kernel"]})
    assert names == [
        "triton_poi_fused_add", "gemm mm", "aten sort", "aten sort", "row_gradient_kernel", "lookup_reduce_kernel"
    ]  # fmt: skip
    row = summary("layer", "train backward", names)
    assert (row.launches, row.ours, row.gemm, row.fused, row.aten) == (6, 2, 1, 1, 2)
