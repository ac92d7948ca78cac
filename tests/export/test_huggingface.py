"""The Hugging Face folder, loaded where `ultramem` is not: the same logits, tokens by every way of generating."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import CONFIG, DENSE, MEMORY, build, once
from families import as_pkm

from ultramem import MoEConfig
from ultramem.export import ExportOptions, export_model
from ultramem.export.huggingface import CODE_FILES
from ultramem.export.huggingface.names import hugging_face_state
from ultramem.export.rounding import rounded
from ultramem.export.run_facts import RunFacts
from ultramem.graph.gathered_table import in_precision
from ultramem.runtime.hugging_face_tokenizer import train_bpe
from ultramem.runtime.tokenizer import ByteTokenizer

PKM = as_pkm(MEMORY)
BOTH = {"insertions": "1:1/2:2", "replace_mlp": True}
MODELS = {
    "dense": DENSE,
    "moe": replace(DENSE, moe=MoEConfig(num_experts=5)),
    "pkm": replace(CONFIG, memory=PKM),
    "pkm-biases": replace(
        CONFIG, memory=replace(PKM, expansion=4, output="project", project_bias=True, permutation="computed", knum=9)
    ),
    "memory-plus": replace(CONFIG, memory=replace(PKM, table="shared", output="gated", init="memory_plus"), **BOTH),
    "peer": replace(CONFIG, memory=replace(PKM, expert_dim=32, qk_norm="layer"), **BOTH),
    "ultramem": replace(CONFIG, insertions="1:1/1:2"),
    "ultramem-stored": replace(
        CONFIG, memory=replace(MEMORY, permutation="stored", qk_norm="rms", qk_norm_eps=1e-6, candidate_ratio=1.7)
    ),
    "ultramem-split": replace(
        CONFIG,
        memory=replace(
            MEMORY, rank=3, rank_layout="split", key_dim=12, shared_query=False, expansion=9, candidates="two_tailed"
        ),
    ),
    "ultramem-v2": replace(
        CONFIG,
        memory=replace(
            MEMORY, expert_dim=8, expert_project=True, table="windows", table_layers=2, window_share=0.5, conv_width=2
        ),
        insertions="1:1/2:2",
    ),
    "ultramem-v2-linear": replace(
        CONFIG,
        memory=replace(
            MEMORY, expert_dim=8, expert_project=True, expert_activation="none", table="windows", table_layers=2
        ),
        insertions="1:1/2:2",
    ),
}
OPTIONS = {
    "ultramem-int8": ExportOptions(table="int8"),
    "ultramem-int4": ExportOptions(table="int4"),
    "ultramem-v2-int8": ExportOptions(table="int8"),
    "memory-plus-int4": ExportOptions(table="int4"),
}
MODELS |= {name: MODELS[name.rpartition("-")[0]] for name in OPTIONS}
PREFILLS = (1, 7, 128)
BATCHES = (1, 3)
DECODED = 32
TEXTS = ["It is a truth", "naïve café, 中文 \U0001f600", " <|endoftext|>\n\ttwo  spaces ", ""]
CORPUS = b"It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 20


def tokenizers():
    return {"bytes": ByteTokenizer(), "bpe": train_bpe([CORPUS], 300)}


def facts(tokenizer):
    document = tokenizer.to_dict().get("tokenizer")
    return RunFacts(
        name="a-run", tokenizer=document, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size
    )


def exported(name):
    """The model whose weights stand in the export."""
    return rounded(build(MODELS[name]), OPTIONS.get(name, ExportOptions()))


def make_inputs():
    """Tokens and masks: every prefill at every batch, rows after the first left-padded."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for batch in BATCHES:
        for prefill in PREFILLS:
            tokens = torch.randint(1, 64, (batch, prefill + DECODED), generator=generator)
            mask = torch.ones_like(tokens)
            for row in range(1, batch):
                mask[row, : min(prefill - 1, 2 * row)] = 0
            steps.append((tokens, mask, prefill))
    prompts = torch.randint(1, 64, (3, 9), generator=generator)
    mask = torch.ones_like(prompts)
    mask[1, :2], mask[2, :5] = 0, 0
    return {"steps": steps, "prompts": (prompts, mask), "models": [*MODELS], "tokenizers": [*tokenizers()]}


def paths_without_ultramem():
    """Where packages are installed, less the folders that hold this one."""
    return [path for path in sys.path if path and not (Path(path) / "ultramem").exists() and "tests" not in path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "huggingface"
    with once(tmp_path_factory, "huggingface"):
        if not (folder / "outputs.pt").exists():
            folder.mkdir()
            for name, config in MODELS.items():
                export_model(build(config), "huggingface", folder / name, options=OPTIONS.get(name))
            for name, tokenizer in tokenizers().items():
                model = build(replace(DENSE, vocab_size=tokenizer.vocab_size))
                export_model(model, "huggingface", folder / name, run=facts(tokenizer))
            torch.save(make_inputs(), folder / "inputs.pt")
            (folder / "texts.json").write_text(json.dumps(TEXTS))
            probe = str(Path(__file__).with_name("huggingface_probe.py"))
            environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-I", "-S", probe, str(folder), *paths_without_ultramem()]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def found(folder, name):
    return torch.load(folder / "outputs.pt")[name]


@torch.no_grad()
def decoded(model, tokens, mask, prefill):
    output = model(tokens[:, :prefill], attention_mask=mask[:, :prefill])
    pieces = [output.logits]
    for end in range(prefill + 1, tokens.shape[1] + 1):
        output = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], cache=output.cache)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


def test_prefill_and_decoding_agree_with_eager(found, name):
    model, exact = exported(name), in_precision(exported(name), torch.float64)
    for logits, (tokens, mask, prefill) in zip(found["steps"], make_inputs()["steps"], strict=True):
        real = mask.bool()
        expected = decoded(model, tokens, mask, prefill)[real]
        allowed = 4 * (expected - decoded(exact, tokens, mask, prefill)[real]).abs().max().item()
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()  # that of padding too
        assert (logits[real] - expected).abs().max().item() <= allowed
        assert torch.equal(logits[real].argmax(-1), expected.argmax(-1))


def test_the_code_is_the_folders_own_and_the_weights_are_ours(found, folder, name):
    from safetensors.torch import load_file

    assert found["module"].startswith("transformers_modules.")
    assert found["same_weights"]
    saved, ours = load_file(folder / name / "model.safetensors"), hugging_face_state(exported(name))
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[key], ours[key]) and saved[key].dtype == ours[key].dtype for key in saved)


def test_without_a_cache_and_saved_again(found):
    tokens, mask, _ = make_inputs()["steps"][-1]
    real = mask.bool()
    torch.testing.assert_close(found["whole"][real], found["steps"][-1][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["chunks"][real], found["whole"][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["base"][real], found["hidden_states"][-1][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["eager_attention"][real], found["whole"][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["last"], found["whole"][:, -2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["again"][real], found["whole"][real], rtol=1e-4, atol=1e-5)
    assert {"config.json", "model.safetensors", *CODE_FILES} <= set(found["again_files"])
    assert found["attentions"][0].shape == (*tokens.shape[:1], 2, tokens.shape[1], tokens.shape[1])


def test_loss_and_hidden_states(found, name):
    tokens, _, _ = make_inputs()["steps"][-1]
    with torch.no_grad():
        logits = exported(name)(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(found["loss"], expected)
    assert len(found["hidden_states"]) == MODELS[name].num_layers + 1


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_generation_with_a_cache_and_without_gives_the_same_tokens(found, way):
    cached, uncached = found["generated"][way]
    assert cached.shape == (3, 8)
    assert torch.equal(cached, uncached)


def test_assisted_decoding_takes_tokens_back_without_a_trace(found):
    plain, assisted = found["generated"]["assisted"]
    assert torch.equal(plain, assisted)


def test_greedy_tokens_are_eagers(found, name):
    prompts, mask = make_inputs()["prompts"]
    model = exported(name)
    tokens = prompts
    for _ in range(8):
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert torch.equal(found["generated"]["greedy"][0], tokens[:, 9:])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_auto_tokenizer_gives_the_runs_tokens(folder, kind):
    found, tokenizer = torch.load(folder / "outputs.pt")[kind], tokenizers()[kind]
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert found["bare"] == expected
    assert found["ids"] == [[tokenizer.end_of_text, *ids] for ids in expected]
    assert found["texts"] == TEXTS
    lengths = torch.tensor([len(ids) for ids in found["ids"]])
    places = torch.arange(lengths.max())
    assert torch.equal(found["padding"].bool(), places >= (lengths.max() - lengths).unsqueeze(1))  # on the left
    assert found["special"] == found["generation"] == (tokenizer.end_of_text,) * 3
    assert found["max_length"] == 4096
