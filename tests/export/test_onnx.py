"""The ONNX file itself: names, nodes, bodies, stages."""

import ast
import subprocess
import sys
import textwrap

import onnx
import onnxruntime
import pytest
import torch
from exported import CONFIG, build

from ultramem.export import stage_of_node, stages_of_optimized_model
from ultramem.export.onnx import export_onnx, load_onnx
from ultramem.export.onnx_stages import stage_of_module
from ultramem.export.program import capture, example_inputs


@pytest.fixture(scope="module")
def model(onnx_folder):
    return onnx.load(onnx_folder / "model.onnx")


def test_names_and_sizes_are_those_of_the_contract(model):
    def shape(value):
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    inputs = {value.name: shape(value) for value in model.graph.input}
    outputs = {value.name: shape(value) for value in model.graph.output}
    cached = ["batch", 2, "past", 16]
    assert inputs == {
        "input_ids": ["batch", "seq"],
        "attention_mask": ["batch", "past + seq"],
        "position_ids": ["batch", "seq"],
        **{f"past_key_values.{i}.{side}": cached for i in (0, 1) for side in ("key", "value")},
        "past_conv.0": ["batch", 32, 3],
    }
    present = ["batch", 2, "past + seq", 16]
    assert outputs == {
        "logits": ["batch", "seq", 64],
        **{f"present.{i}.{side}": present for i in (0, 1) for side in ("key", "value")},
        "present_conv.0": ["batch", 32, 3],
    }


def test_nodes_of_the_package_carry_attributes_and_bodies(model):
    nodes = {node.op_type: node for node in model.graph.node if node.domain == "ultramem"}
    assert set(nodes) == {"TuckerTopK", "PermuteAddresses", "LookupReduce"}
    assert {function.name for function in model.functions} == set(nodes)
    attributes = {
        name: {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for name, node in nodes.items()
    }
    for each in attributes.values():
        assert each["plugin_namespace"] == b"ultramem"
        assert each["plugin_version"] == b"1"
    assert attributes["LookupReduce"]["num_blocks"] == 4
    assert attributes["TuckerTopK"]["k"] == 4
    assert attributes["TuckerTopK"]["candidates"] == b"one_tailed"
    assert attributes["PermuteAddresses"]["size"] == 256
    versions = {each.domain: each.version for each in model.opset_import}
    assert versions["ultramem"] == 1
    for function in model.functions:
        assert {each.domain: each.version for each in function.opset_import} == {"": versions[""]}


def test_the_file_passes_the_checker_and_shape_inference(model):
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_weights_are_folded_and_no_path_of_the_exporting_machine_is_told(model, onnx_folder):
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Sqrt", "Atan", "ReduceMax", "ReduceSum", "ArgMax"}
    assert b".py" not in (onnx_folder / "model.onnx").read_bytes()


def test_every_node_names_its_stage(model):
    stages = {stage_of_node(node.name) for node in model.graph.node}
    memory = {f"memories.0.{stage}" for stage in ("query", "score", "select", "lookup", "expand")}
    blocks = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")}
    assert stages == memory | blocks | {"embedding", "norm", "head", "model"}
    for node in model.graph.node:
        scopes = {each.key: each.value for each in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        if scopes:
            # A table is called by the lookup that it belongs to.
            module = next(each for each in ast.literal_eval(scopes)[-2::-1] if not each.endswith("table"))
            assert stage_of_module(module) == stage_of_node(node.name)


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("model.memories.12.query.proj", "memories.12.query"),
        ("model.memories.0", "memories.0.expand"),
        ("model.blocks.3.mlp_norm", "blocks.3.mlp"),
        ("model.blocks.3.attention.qkv", "blocks.3.attention"),
        ("model.norm", "norm"),
        ("model.head", "head"),
        ("model", "model"),
        ("", "model"),
    ],
)
def test_stage_of_module(path, stage):
    assert stage_of_module(path) == stage


def test_stages_survive_the_runtimes_own_rewrites(tmp_path):
    """Two memory layers: nodes out of function bodies belong to the right one."""
    from dataclasses import replace

    export_onnx(capture(build(replace(CONFIG, insertions="1:1/2:2"))), tmp_path, candidates="one_tailed")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    stages = stages_of_optimized_model(tmp_path / "optimized.onnx")
    counts = {stage: list(stages.values()).count(stage) for stage in set(stages.values())}
    for layer in (0, 1):
        assert counts[f"memories.{layer}.select"] > 20
        assert counts[f"memories.{layer}.lookup"] > 50
    # Layers are alike but for a few nodes that both share.
    assert abs(counts["memories.0.select"] - counts["memories.1.select"]) <= 4
    assert abs(counts["memories.0.lookup"] - counts["memories.1.lookup"]) <= 4
    assert counts["model"] < 50


def test_large_weights_go_to_a_file_of_their_own(tmp_path):
    model = build(CONFIG)
    export_onnx(capture(model), tmp_path, candidates="one_tailed", external_bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    inputs = example_inputs(model)
    with torch.no_grad():
        expected = model(
            inputs[0],
            attention_mask=inputs[1],
            cache=model.empty_cache(2)._replace(keys=inputs[3:7:2], values=inputs[4:7:2]),
        ).logits
    torch.testing.assert_close(load_onnx(tmp_path)(inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_missing_library_is_named_with_its_extra():
    code = """
        import sys
        sys.modules["onnxruntime"] = None
        from ultramem.export.onnx import load_onnx
        try:
            load_onnx(None)
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "onnxruntime is not installed (pip install ultramem[onnx])"


def test_the_table_belongs_to_the_lookup(onnx_folder):
    nodes = onnx.load(onnx_folder / "model.onnx", load_external_data=False).graph.node
    assert [stage_of_node(node.name) for node in nodes if node.op_type == "LookupReduce"] == ["memories.0.lookup"]
