"""Passes keep what a graph computes, and do what they are for."""

from dataclasses import replace

import pytest
import torch
from exported import CONFIG, MEMORY, build

from ultramem import ops
from ultramem.export.extras import quiet_exporters
from ultramem.export.program import apply_pass, capture, example_inputs, flatten_cache, simplify, weights
from ultramem.graph.passes import PassResult, fold_constants, lower_ops, remove_no_ops, split_experts


def operators(program):
    return [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]


def outputs(program, inputs):
    with torch.no_grad():
        # Capture guards against sizes below 2, which it did not see; the graph holds for them, and no engine checks.
        return program.exported.module(check_guards=False)(*inputs)


def eager(model, inputs):
    from ultramem.export.program import FlatModel

    with torch.no_grad():
        return FlatModel(model)(*inputs)


@pytest.mark.parametrize(
    "memory",
    [
        MEMORY,
        replace(MEMORY, candidates="two_tailed", expansion=1),
        replace(MEMORY, rank=1, num_cores=1, permutation="stored", qk_norm="none", conv_width=1),
    ],
    ids=["tucker", "two-tailed", "product-keys"],
)
def test_passes_keep_the_outputs_at_other_sizes_than_captured(memory):
    model = build(replace(CONFIG, memory=memory))
    program = simplify(apply_pass(simplify(capture(model)), lower_ops))
    assert not any("ultramem" in each for each in operators(program))
    for batch, seq, past in ((1, 1, 0), (3, 1, 9), (2, 7, 4)):
        inputs = list(example_inputs(model, batch=batch, seq=seq, past=past))
        inputs[0] = torch.randint(64, (batch, seq))
        inputs[3:] = [torch.randn_like(each) for each in inputs[3:]]
        # The same operators in the same order: the same bits, but for vectorised tails.
        torch.testing.assert_close(outputs(program, inputs), eager(model, inputs), rtol=1e-5, atol=1e-5)


def test_simplify_leaves_no_iteration_on_weights():
    program = simplify(capture(build(CONFIG)))
    constant = {node for node in program.exported.graph.nodes if node.name in weights(program.exported)}
    for node in program.exported.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and constant.issuperset(node.all_input_nodes):
            assert "select" in str(node.target), f"{node} depends on weights alone"
            constant.add(node)
    assert not {"aten.detach.default", "aten.dropout.default", "aten._assert_tensor_metadata.default"} & set(
        operators(program)
    )
    records = [(record.name, record.nodes_before > record.nodes_after) for record in program.passes]
    assert records == [("remove_no_ops", True), ("fold_constants", True)]


def test_folding_drops_weights_that_nothing_reads():
    model = build(CONFIG)
    state = simplify(capture(model)).exported.state_dict
    assert "model.memories.0.score.keys_H2RNK" not in state
    keys = model.memories[0].score.keys_H2RNK.numel()
    total = sum(tensor.numel() for tensor in state.values())
    small = 2 * 2 * 2 + 8  # the singular pair and the rotary frequencies
    norm = 8
    assert total == sum(parameter.numel() for parameter in model.parameters()) + small - norm
    assert sum(tensor.numel() for name, tensor in state.items() if "folded" in name) == keys + small


class Scaled(torch.nn.Module):
    """A large value from a small weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1, 64))

    def forward(self, x):
        return x @ (self.weight.expand(64, 64) * 2)


@pytest.mark.parametrize(("small_bytes", "folded"), [(64 * 64 * 4, True), (64 * 64 * 4 - 1, False)])
def test_folding_keeps_what_would_grow(small_bytes, folded):
    exported = torch.export.export(Scaled(), (torch.randn(3, 64),))
    result = fold_constants(exported.graph_module, weights(exported), small_bytes=small_bytes)
    assert isinstance(result, PassResult)
    assert result.modified is folded
    assert [node.op for node in result.gm.graph.nodes].count("get_attr") == folded


class Experts(torch.nn.Module):
    """One-neuron experts, as PEER has them."""

    def forward(self, down, up, indices, x):
        return ops.lookup_reduce(up, indices, ops.lookup_dot(down, indices, x).relu().unsqueeze(-1))


def test_one_neuron_experts_are_inlined_for_any_token_count():
    def draw(tokens):
        return torch.randn(9, 8), torch.randn(9, 8), torch.randint(9, (tokens, 3)), torch.randn(tokens, 8)

    tokens = torch.export.Dim("tokens", min=1)
    exported = torch.export.export(Experts(), draw(4), dynamic_shapes=(None, None, {0: tokens}, {0: tokens}))
    assert "ultramem.lookup_dot" in str(exported.graph)
    graph_module = lower_ops(exported.graph_module).gm
    assert "ultramem" not in str(graph_module.graph)
    inputs = draw(7)
    torch.testing.assert_close(graph_module(*inputs)[0], Experts()(*inputs))


class Grouped(torch.nn.Module):
    """Products of a mixture of experts."""

    def forward(self, inputs, weights, ends):
        return ops.grouped_mm(inputs, weights, ends).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_split_for_any_number_of_rows(dtype):
    def draw(*ends):
        return torch.randn(ends[-1], 8, dtype=dtype), weights, torch.tensor(ends, dtype=torch.int32)

    weights = torch.randn(3, 8, 16, dtype=dtype)
    tokens = torch.export.Dim("tokens", min=1)
    exported = torch.export.export(Grouped(), draw(2, 3, 7), dynamic_shapes=({0: tokens}, None, None))
    assert "ultramem.grouped_mm" in str(exported.graph)
    with quiet_exporters():
        split = split_experts(exported)
    assert "ultramem" not in str(split.graph)
    for ends in ((0, 0, 1), (1, 1, 1), (4, 9, 9), (0, 5, 6)):
        inputs = draw(*ends)
        torch.testing.assert_close(split.module(check_guards=False)(*inputs), Grouped()(*inputs))


def test_a_program_without_experts_is_not_traced_again():
    exported = torch.export.export(Scaled(), (torch.randn(3, 64),))
    assert split_experts(exported) is exported


def test_equal_constants_have_one_name():
    """So graphs of one model can share them, and a layer's constant that equals another's is kept once."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (x + self.weight.exp()) * self.weight.exp()

    programs = [torch.export.export(Twice(), (torch.randn(rows, 4),)) for rows in (2, 3)]
    with torch.no_grad():
        for each in programs:
            each.state_dict["weight"].copy_(torch.arange(4.0))
    names = [
        [
            node.target
            for node in fold_constants(each.graph_module, weights(each)).gm.graph.nodes
            if node.op == "get_attr"
        ]
        for each in programs
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 1
    assert names[0][0].startswith("folded_")


@pytest.mark.parametrize("rewrite", [remove_no_ops, lower_ops])
def test_a_graph_with_nothing_to_do_stays(rewrite):
    exported = torch.export.export(Scaled(), (torch.randn(3, 64),))
    before = str(exported.graph)
    result = rewrite(exported.graph_module)
    assert not result.modified
    assert str(result.gm.graph) == before


def test_capture_refuses_what_would_export_something_else():
    with pytest.raises(ValueError, match="eval mode"):
        capture(build(CONFIG).train())
    with pytest.raises(ValueError, match=r"in one of fp32, fp16, bf16.*embedding\.weight is float64"):
        capture(build(CONFIG).double())
    mixed = build(CONFIG)
    mixed.head.bfloat16()
    with pytest.raises(ValueError, match=r"head\.weight is bfloat16 on cpu"):
        capture(mixed)


def test_cache_order_is_that_of_the_names():
    model = build(CONFIG)
    program = capture(model)
    cache = model.empty_cache(1)
    assert len(program.input_names) == 3 + len(flatten_cache(cache))
    assert program.input_names[3:6] == ("past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key")
    assert program.output_names[-2:] == ("present.1.value", "present_conv.0")
