"""Engines that run the module itself: eager PyTorch and torch.compile.

Shapes: B batch, S tokens of a prompt, P columns of the cache in use, C columns that there is room for.
"""

from __future__ import annotations

import types
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ultramem.export.program import FlatModel, empty_state
from ultramem.graph.fold_for_inference import fold_for_inference
from ultramem.graph.side_stream import SideStream
from ultramem.graph.static_cache import StaticCache
from ultramem.graph.transformer import Transformer
from ultramem.runtime.decode_replay import ReplayedRooms
from ultramem.runtime.engine_cache import EngineCache, Room, fill, make_buffers
from ultramem.runtime.engine_interface import Engine

GROWTH = 256
"""Columns by which a compiled engine's cache grows: a copy of all of it every so many tokens."""


GPU_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"online_softmax": False}
"""Of Inductor, for a decode step: over columns whose number it does not know it has no online softmax, and warns."""


class _ModelEngine(Engine):
    """Runs the module itself, its constants folded, on its own device and in its own dtype; the cache stays there."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model.config)
        if model.training:
            raise ValueError("the model must be in eval mode to be run by an engine (call model.eval())")
        self.model = FlatModel(fold_for_inference(model, coarse_keys=None))
        self.weight = model.embedding.weight
        self._packs = self.weight.device.type != "cpu"

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        tokens, state = self._on_device(inputs[:3]), inputs[3:]
        state = [tensor.to(self.weight.device, self.weight.dtype) for tensor in state]
        logits, *new_state = self._call(*tokens, *state)
        return logits.cpu(), *new_state

    def _on_device(self, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        """int64 tensors from the CPU."""
        return unpack(pack(tokens).to(self.weight.device), [each.shape for each in tokens]) if self._packs else tokens

    @abstractmethod
    def _call(self, *inputs: Tensor) -> Sequence[Tensor]: ...


class EagerEngine(_ModelEngine):
    """The model as it stands.

    Args:
        model: in eval mode.
        beside: memory layers run beside the layers that they skip, on a stream of their own. For GPUs.

    Raises:
        ValueError: the model is in training mode, or `beside` is asked for on a CPU.
    """

    name = "eager"

    def __init__(self, model: Transformer, *, beside: bool = False) -> None:
        super().__init__(model)
        device = self.weight.device
        if beside and device.type == "cpu":
            raise ValueError("beside must be False on a CPU, which has no streams, got True")
        if beside:
            self.model.model.side_stream = SideStream.of(device)

    def _call(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.model(*inputs)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class CompiledEngine(_ModelEngine):
    """torch.compile, one graph for prefill and one for decoding, for one sequence and for several.

    Prompt and cache lengths are free. The compiler makes a constant of a length of 0 or 1, so prefill takes no cache,
    and a prompt of one token gets a padding token in front, which also makes its cache long enough. A decode step
    writes its token into a cache that has room for it, which prefill made, instead of copying it to a longer one.

    Args:
        model: in eval mode.
        replay: decode steps are recorded as CUDA graphs and replayed, one launch in the place of as many as there are
            kernels. A step looks at all the columns that there is room for, and buffers of the last few sizes stay
            allocated. None: on a GPU.

    Raises:
        ValueError: the model is in training mode, or `replay` is asked for on a CPU.
    """

    name = "compile"

    def __init__(self, model: Transformer, *, replay: bool | None = None) -> None:
        super().__init__(model)
        device = self.weight.device
        if replay is None:
            replay = device.type != "cpu"
        if replay and device.type == "cpu":
            raise ValueError("replay must be False on a CPU, which records no graphs, got True")
        self._rooms = ReplayedRooms(torch.get_device_module(device)) if replay else None
        self._num_keys = 2 * model.config.num_layers
        self._traced: set[bool] = set()
        empty = empty_state(model.config, 1, self.weight.dtype)
        flat, transformer, num_keys = self.model, self.model.model, self._num_keys

        def prefill(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            state = (each.to(ids.device).expand(ids.shape[0], *each.shape[1:]) for each in empty)
            return flat.forward(ids, mask, positions, *state)

        def decode(
            ids: Tensor, mask: Tensor, positions: Tensor, column_1: Tensor, *state: Tensor
        ) -> tuple[Tensor, ...]:
            pairs = state[:num_keys]
            cache = StaticCache(pairs[0::2], pairs[1::2], state[num_keys:], column_1, mask.shape[1])
            logits, convs = transformer.decode_in_place(ids, mask, positions, cache)
            return logits, *(each.contiguous() for each in convs)

        self._prefill_graph: Callable[..., tuple[Tensor, ...]] = torch.compile(_with_own_code(prefill), fullgraph=True)
        self._decode_graph: Callable[..., tuple[Tensor, ...]] = torch.compile(
            _with_own_code(decode), fullgraph=True, options=None if device.type == "cpu" else GPU_OPTIONS
        )

    def plain_steps(self) -> AbstractContextManager[None]:
        """In here decode steps launch kernel after kernel, as they were recorded: so they can be told apart."""
        return nullcontext() if self._rooms is None else self._rooms.plain_steps()

    def _prefill(self, input_ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, EngineCache]:
        hidden = 1 if input_ids_BS.shape[1] == 1 else 0
        if hidden:
            input_ids_BS = torch.nn.functional.pad(input_ids_BS, (1, 0))
            mask_BS = torch.nn.functional.pad(mask_BS, (1, 0))
        logits_BSV, cache = super()._prefill(input_ids_BS, mask_BS)
        return logits_BSV[:, hidden:], self._with_room(cache._replace(hidden=hidden))

    def _call(self, *inputs: Tensor) -> Sequence[Tensor]:
        ids, mask, positions = (_own_copy(tensor) for tensor in inputs[:3])
        for tensor in (ids, mask, positions):
            _mark(tensor, 1)
        return self._prefill_graph(ids, mask, positions)

    def _decode(self, input_ids_B1: Tensor, mask_BP: Tensor, cache: EngineCache) -> tuple[Tensor, EngineCache]:
        column = mask_BP.shape[1] - 1
        if cache.room is None or cache.room.capacity <= column + 1:  # never full: lengths that are equal are a graph
            cache = self._with_room(cache)
        room = cache.room
        assert room is not None
        if len(room.writers) < column or room.writers[column - 1] is not cache.writer:
            raise ValueError(
                "cache was overwritten: an earlier cache of the same sequences has been decoded from since"
            )
        positions_B1 = (mask_BP.sum(1, keepdim=True) - 1).clamp_min(0)
        # A recorded step looks at all columns: those that are not in use are like padding.
        unused = 0 if self._rooms is None else room.capacity - mask_BP.shape[1]
        seen_BP = torch.nn.functional.pad(mask_BP, (0, unused)) if unused else mask_BP
        tokens = [_own_copy(input_ids_B1), seen_BP, positions_B1, torch.tensor([column])]
        convs = cache.state[self._num_keys :]
        del room.writers[column:]
        logits_B1V, *new_convs = self._step(room, tokens, convs)
        writer = object()
        room.writers.append(writer)
        return logits_B1V.cpu(), EngineCache(mask_BP, (*room.buffers, *new_convs), cache.hidden, room, writer)

    def _step(self, room: Room, tokens: Sequence[Tensor], convs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Logits [B,1,V] and new inputs of the convolutions, of tokens, mask, positions and column on the CPU."""
        graph, traced, buffers = self._decode_graph, self._traced, room.buffers
        if self._rooms is None:
            return _run_step(graph, traced, self._on_device(tokens), buffers, convs)
        shapes = [each.shape for each in tokens]

        # The recording keeps its step, which keeps neither the engine nor the room.
        def step(packed: Tensor, *convs: Tensor) -> Sequence[Tensor]:
            return _run_step(graph, traced, unpack(packed, shapes), buffers, convs)

        return self._rooms.step(step, room, [pack(tokens), *convs])

    def _with_room(self, cache: EngineCache) -> EngineCache:
        """The same tokens, with room for up to `GROWTH` more."""
        columns = cache.num_columns
        capacity = (columns // GROWTH + 1) * GROWTH + 1
        keys_and_values = cache.state[: self._num_keys]
        if self._rooms is None:
            room = Room(make_buffers(keys_and_values, capacity), columns)
            fill(room.buffers, keys_and_values, columns)
        else:
            room = self._rooms.make(keys_and_values, columns, capacity)
        convs = (each.contiguous() for each in cache.state[self._num_keys :])  # strides are guarded
        return EngineCache(cache.mask_BP, (*room.buffers, *convs), cache.hidden, room)


def _run_step(
    graph: Callable[..., tuple[Tensor, ...]],
    traced: set[bool],
    tokens: Sequence[Tensor],
    buffers: Sequence[Tensor],
    convs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Logits [B,1,V] and new inputs of the convolutions.

    Args:
        graph: compiled at its first call for one sequence, and for several.
        traced: for which of both (False, True) it has been called.
        tokens: new ones, mask, positions and column.
        buffers: of keys and values, which are written to.
        convs: last inputs of the convolutions.
    """
    ids, mask, positions, column = tokens
    several = ids.shape[0] > 1
    if several not in traced:  # what is marked is for the compiler alone, and takes time
        traced.add(several)
        for tensor in (ids, positions, *convs):
            _mark(tensor, None)
        for tensor, axis in ((mask, 1), *((buffer, 2) for buffer in buffers)):
            _mark(tensor, axis)
    return graph(ids, mask, positions, column, *buffers, *convs)


def _own_copy(tensor: Tensor) -> Tensor:
    """A copy with strides of its own: the compiler guards them, and those of a slice of one sequence may be any."""
    return tensor.clone(memory_format=torch.contiguous_format)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """int64 tensors as one, so that a device gets them by one copy; each begins at a multiple of 16 bytes.

    Compiled code counts on that, and would copy what begins elsewhere.
    """
    flat = [each.reshape(-1) for each in tensors]
    return torch.cat([part for each in flat for part in (each, each.new_zeros(each.numel() % 2))])


def unpack(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of these shapes in what `pack` made, which they share."""
    found, start = [], 0
    for shape in shapes:
        size = shape.numel()
        found.append(packed[start : start + size].view(shape))
        start += size + size % 2
    return found


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
