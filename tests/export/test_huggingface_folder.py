"""The Hugging Face folder on disk: its card says what the run says, damage is refused, loading runs no foreign code."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build
from safetensors.torch import load_file

import ultramem
from ultramem.export import ExportOptions, export_model, load_artifact
from ultramem.export.huggingface import CODE_FILES
from ultramem.export.huggingface.card import family, model_card
from ultramem.export.huggingface.names import TRAINING_FIELDS, hugging_face_state
from ultramem.export.program import empty_state, flat_inputs
from ultramem.export.rounding import rounded
from ultramem.export.run_facts import RunFacts

TRAIN = {
    "steps": 1200, "batch_size": 4, "sequence_length": 256, "lr": 0.002, "value_lr_ratio": 10.0, "weight_decay": 0.1,
    "seed": 3,
}  # fmt: skip
EVALUATION = {
    "step": 1200, "split": "held_out", "eval_loss": 1.75821, "bits_per_byte": 2.53656, "perplexity": 5.8021,
    "tokens": 65536, "text_bytes": 65536,
}  # fmt: skip
FACTS = RunFacts(
    name="my-run",
    tokenizer=None,
    end_of_text=256,
    vocab_size=257,
    config={
        "train": TRAIN,
        "data": {"name": "austen", "sha256": "ab12"},
        "environment": {"ultramem": "0.1.0", "torch": "2.13.0", "python": "3.11.9", "device": "cpu"},
    },
    evaluations={"held_out": EVALUATION},
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface") / "export"
    manifest = export_model(build(replace(CONFIG, vocab_size=257)), "huggingface", folder, run=FACTS)
    return folder, manifest


def test_the_folder_and_its_manifest(exported):
    folder, manifest = exported
    texts = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    written = {"model.safetensors", *texts, *CODE_FILES}
    assert set(manifest.files) == written
    assert {path.name for path in folder.iterdir()} == {*written, "manifest.json"}
    assert manifest.parity.max_error <= manifest.parity.allowed
    assert manifest.parity.greedy_equal == manifest.parity.greedy_tokens
    assert "transformers" in manifest.versions
    assert not list(folder.glob("*.bin"))


def test_the_manifests_inputs_run(exported):
    folder, manifest = exported
    artifact = load_artifact(folder, engine="huggingface")
    tokens = torch.tensor([[5, 200]])
    inputs = flat_inputs(tokens, torch.ones_like(tokens), empty_state(artifact.manifest.model, 1))
    outputs = artifact(inputs)
    assert len(inputs) == len(manifest.inputs)
    assert len(outputs) == len(manifest.outputs)
    with torch.no_grad():
        expected = build(artifact.manifest.model)(tokens)
    torch.testing.assert_close(outputs[0], expected.logits)
    torch.testing.assert_close(outputs[-1], expected.cache.convs[-1])


def test_the_card_says_what_the_run_says(exported):
    folder, _ = exported
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# my-run" in card
    assert "| held-out text | 2.5366 | 1.7582 | 5.802 | 65,536 | 1,200 |" in card
    assert "1,200 steps of 4 sequences of 256 tokens (1,228,800 tokens), peak learning rate 0.002" in card
    assert "Text: `austen`, sha256 `ab12`." in card
    assert f"{ultramem.count(replace(CONFIG, vocab_size=257)).total_with_embeddings:,} parameters" in card
    assert "(UltraMem)" in card


def test_a_card_does_not_pass_off_figures_of_other_weights():
    plain = model_card(CONFIG, FACTS)
    rounded_card = model_card(CONFIG, FACTS, ExportOptions(dtype="bf16", table="int8"))
    assert "Rounded" not in plain
    assert "Of the float32 weights" not in plain
    assert "weights in bf16, rows of the tables in int8 with a float32 scale each" in rounded_card
    assert "Of the float32 weights; `parity.rounding` in `manifest.json` says what rounding cost." in rounded_card


def test_a_card_invents_nothing():
    bare = model_card(DENSE, None)
    assert "## Figures" not in bare
    assert "## Training" not in bare
    assert "no tokenizer" in bare
    empty = model_card(DENSE, RunFacts(name="x", tokenizer=None, end_of_text=256, vocab_size=257))
    assert "holds no evaluation" in empty
    assert "does not say how it was trained" in empty


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("dense-tiny", "dense transformer"),
        ("moe-tiny", "mixture of experts"),
        ("pkm-tiny", "product-key memory"),
        ("memory-plus-tiny", "Memory+"),
        ("peer-tiny", "PEER"),
        ("ultramem-tiny", "UltraMem"),
        ("ultramem-v2-tiny", "UltraMemV2"),
    ],
)
def test_families_by_name(preset, name):
    assert family(ultramem.preset(preset)) == name


def test_the_copied_configuration_has_every_field_that_a_forward_pass_reads():
    from ultramem.export.huggingface.configuration_ultramem import MemoryLayerConfig

    ours = {field.name for field in fields(ultramem.MemoryConfig)} - set(TRAINING_FIELDS)
    assert {field.name for field in fields(MemoryLayerConfig)} == ours | {"table_bits"}


@pytest.mark.parametrize("name", ultramem.presets())
def test_derived_sizes_are_those_of_the_presets(name):
    from ultramem.export.huggingface.configuration_ultramem import UltraMemConfig
    from ultramem.export.huggingface.names import hugging_face_fields

    config = ultramem.preset(name)
    copied = UltraMemConfig(**json.loads(json.dumps(hugging_face_fields(config))))
    assert copied.head_dim == config.head_dim
    assert sum(length > 0 for length in copied.conv_lengths) == len(
        {each.source for each in config.parsed_insertions if config.conv_length}
    )
    if config.memory is not None:
        for size in ("table_rows", "side", "num_values", "grid_side", "num_candidates", "rank_key_dim"):
            assert getattr(copied.memory_layer, size) == getattr(config.memory, size), size


@pytest.mark.parametrize("size", [1, 2, 10, 4 * 9**2, 4 * 158**2, 12345])
def test_the_copied_permutation_is_ours(size):
    from ultramem.export.huggingface.memory_ultramem import permute_addresses

    addresses = torch.arange(size)
    assert torch.equal(permute_addresses(addresses, size, 7), ultramem.ops.permute_addresses(addresses, size, 7))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def poison(folder):
    """Foreign code, with a manifest that agrees with it."""
    path = folder / "modeling_ultramem.py"
    path.write_text("raise SystemExit('foreign code has run')\n")
    from ultramem.export.manifest import file_record

    document = json.loads((folder / "manifest.json").read_text())
    record = file_record(path)
    document["files"]["modeling_ultramem.py"] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes, the manifest says"),
        (lambda folder: (folder / "cache_ultramem.py").unlink(), "cache_ultramem.py is missing"),
        (lambda folder: (folder / "config.json").write_text("{}"), "bytes, the manifest says"),
        (poison, "modeling_ultramem.py is not this version's"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(exported, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        load_artifact(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("table", [None, "int8"])
def test_half_precision(tmp_path, dtype, table):
    memory = replace(MEMORY, permutation="stored", expert_dim=8, expert_project=True)
    model, options = build(replace(CONFIG, memory=memory)), ExportOptions(dtype=dtype, table=table)
    parity = export_model(model, "huggingface", tmp_path / "out", options=options).parity
    assert parity.max_error <= parity.allowed
    assert parity.mean_error <= parity.allowed_mean
    document = json.loads((tmp_path / "out/config.json").read_text())
    assert document["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    saved = load_file(tmp_path / "out/model.safetensors")
    expected = hugging_face_state(rounded(model, options))
    assert saved.keys() == expected.keys()
    assert all(saved[name].dtype == expected[name].dtype for name in saved)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("options", [ExportOptions(static=(1, 1)), ExportOptions(decode=True)])
def test_sizes_are_not_fixed_without_a_graph(tmp_path, options):
    with pytest.raises(ValueError, match="static and decode must be left out for huggingface, which has no graph"):
        export_model(build(DENSE), "huggingface", tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_than_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be the 257 of the run's tokenizer, got 64"):
        export_model(build(CONFIG), "huggingface", tmp_path / "out", run=FACTS)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_would_lose_inputs_is_refused(exported):
    from transformers import DynamicCache

    from ultramem.export.huggingface.modeling_ultramem import UltraMemForCausalLM

    model = UltraMemForCausalLM.from_pretrained(exported[0])
    with pytest.raises(TypeError, match=r"cache must be an UltraMemCache.*got DynamicCache"):
        model(torch.tensor([[1, 2]]), cache=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation must be None or 'dynamic' for this model, got 'static'"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache_implementation="static")


def test_the_cache_follows_its_batch_and_takes_back_what_it_recorded():
    from ultramem.export.huggingface.cache_ultramem import UltraMemCacheLayer

    def filled(record):
        layer = UltraMemCacheLayer(conv_length=3)
        if record:
            layer.activate_past_recording()
        states, inputs = torch.randn(2, 1, 5, 4), torch.randn(2, 5, 6)
        layer.update(states, states)
        assert torch.equal(layer.update_inputs(inputs)[:, 3:], inputs)
        return layer, inputs

    layer, inputs = filled(record=False)
    assert torch.equal(layer.inputs_BSD, inputs[:, -3:])
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    layer.batch_select_indices(torch.tensor([0, 1]))
    assert torch.equal(layer.inputs_BSD, inputs[[1, 0], -3:])
    assert layer.keys.shape == (2, 1, 5, 4)
    with pytest.raises(RuntimeError, match=r"crop\(-1\) needs inputs that are gone"):
        layer.crop(-1)
    assert layer.get_seq_length() == 5
    layer.reset()
    assert layer.inputs_BSD is None

    layer, inputs = filled(record=True)
    layer.crop(-4)
    assert layer.get_seq_length() == 1
    assert torch.equal(layer.inputs_BSD, torch.cat([torch.zeros(2, 2, 6), inputs[:, :1]], 1))


def test_fresh_weights_of_the_copied_code_train():
    from ultramem.export.huggingface.modeling_ultramem import UltraMemConfig, UltraMemForCausalLM
    from ultramem.export.huggingface.names import hugging_face_fields

    memory = replace(MEMORY, permutation="stored", expert_dim=8, expert_project=True, project_bias=True)
    model = UltraMemForCausalLM(UltraMemConfig(**hugging_face_fields(replace(CONFIG, memory=memory))))
    assert torch.equal(model.model.memories[0].lookup.address_table.sort().values, torch.arange(4 * 64))
    tokens = torch.randint(64, (2, 12))
    model.train()(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
