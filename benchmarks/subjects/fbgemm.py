"""FBGEMM's table-batched embeddings, where they are installed, over tables that others hold too."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contender import UnavailableError

DISTRIBUTIONS = ("fbgemm-gpu", "fbgemm-gpu-cpu")


def require_fbgemm() -> str:
    """Name and version of the installed distribution, with its ops loaded.

    Raises:
        UnavailableError: there is none, or it was built for another PyTorch.
    """
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        logging.disable(logging.ERROR)  # it logs its table of compatible releases
        try:
            import fbgemm_gpu  # noqa: F401  # registers its ops
        except OSError as error:
            raise UnavailableError(f"{name} {version} does not load with torch {torch.__version__}: {error}") from error
        finally:
            logging.disable(logging.NOTSET)
        return f"{name} {version}"
    raise UnavailableError("FBGEMM is not installed (pip install 'ultramem[bench]')")


def batched_embedding(table_ND: Tensor) -> Any:
    """A module that pools bags of `table_ND`: `module(rows, offsets, per_sample_weights=...)`."""
    require_fbgemm()
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode

    precisions = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16, torch.bfloat16: SparseType.BF16}
    on_gpu = table_ND.is_cuda
    location = training.EmbeddingLocation.DEVICE if on_gpu else training.EmbeddingLocation.HOST
    device = training.ComputeDevice.CUDA if on_gpu else training.ComputeDevice.CPU
    n, d = table_ND.shape
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(n, d, location, device)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,  # the one that CPU builds have
        pooling_mode=PoolingMode.SUM,
        weights_precision=precisions[table_ND.dtype],
        output_dtype=precisions[table_ND.dtype],
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    weights = module.weights_dev if on_gpu else module.weights_host
    weights.data = table_ND.view(-1)
    return module


def quantised_embedding(table_ND: Tensor, *, bits: int) -> Any:
    """A module that pools bags of `table_ND` in int8 or int4, each row with a half-precision scale and offset."""
    require_fbgemm()
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    n, d = table_ND.shape
    location = EmbeddingLocation.DEVICE if table_ND.is_cuda else EmbeddingLocation.HOST
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("values", n, d, SparseType.INT8 if bits == 8 else SparseType.INT4, location)],
        output_dtype=SparseType.FP32,
        device=table_ND.device,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    module.fill_random_weights()  # allocates
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(table_ND.cpu(), bits)
    columns = d * bits // 8
    ((weights, scale_shift),) = module.split_embedding_weights()
    weights.copy_(fused[:, :columns])
    scale_shift.copy_(fused[:, columns:])
    return module
