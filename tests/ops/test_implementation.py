"""Which implementation AUTO picks."""

from unittest import mock

import pytest
import torch

from ultramem.ops import Implementation, use_implementation
from ultramem.ops.implementation import runs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8])
def test_auto_runs_triton_on_cuda(dtype):
    pytest.importorskip("triton")
    assert runs_triton(mock.Mock(is_cuda=True, dtype=dtype))
    assert not runs_triton(mock.Mock(is_cuda=False, dtype=dtype))


def test_auto_leaves_float64_to_pytorch():
    tensor = mock.Mock(is_cuda=True, dtype=torch.float64)
    assert not runs_triton(tensor)
    with use_implementation(Implementation.TRITON):
        assert runs_triton(tensor)  # forced: the kernels say that they do not take it
