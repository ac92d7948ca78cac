"""What a model, a memory layer and a training run are made of. A default appears here and nowhere else."""

from ultramem.config.fields import FORMAT_VERSION, from_dict, to_dict
from ultramem.config.memory import MemoryConfig
from ultramem.config.model import Insertion, ModelConfig, MoEConfig, parse_insertions
from ultramem.config.parallel import ParallelConfig
from ultramem.config.train import TrainConfig

__all__ = [
    "FORMAT_VERSION",
    "Insertion",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "TrainConfig",
    "from_dict",
    "parse_insertions",
    "to_dict",
]
