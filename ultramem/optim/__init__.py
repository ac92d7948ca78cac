"""Optimisers whose cost follows the rows that a step touches, and gradient clipping for sparse gradients."""

from ultramem.optim.build import build_optimizers
from ultramem.optim.clip import clip_grad_norm_
from ultramem.optim.lazy_adamw import LazyAdamW
from ultramem.optim.row_adagrad import RowAdagrad
from ultramem.optim.table_optimizer import TableOptimizer

__all__ = ["LazyAdamW", "RowAdagrad", "TableOptimizer", "build_optimizers", "clip_grad_norm_"]
