"""Capture of a model as one graph with flat inputs and outputs, for prefill and decode alike.

Shapes: B batch, S new tokens, P cached tokens, A attention heads, X head dim, D hidden size, W convolution width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule

from ultramem.config import ModelConfig
from ultramem.export.options import DTYPES
from ultramem.export.signature import input_names, output_names
from ultramem.graph.passes import PassResult, fold_constants, remove_no_ops
from ultramem.graph.transformer import Cache, Transformer

MODEL_PREFIX = "model."


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRecord:
    """What one pass did."""

    name: str
    nodes_before: int
    nodes_after: int
    constant_bytes_before: int
    constant_bytes_after: int
    """Weights, buffers and constants of the graph, each storage once."""
    graph: str = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A captured model, the names of its inputs and outputs in order, and the passes that it went through."""

    exported: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    passes: tuple[PassRecord, ...] = ()


class FlatModel(nn.Module):
    """The decoder as a function from tensors to tensors, in the order of `input_names` and `output_names`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BS: Tensor, attention_mask_BP: Tensor, position_ids_BS: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        output = self.model(
            input_ids_BS,
            attention_mask=attention_mask_BP,
            position_ids=position_ids_BS,
            cache=unflatten_cache(state, self.model.config.num_layers),
        )
        # Native code reads its inputs as if contiguous, and these come back as inputs.
        return output.logits, *(tensor.contiguous() for tensor in flatten_cache(output.cache))


def flatten_cache(cache: Cache) -> tuple[Tensor, ...]:
    """Key 0, value 0, key 1, ..., then the convolutions."""
    pairs = zip(cache.keys, cache.values, strict=True)
    return *(tensor for pair in pairs for tensor in pair), *cache.convs


def unflatten_cache(state: tuple[Tensor, ...], num_layers: int) -> Cache:
    pairs = state[: 2 * num_layers]
    return Cache(pairs[0::2], pairs[1::2], state[2 * num_layers :])


def capture(model: Transformer, *, batch: int | None = None, seq: int | None = None) -> Program:
    """Capture `model` with any number >= 0 of cached tokens, weights shared.

    Args:
        model: in eval mode, its parameters of one dtype, on one device.
        batch: fixed batch; None: any >= 1.
        seq: fixed number of new tokens; None: any >= 1.

    Raises:
        ValueError: the model is in training mode, on several devices, or of a dtype that is not exported.
    """
    if model.training:
        raise ValueError("the model must be in eval mode to be exported (call model.eval())")
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype or dtype not in DTYPES.values() or parameter.device != device:
            raise ValueError(
                f"the model must be on one device, in one of {', '.join(DTYPES)}, to be exported, "
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            )
    batches = {} if batch else {0: Dim("batch", min=1)}
    news = {} if seq else {1: Dim("seq", min=1)}
    past = Dim("past", min=0)
    total = past + seq if seq else Dim.AUTO  # a sum of two free sizes has no name
    layers, convs = model.config.num_layers, model.config.num_convs
    states = ({**batches, 2: past},) * (2 * layers) + (batches,) * convs
    shapes = ({**batches, **news}, {**batches, 1: total}, {**batches, **news}, states)
    # Sizes that are all different and none 0 or 1, which capture would fix.
    examples = example_inputs(model, batch=batch or 2, seq=seq or 3, past=5)
    with torch.no_grad():
        exported = torch.export.export(FlatModel(model), examples, dynamic_shapes=shapes)
    return Program(exported=exported, input_names=input_names(layers, convs), output_names=output_names(layers, convs))


def example_inputs(model: Transformer, *, batch: int = 2, seq: int = 3, past: int = 5) -> tuple[Tensor, ...]:
    """Inputs of the right shapes, on the device of the model."""
    weight = model.embedding.weight
    state = tuple(
        each.new_zeros(batch, each.shape[1], past, each.shape[3]) if each.ndim == 4 else each
        for each in (tensor.clone() for tensor in empty_state(model.config, batch, weight.dtype))
    )
    ids, mask = torch.zeros(batch, seq, dtype=torch.int64), torch.ones(batch, past + seq, dtype=torch.int64)
    return tuple(each.to(weight.device) for each in flat_inputs(ids, mask, state))


def records_of(programs: Mapping[str, Program]) -> tuple[PassRecord, ...]:
    """What the passes did to each graph of an export, by the name of the graph."""
    return tuple(
        dataclasses.replace(record, graph=name) for name, program in programs.items() for record in program.passes
    )


def simplify(program: Program) -> Program:
    """The passes that every engine profits from."""
    program = apply_pass(program, remove_no_ops)
    return apply_pass(program, lambda gm: fold_constants(gm, weights(program.exported)), name="fold_constants")


def apply_pass(program: Program, rewrite: Callable[[GraphModule], PassResult], name: str | None = None) -> Program:
    """Run a pass over the graph, keep its signature in step, and record what it did."""

    def whole(exported: ExportedProgram) -> ExportedProgram:
        result = rewrite(exported.graph_module)
        return _with_signature(exported, result.gm) if result.modified else exported

    return apply_to_program(program, whole, name or rewrite.__name__)


def apply_to_program(
    program: Program, rewrite: Callable[[ExportedProgram], ExportedProgram], name: str | None = None
) -> Program:
    """As `apply_pass`, for a pass that rewrites graph and signature itself."""
    # A pass may change the graph in place.
    nodes, size = len(program.exported.graph.nodes), constant_bytes(program.exported)
    exported = rewrite(program.exported)
    record = PassRecord(
        name=name or rewrite.__name__,
        nodes_before=nodes,
        nodes_after=len(exported.graph.nodes),
        constant_bytes_before=size,
        constant_bytes_after=constant_bytes(exported),
    )
    return dataclasses.replace(program, exported=exported, passes=(*program.passes, record))


def weights(exported: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the name of their placeholder."""
    signature, found = exported.graph_signature, {}
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            tensors: Mapping[str, Tensor] = (
                exported.state_dict if spec.target in exported.state_dict else exported.constants
            )
            found[spec.arg.name] = tensors[spec.target]
    return found


def constant_bytes(exported: ExportedProgram) -> int:
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in weights(exported).values()}
    return sum(storage.nbytes() for storage in storages.values())


def _with_signature(exported: ExportedProgram, gm: GraphModule) -> ExportedProgram:
    """`exported` with the graph of `gm`: buffers made by passes become inputs, unread weights go."""
    specs, state = [], dict(exported.state_dict)
    placeholders = {node.name: node for node in gm.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and not placeholders[spec.arg.name].users:
            assert spec.target is not None
            gm.graph.erase_node(placeholders.pop(spec.arg.name))
            state.pop(spec.target, None)
        else:
            specs.append(spec)
    first_input = next(index for index, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    first_node = placeholders[specs[first_input].arg.name]
    made = []
    for node in [node for node in gm.graph.nodes if node.op == "get_attr"]:
        with gm.graph.inserting_before(first_node):
            placeholder = gm.graph.placeholder(f"b_{node.target}")
        placeholder.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(placeholder)
        gm.graph.erase_node(node)
        state[node.target] = gm.get_buffer(node.target)
        delattr(gm, node.target)
        made.append(
            InputSpec(InputKind.BUFFER, TensorArgument(name=placeholder.name), target=node.target, persistent=True)
        )
    gm.recompile()
    signature = dataclasses.replace(
        exported.graph_signature, input_specs=[*specs[:first_input], *made, *specs[first_input:]]
    )
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def empty_state(config: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The inputs after `position_ids` before the first token."""
    past = torch.zeros(batch, config.num_heads, 0, config.head_dim, dtype=dtype)
    conv = torch.zeros(batch, config.hidden_size, config.conv_length, dtype=dtype)
    return (past,) * (2 * config.num_layers) + (conv,) * config.num_convs


def flat_inputs(input_ids_BS: Tensor, attention_mask_BP: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All inputs of a program in order; positions count the tokens of the mask, as the model does."""
    position_ids_BP = (attention_mask_BP.cumsum(1) - 1).clamp_min(0)
    # A copy, for strides that do not tell the length of the cache: contiguous() keeps those of a single row.
    position_ids_BS = position_ids_BP[:, -input_ids_BS.shape[1] :].clone(memory_format=torch.contiguous_format)
    return input_ids_BS, attention_mask_BP, position_ids_BS, *state
