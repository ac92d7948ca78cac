"""Checks at the public edge of the ops: each names the argument, what it was and what is accepted."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(name: str, value: object, *, ndim: int, shape: str) -> None:
    """Raise unless `value` is a tensor of rank `ndim`; `shape` says which axes are meant."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have rank {ndim} {shape}, got shape {tuple(value.shape)}")


def require_floating(name: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have a dtype of {accepted}, got {value.dtype}")


def require_int64(name: str, value: torch.Tensor) -> None:
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}")


def require_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], rule: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({rule}), got {tuple(value.shape)}")


def require_same_device(**tensors: torch.Tensor) -> None:
    (first_name, first), *others = tensors.items()
    device = first.device
    for name, tensor in others:
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first_name} ({device}), got {tensor.device}")


def require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def require_same_dtype(**tensors: torch.Tensor) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name} ({first.dtype}), got {tensor.dtype}")


def require_scores(values_ND: torch.Tensor, scores_TKC: torch.Tensor) -> None:
    """Raise unless scores of a lookup have a dtype and a number of cores that suit the table."""
    if scores_TKC.dtype not in (values_ND.dtype, torch.float32):
        raise TypeError(
            f"scores_TKC must have dtype torch.float32 or that of values_ND ({values_ND.dtype}), got {scores_TKC.dtype}"
        )
    d, c = values_ND.shape[1], scores_TKC.shape[-1]
    if c < 1 or d % c:
        raise ValueError(f"scores_TKC must have a number of cores that divides the value dim {d}, got {c}")


def require_in_range(name: str, value: torch.Tensor, size: int) -> None:
    """Read `value` on the host; raise unless every element is in [0, size)."""
    outside = value[(value < 0) | (value >= size)]
    if outside.numel():
        raise ValueError(f"{name} must be in [0, {size}), got {outside[0].item()} ({outside.numel()} out of range)")
