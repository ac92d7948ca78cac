"""One interface to a model, whatever runs it: eager PyTorch, torch.compile, ONNX Runtime, AOTInductor
or TensorRT.

Shapes: B batch, S tokens of a prompt, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

import os
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export import load_artifact
from ultramem.export.onnx_session import OnnxModel
from ultramem.export.program import FlatModel, empty_state, flat_inputs
from ultramem.export.tensorrt_run import TensorrtModel
from ultramem.graph.fold_for_inference import fold_for_inference
from ultramem.graph.transformer import Transformer

ENGINES = ("eager", "compile", "onnx", "aoti", "tensorrt")


class EngineCache(NamedTuple):
    """What an engine keeps between calls; nothing outside engines looks inside."""

    mask_BP: Tensor
    state: tuple[Tensor, ...]
    hidden: int
    """Padding that the engine itself put in front of the caller's tokens."""


class Engine(ABC):
    """Runs a model without gradients; tokens, masks and logits are on the CPU."""

    name: str
    state_dtype = torch.float32
    """Of the empty cache."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def prefill(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> tuple[Tensor, EngineCache]:
        """Logits [B,S,V] of a prompt, and the cache to decode from.

        Args:
            input_ids_BS: int64 tokens, S at least 1.
            attention_mask_BS: 1 for tokens, 0 for padding; None: no padding.

        Raises:
            ValueError: a shape or dtype is not that, or a token is not in the vocabulary.
        """
        _check_tokens(input_ids_BS, self.config.vocab_size)
        if attention_mask_BS is None:
            attention_mask_BS = torch.ones_like(input_ids_BS)
        _check_mask(attention_mask_BS, tuple(input_ids_BS.shape))
        with torch.inference_mode():
            return self._prefill(input_ids_BS, attention_mask_BS.long())

    def decode(
        self, input_ids_B1: Tensor, cache: EngineCache, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, EngineCache]:
        """Logits [B,1,V] of one more token per sequence, and the cache with it; the cache that was passed stays valid.

        Args:
            input_ids_B1: int64 tokens.
            cache: of an earlier call.
            attention_mask: [B,P+1] in place of the mask so far; None: the new token is no padding.

        Raises:
            ValueError: a shape or dtype is not that, or a token is not in the vocabulary.
        """
        batch, length = cache.mask_BP.shape
        _check_tokens(input_ids_B1, self.config.vocab_size)
        if input_ids_B1.shape != (batch, 1):
            raise ValueError(
                f"input_ids must have shape {(batch, 1)}, a token per sequence, got {tuple(input_ids_B1.shape)}"
            )
        if attention_mask is None:
            mask_BP = torch.cat([cache.mask_BP, cache.mask_BP.new_ones(batch, 1)], 1)
        else:
            _check_mask(attention_mask, (batch, length + 1 - cache.hidden))
            mask_BP = torch.cat([cache.mask_BP[:, : cache.hidden], attention_mask.long()], 1)
        with torch.inference_mode():
            return self._decode(input_ids_B1, mask_BP, cache)

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        inputs = flat_inputs(input_ids_BS, mask_BS, empty_state(self.config, input_ids_BS.shape[0], self.state_dtype))
        logits_BSV, *state = self._run(inputs)
        return logits_BSV, EngineCache(mask_BS, tuple(state), 0)

    def _decode(self, input_ids_B1: Tensor, mask_BP: Tensor, cache: EngineCache) -> tuple[Tensor, EngineCache]:
        logits_B1V, *state = self._run(flat_inputs(input_ids_B1, mask_BP, cache.state))
        return logits_B1V, EngineCache(mask_BP, tuple(state), cache.hidden)

    @abstractmethod
    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The program of `ultramem.export`: flat inputs to flat outputs."""


class _ModelEngine(Engine):
    """Runs the module itself, its constants folded, on its own device and in its own dtype; the cache stays there."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model.config)
        if model.training:
            raise ValueError("the model must be in eval mode to be run by an engine (call model.eval())")
        self.model = FlatModel(fold_for_inference(model, coarse_keys=None))
        self.weight = model.embedding.weight

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        ids, mask, positions, *state = (tensor.to(self.weight.device) for tensor in inputs)
        logits, *new_state = self._call(ids, mask, positions, *(tensor.to(self.weight.dtype) for tensor in state))
        return logits.cpu(), *new_state

    @abstractmethod
    def _call(self, *inputs: Tensor) -> Sequence[Tensor]: ...


class EagerEngine(_ModelEngine):
    """The model as it stands."""

    name = "eager"

    def _call(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.model(*inputs)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class CompiledEngine(_ModelEngine):
    """torch.compile, one graph for prefill and one for decoding, for one sequence and for several.

    Prompt and cache lengths are free. The compiler makes a constant of a length of 0 or 1, so prefill takes no cache,
    and a prompt of one token gets a padding token in front, which also makes its cache long enough.
    """

    name = "compile"

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        num_state = len(empty_state(model.config, 1))
        num_keys = 2 * model.config.num_layers
        empty = empty_state(model.config, 1, self.weight.dtype)
        flat = self.model

        def prefill(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            state = (each.to(ids.device).expand(ids.shape[0], *each.shape[1:]) for each in empty)
            return flat.forward(ids, mask, positions, *state)

        def decode(*inputs: Tensor) -> tuple[Tensor, ...]:
            return flat.forward(*inputs)

        self._prefill_graph: Callable[..., tuple[Tensor, ...]] = torch.compile(_with_own_code(prefill), fullgraph=True)
        self._decode_graph: Callable[..., tuple[Tensor, ...]] = torch.compile(_with_own_code(decode), fullgraph=True)
        self._length_axes = (None, 1, None, *(2,) * num_keys, *(None,) * (num_state - num_keys))

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        hidden = 1 if input_ids_BS.shape[1] == 1 else 0
        if hidden:
            input_ids_BS = torch.nn.functional.pad(input_ids_BS, (1, 0))
            mask_BS = torch.nn.functional.pad(mask_BS, (1, 0))
        logits_BSV, cache = super()._prefill(input_ids_BS, mask_BS)
        return logits_BSV[:, hidden:], cache._replace(hidden=hidden)

    def _call(self, *inputs: Tensor) -> Sequence[Tensor]:
        if inputs[3].shape[2] == 0:
            ids, mask, positions = (tensor.clone() for tensor in inputs[:3])
            for tensor in (ids, mask, positions):
                _mark(tensor, 1)
            return self._prefill_graph(ids, mask, positions)
        inputs = tuple(tensor.contiguous() for tensor in inputs)  # strides are guarded; prefill returns its own
        for tensor, axis in zip(inputs, self._length_axes, strict=True):
            _mark(tensor, axis)
        return self._decode_graph(*inputs)


def _mark(tensor: Tensor, length_axis: int | None) -> None:
    from torch._dynamo import mark_dynamic  # slow to import, and only this engine needs it

    if tensor.shape[0] > 1:
        mark_dynamic(tensor, 0)
    if length_axis is not None:
        mark_dynamic(tensor, length_axis)


def _with_own_code(function: types.FunctionType | Callable[..., Any]) -> Callable[..., Any]:
    """A copy that the compiler counts by itself: it limits graphs per code object, which closures share."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


class _ArtifactEngine(Engine):
    """Runs an export folder on the CPU; its cache is of the export's type, logits are float32."""

    def __init__(self, folder: str | os.PathLike[str], *, plugin: bool | None = None) -> None:
        self.artifact = load_artifact(folder, engine=self.name, plugin=plugin)
        super().__init__(self.artifact.manifest.model)
        self.state_dtype = self.artifact.manifest.options.torch_dtype
        self.folder = self.artifact.folder

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        logits, *state = self.artifact.run(inputs)
        return logits.float(), *state

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        """A graph of a fixed number of tokens takes the prompt in as many calls."""
        size = self.artifact.manifest.inputs[0].shape[1]
        if isinstance(size, str) or size == input_ids_BS.shape[1]:
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


def _check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be an int64 tensor, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape [B,S] with at least one token, got {tuple(input_ids.shape)}")
    least, most = (int(each) for each in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"input_ids must be tokens in 0..{vocab_size - 1}, got {least if least < 0 else most}")


def _check_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask must have shape {tuple(shape)}, got {tuple(attention_mask.shape)}")
