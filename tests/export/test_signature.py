"""Calls that an engine would answer with somebody else's memory are refused first."""

import pytest
from exported import CONFIG, build

from ultramem.export import ExportOptions, load_artifact
from ultramem.export.program import example_inputs
from ultramem.export.signature import check_inputs, tensor_specs


def changed(index, change):
    inputs = list(example_inputs(build(CONFIG)))
    inputs[index] = change(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (changed(0, lambda x: x + 64), r"input_ids must be tokens in 0\.\.63, got 64"),
        (changed(0, lambda x: x - 1), r"input_ids must be tokens in 0\.\.63, got -1"),
        (changed(0, lambda x: x.int()), "input_ids must be a int64 tensor, got int32"),
        (changed(0, lambda x: x[0]), r"input_ids must have shape \[batch, seq\], got \(3,\)"),
        (changed(0, lambda x: x[:, :0]), "attention_mask must have shape|position_ids must have shape"),
        (changed(1, lambda x: x[:, 1:]), r"attention_mask must have shape \[batch, past \+ seq\] with batch 2, seq 3"),
        (changed(3, lambda x: x[:1]), r"past_key_values.0.key must have shape \[batch, 2, past, 16\] with batch 2"),
        (changed(4, lambda x: x[:, :, 1:]), r"past_key_values.0.value must have shape"),
        (changed(4, lambda x: x.half()), "past_key_values.0.value must be a float32 tensor, got float16"),
        (changed(3, lambda x: x.numpy()), "past_key_values.0.key must be a float32 tensor, got ndarray"),
        (changed(7, lambda x: x[:, :, 1:]), r"past_conv.0 must have shape \[batch, 32, 3\]"),
        (changed(0, lambda x: x)[:-1], r"the model takes 8 inputs \(input_ids, .*, past_conv.0\), got 7"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(onnx_folder, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        load_artifact(onnx_folder)(inputs)
    assert "\n" not in str(error.value)


def test_fixed_sizes_are_kept_to():
    specs, _ = tensor_specs(CONFIG, ExportOptions(static=(2, 3)), seq=3)
    check_inputs(specs, example_inputs(build(CONFIG)), 64)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[2, 3\]"):
        check_inputs(specs, example_inputs(build(CONFIG), batch=1), 64)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, past \+ 3\] with past 5, got \(2, 7\)"):
        check_inputs(specs, changed(1, lambda x: x[:, 1:]), 64)


def test_a_call_without_tokens_is_refused():
    specs, _ = tensor_specs(CONFIG, ExportOptions(), seq=None)
    with pytest.raises(ValueError, match="input_ids must hold at least one token"):
        check_inputs(specs, example_inputs(build(CONFIG), batch=0), 64)
