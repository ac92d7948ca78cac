"""The engines: eager PyTorch, torch.compile, and exports run by ONNX Runtime, AOTInductor or TensorRT."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ultramem.export import load_artifact
from ultramem.export.onnx_session import OnnxModel
from ultramem.export.program import empty_state, flat_inputs
from ultramem.export.tensorrt_run import TensorrtModel
from ultramem.graph.transformer import Transformer
from ultramem.runtime.engine_cache import EngineCache
from ultramem.runtime.engine_interface import Engine
from ultramem.runtime.model_engine import CompiledEngine, EagerEngine

__all__ = [
    "ENGINES", "AotEngine", "CompiledEngine", "EagerEngine", "Engine", "EngineCache", "OnnxEngine", "TensorrtEngine",
    "open_engine",
]  # fmt: skip

ENGINES = ("eager", "compile", "onnx", "aoti", "tensorrt")


class _ArtifactEngine(Engine):
    """Runs an export folder on the CPU; its cache is of the export's type, logits are float32."""

    def __init__(self, folder: str | os.PathLike[str], *, plugin: bool | None = None) -> None:
        self.artifact = load_artifact(folder, engine=self.name, plugin=plugin)
        super().__init__(self.artifact.manifest.model)
        self.state_dtype = self.artifact.manifest.options.torch_dtype
        self.batch, self.new_tokens = (
            size if isinstance(size, int) else None for size in self.artifact.manifest.inputs[0].shape
        )
        self.folder = self.artifact.folder

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        logits, *state = self.artifact.run(inputs)
        return logits.float(), *state

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        """A graph of a fixed number of tokens takes the prompt in as many calls."""
        size = self.new_tokens
        if size is None or size == input_ids_BS.shape[1]:
            return super()._prefill(input_ids_BS, mask_BS)
        if input_ids_BS.shape[1] % size:
            raise ValueError(f"the export takes {size} tokens at a time, got a prompt of {input_ids_BS.shape[1]}")
        state, pieces = empty_state(self.config, input_ids_BS.shape[0], self.state_dtype), []
        for start in range(0, input_ids_BS.shape[1], size):
            end = start + size
            logits_BSV, *new = self._run(flat_inputs(input_ids_BS[:, start:end].contiguous(), mask_BS[:, :end], state))
            state = tuple(new)
            pieces.append(logits_BSV)
        return torch.cat(pieces, 1), EngineCache(mask_BS, state, 0)


class OnnxEngine(_ArtifactEngine):
    """ONNX Runtime; `plugin`: with this package's kernels, without, or (None) with them where they are built."""

    name = "onnx"

    @property
    def kernels(self) -> str:
        """What runs the nodes of this package."""
        assert isinstance(self.artifact.run, OnnxModel)
        return self.artifact.run.kernels


class AotEngine(_ArtifactEngine):
    """AOTInductor."""

    name = "aoti"


class TensorrtEngine(_ArtifactEngine):
    """TensorRT on the GPU, where the cache stays between calls."""

    name = "tensorrt"

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert isinstance(self.artifact.run, TensorrtModel)
        logits, *state = self.artifact.run.step(inputs)
        return logits.float(), *state


_ARTIFACT_ENGINES = {each.name: each for each in (OnnxEngine, AotEngine, TensorrtEngine)}


def open_engine(name: str, model: Transformer | None, artifact_folder: str | os.PathLike[str] | None) -> Engine:
    """The engine called `name`.

    Args:
        name: "eager" or "compile", which run `model`; "onnx", "aoti" or "tensorrt", which run `artifact_folder`.
        model: in eval mode.
        artifact_folder: of `ultramem.export.export_model`.

    Raises:
        ValueError: the name is unknown, what that engine runs is missing, or the export is damaged.
        FileNotFoundError: the folder is no export.
        ImportError: the libraries of that engine are missing.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name in ("eager", "compile"):
        if model is None:
            raise ValueError(f"engine {name!r} runs a model, got None")
        return EagerEngine(model) if name == "eager" else CompiledEngine(model)
    if artifact_folder is None:
        raise ValueError(f"engine {name!r} runs an export: give its folder (ultramem export --to {name})")
    return _ARTIFACT_ENGINES[name](artifact_folder)
