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
from ultramem.graph.passes import PassResult, fold_constants, remove_no_ops
from ultramem.graph.transformer import Cache, Transformer

MODEL_PREFIX = "model."


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRecord:
    """What one pass did."""

    name: str
    nodes_before: int
    nodes_after: int


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


def input_names(num_layers: int, num_convs: int) -> tuple[str, ...]:
    """The names that Optimum made common; `past_conv.{j}` for the query convolution of memory layer j."""
    return (
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{i}.{side}" for i in range(num_layers) for side in ("key", "value")),
        *(f"past_conv.{j}" for j in range(num_convs)),
    )


def output_names(num_layers: int, num_convs: int) -> tuple[str, ...]:
    return (
        "logits",
        *(f"present.{i}.{side}" for i in range(num_layers) for side in ("key", "value")),
        *(f"present_conv.{j}" for j in range(num_convs)),
    )


def capture(model: Transformer) -> Program:
    """Capture `model` with any batch >= 1, new tokens >= 1 and cached tokens >= 0, weights shared.

    Raises:
        ValueError: the model is in training mode, not in float32 on the CPU, or a mixture of experts.
    """
    if model.config.moe is not None:
        raise ValueError(
            "a mixture of experts cannot be exported: no engine has its grouped products; use eager or compile"
        )
    if model.training:
        raise ValueError("the model must be in eval mode to be exported (call model.eval())")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"the model must be float32 on the CPU to be exported, "
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            )
    batch, seq, past = Dim("batch", min=1), Dim("seq", min=1), Dim("past", min=0)
    layers, convs = model.config.num_layers, model.config.num_convs
    states = ({0: batch, 2: past},) * (2 * layers) + ({0: batch},) * convs
    shapes = ({0: batch, 1: seq}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: seq}, states)
    with torch.no_grad():
        exported = torch.export.export(FlatModel(model), example_inputs(model), dynamic_shapes=shapes)
    return Program(exported=exported, input_names=input_names(layers, convs), output_names=output_names(layers, convs))


def example_inputs(model: Transformer, *, batch: int = 2, seq: int = 3, past: int = 5) -> tuple[Tensor, ...]:
    """Inputs of the right shapes. The default sizes are all different and none is 0 or 1, which capture would fix."""
    state = tuple(
        each.new_zeros(batch, each.shape[1], past, each.shape[3]) if each.ndim == 4 else each
        for each in (tensor.clone() for tensor in empty_state(model.config, batch))
    )
    return flat_inputs(
        torch.zeros(batch, seq, dtype=torch.int64), torch.ones(batch, past + seq, dtype=torch.int64), state
    )


def simplify(program: Program) -> Program:
    """The passes that every engine profits from."""
    program = apply_pass(program, remove_no_ops)
    return apply_pass(program, lambda gm: fold_constants(gm, weights(program.exported)), name="fold_constants")


def apply_pass(program: Program, rewrite: Callable[[GraphModule], PassResult], name: str | None = None) -> Program:
    """Run a pass over the graph, keep its signature in step, and record node counts."""
    exported = program.exported
    before = len(exported.graph.nodes)
    result = rewrite(exported.graph_module)
    if result.modified:
        exported = _with_signature(exported, result.gm)
    record = PassRecord(name=name or rewrite.__name__, nodes_before=before, nodes_after=len(exported.graph.nodes))
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
