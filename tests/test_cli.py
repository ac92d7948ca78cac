"""The command line: results as JSON, and bad input as one line that names it, exit code 2, nothing written."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ultramem.cli import main
from ultramem.device_cli import inference_device
from ultramem.export.onnx_plugin import find_plugin

QUICK = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--no-compile", "--eval-every", "0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("She was the youngest of the two daughters. " * 30)
    return str(path)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--preset", "ultramem-tiny", "--data", text, "--out", str(folder), *QUICK]) == 0
    return folder


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words):
    """Run a command that must be refused; the one line that it prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ultramem")
    return line


def test_params_json_and_table(capsys):
    assert main(["params", "ultramem-1.6b-x12", "--json"]) == 0
    result = last_json(capsys)
    assert result["total"] == result["dense"] + result["sparse"]
    assert result["bytes"]["bfloat16"] == 2 * result["total_with_embeddings"]
    assert main(["params", "ultramem-1.6b-x12"]) == 0
    assert f"{result['total']:,}" in capsys.readouterr().out


def test_train_eval_generate(run, capsys):
    assert main(["eval", str(run), "--json"]) == 0
    result = last_json(capsys)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], rel=1e-6)
    assert main(["generate", str(run), "--prompt", "She", "--max-new-tokens", "5", "--json"]) == 0
    generated = last_json(capsys)
    assert len(generated["tokens"]) <= 5
    words = ["generate", str(run), "--prompt", "She", "--max-new-tokens", "5", "--json", "--mmap"]
    assert main(words) == 0
    assert last_json(capsys)["tokens"] == generated["tokens"]
    assert main(["generate", str(run), "--prompt", "She", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("She" + generated["text"])

    words = ["generate", str(run), "--prompt", "She", "--max-new-tokens", "5", "--json", "--engine", "onnx"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["tokens"] == generated["tokens"]
    assert f"onnx: the kernels of {find_plugin().file.name}" in captured.err.splitlines()


def test_an_export_records_what_rounding_costs(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["export", str(run), "--to", "onnx", "--out", str(out), "--table", "int8", "--decode", "--json"]
    assert main(words) == 0
    manifest = last_json(capsys)
    assert manifest == json.loads((out / "manifest.json").read_text())
    chosen = {name: value for name, value in manifest["options"].items() if value is not None}
    assert chosen == {"dtype": "fp32", "table": "int8", "decode": True, "device": "cpu"}
    rounding = manifest["parity"]["rounding"]
    assert rounding["bits_per_byte"] != rounding["bits_per_byte_rounded"]
    assert rounding["bits_per_byte"] == pytest.approx(rounding["bits_per_byte_rounded"], abs=0.01)
    assert manifest["parity"]["greedy_equal"] == manifest["parity"]["greedy_tokens"]


def test_report(run, tmp_path, capsys):
    out = tmp_path / "new/page.html"
    assert main(["report", str(run), str(run), "--out", str(out), "--json"]) == 0
    assert last_json(capsys) == {"out": str(out), "runs": [str(run), str(run)]}
    assert out.read_text().startswith("<!doctype html>")


def test_export_to_hugging_face_carries_the_runs_tokens_and_figures(run, tmp_path, capsys):
    from transformers import AutoTokenizer

    out = tmp_path / "export"
    assert main(["export", str(run), "--to", "huggingface", "--out", str(out), "--json"]) == 0
    parity = last_json(capsys)["parity"]
    assert parity["max_error"] <= parity["allowed"]
    assert parity["greedy_equal"] == parity["greedy_tokens"]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    card = (out / "README.md").read_text()
    assert f"| held-out text | {row['bits_per_byte']:.4f} | {row['eval_loss']:.4f} |" in card
    assert "2 steps of 2 sequences of 16 tokens (64 tokens)" in card
    assert AutoTokenizer.from_pretrained(out)("She")["input_ids"] == [256, *b"She"]


def test_sampling_follows_its_seed(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        words = ["--prompt", "She", "--max-new-tokens", "12", "--temperature", "1", "--top-p", "0.9"]
        assert main(["generate", str(run), *words, "--seed", str(seed), "--json"]) == 0
        texts.append(last_json(capsys)["tokens"])
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_come_out_in_their_order_as_each_alone(run, capsys):
    prompts, alone = ("She", "The two daughters", "x"), []
    for prompt in prompts:
        assert main(["generate", str(run), "--prompt", prompt, "--max-new-tokens", "9", "--json"]) == 0
        (completion,) = last_json(capsys)["completions"]
        assert completion["finish_reason"] == "length"
        alone.append(completion)
    words = ["generate", str(run), *(f"--prompt={each}" for each in prompts), "--max-new-tokens", "9"]
    assert main([*words, "--max-batch", "2", "--json"]) == 0
    result = last_json(capsys)
    assert result["completions"] == alone
    assert {name: result[name] for name in alone[0]} == alone[0]
    assert main(words) == 0
    assert capsys.readouterr().out == "\n\n".join(each["prompt"] + each["text"] for each in alone) + "\n"


def test_a_stop_text_ends_a_continuation(run, capsys):
    words = ["generate", str(run), "--prompt", "She", "--max-new-tokens", "9", "--json"]
    assert main(words) == 0
    text = last_json(capsys)["text"]
    assert main([*words, "--stop", text[4:6]]) == 0
    result = last_json(capsys)
    assert result["finish_reason"] == "stop"
    assert result["text"] == text[: text.index(text[4:6])]


def test_toml_options_with_flags_on_top(text, tmp_path, capsys):
    toml = tmp_path / "options.toml"
    toml.write_text("steps = 1\nbatch_size = 3\nlr = 1\ncompile = false\nsequence_length = 8\n")
    out = tmp_path / "run"
    words = ["--preset", "dense-tiny", "--data", text, "--out", str(out), "--config", str(toml), "--batch-size", "2"]
    assert main(["train", *words]) == 0
    train = json.loads((out / "config.json").read_text())["train"]
    assert (train["steps"], train["batch_size"], train["lr"]) == (1, 2, 1.0)


TRAIN = ["train", "--preset", "dense-tiny", "--data", "austen"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["params", "gpt-5"], "preset must be one of dense-151m, "),
        (["train", "--preset", "dense-tny", "--data", "austen"], "did you mean dense-tiny?"),
        (["train", "--preset", "dense-tiny", "--data", "missing.txt"], "got 'missing.txt'"),
        ([*TRAIN, "--steps", "0"], "steps must be at least 1, got 0"),
        (
            ["train", "--preset", "dense-tiny", "--data", "austen", "--steps", "many"],
            "--steps: invalid int value: 'many'",
        ),
        ([*TRAIN, "--lr", "-1"], "lr must be a positive number, got -1"),
        (
            ["train", "--preset", "dense-tiny", "--data", "austen", "--lr", "nan"],
            "lr must be a positive number, got nan",
        ),
        ([*TRAIN, "--precision", "fp8"], "invalid choice: 'fp8'"),
        ([*TRAIN, "--device", "tpu"], "device must be auto, cpu, cuda"),
        ([*TRAIN, "--device", "cuda:99"], "got 'cuda:99'"),
        ([*TRAIN, "--sequence-length", "3000000"], "at least sequence_"),
        ([*TRAIN, "--config", "no.toml"], "no.toml"),
        (["train", "--data", "austen"], "preset must be given"),
        (["train", "--preset", "dense-tiny"], "data must be given"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = ["--out", "run"] if words[:1] == ["train"] else []
    assert said in refused(capsys, *words, *extra)
    assert list(tmp_path.iterdir()) == []


def test_auto_is_a_gpu_where_all_that_is_asked_for_runs_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    models, exports = ["eager", "compile"], ["eager", "onnx"]
    assert inference_device("auto", models) == "cuda"
    assert inference_device("auto", models, mmap=True, pinned_tables=True) == "cuda"
    assert inference_device("cuda:0", models, pinned_tables=True) == "cuda:0"
    assert inference_device("cpu", models) == "cpu"
    for engines, options, said in (
        (exports, {}, "device must be auto or cpu for engine 'onnx', which runs an export, got 'cuda'"),
        (models, {"mmap": True}, "device must be auto or cpu for mapped weights"),
        (models, {"ranks": 2}, "device must be auto or cpu where 2 ranks share a model, got 'cuda'"),
    ):
        assert inference_device("auto", engines, **options) == "cpu"
        with pytest.raises(ValueError, match=said):
            inference_device("cuda", engines, **options)
    for options in ({"ranks": 2}, {}):
        with pytest.raises(ValueError, match="pinned_tables needs a model on a GPU"):
            inference_device("auto" if options else "cpu", models, pinned_tables=True, **options)


def test_bad_toml_is_named(text, tmp_path, capsys):
    toml = tmp_path / "options.toml"
    base = ["train", "--preset", "dense-tiny", "--data", text, "--out", tmp_path / "run", "--config", toml]
    for content, said in [
        ("stepps = 3", "unknown field 'stepps'"),
        ("steps = 'three'", "steps must be of type int, got 'three'"),
        ("steps = ", "not valid TOML"),
    ]:
        toml.write_text(content)
        assert said in refused(capsys, *base)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(run, text, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    base = ["train", "--preset", "ultramem-tiny", "--data", text, "--out", run, *QUICK]
    assert "continue it with --resume" in refused(capsys, *base)
    assert "train.steps must be 2" in refused(capsys, *base, "--resume", "--steps", "3")
    other = ["dense-tiny" if word == "ultramem-tiny" else word for word in base]
    assert "model.inner_size must be 768" in refused(capsys, *other, "--resume")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_corrupt_checkpoint_is_one_line(run, text, tmp_path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (tensors,) = (copy / "checkpoints").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-7])
    base = ["train", "--preset", "ultramem-tiny", "--data", text, "--out", copy, *QUICK, "--resume"]
    assert "is damaged" in refused(capsys, *base)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["report", "RUN", "nowhere", "--out", "x.html"], "nowhere is not a run folder"),
        (["report", "RUN", "--out", "."], "out: . is a folder"),
        (["eval", "RUN", "--sequence-length", "0"], "sequence_length must be in 1..4096, got 0"),
        (["eval", "RUN", "--data", "nothing.txt"], "nothing.txt"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not a run folder"),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "5000"], "must fit 4096 positions"),
        (["generate", "RUN", "--prompt", "x", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "RUN", "--prompt", "x", "--top-p", "0"], "top_p must be in (0, 1]"),
        (["generate", "RUN", "--prompt", "x", "--engine", "magic"], "invalid choice: 'magic'"),
        (["generate", "RUN", "--prompt", "x", "--stop", ""], "stop must be texts of at least one character"),
        (["generate", "RUN", "--prompt", "x", "--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (
            ["generate", "RUN", "--prompt", "x", "--max-cache-bytes", "9"],
            "must fit max_cache_bytes 9, got 202 tokens of",
        ),
        (["export", "nowhere", "--to", "onnx", "--out", "x"], "nowhere is not a run folder"),
        (["export", "RUN", "--to", "flash", "--out", "x"], "invalid choice: 'flash'"),
        (["export", "RUN", "--to", "onnx", "--out", "RUN"], "exists"),
        (["export", "RUN", "--to", "onnx", "--out", "x", "--dtype", "fp8"], "dtype must be one of fp32, fp16, bf16"),
        (["export", "RUN", "--to", "onnx", "--out", "x", "--dtype", "bf16"], "fp32, fp16 for onnx, got 'bf16' (stock"),
        (["export", "RUN", "--to", "onnx", "--out", "x", "--table", "int2"], "table must be one of int8, int4 or None"),
        (["export", "RUN", "--to", "onnx", "--out", "x", "--static", "4"], "static must be B,S, two numbers"),
        (["export", "RUN", "--to", "onnx", "--out", "x", "--static", "1,4", "--decode"], "static must have S = 1"),
        (
            ["export", "RUN", "--to", "onnx", "--out", "x", "--profiled"],
            "profiled is for aoti, whose kernels",
        ),
        (["profile", "nowhere", "--out", "x"], "target must be a run folder or one of dense-151m"),
        (
            ["generate", "RUN", "--prompt", "x", "--device", "tpu"],
            "device must be auto, cpu, cuda or cuda:N, got 'tpu'",
        ),
        (["generate", "RUN", "--prompt", "x", "--pinned-tables", "--mmap"], "pinned_tables needs a model on a GPU"),
        (["profile", "ultramem-tiny", "--device", "cuda:99", "--out", "x"], "CUDA devices here, got 'cuda:99'"),
        (["profile", "ultramem-tiny", "--pinned-tables", "--out", "x"], "pinned_tables needs a model on a GPU"),
        (["profile", "ultramem-tiny", "--mmap", "--out", "x"], "mmap maps the weights of a run folder"),
        (["profile", "RUN", "--engine", "eager,warp", "--out", "x"], "engine must be of eager, compile, onnx, aoti"),
        (["profile", "RUN", "--batch", "1,zero", "--out", "x"], "batch must be numbers of at least 1"),
    ],
)
def test_bad_input_about_a_run(words, said, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *[str(run) if word == "RUN" else word for word in words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["", "params", "train", "report", "eval", "generate", "export", "profile"])
def test_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: ultramem {command}".rstrip())


def test_a_reader_that_leaves_early_gets_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ultramem", "params", "ultramem-tiny"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ultramem", "params", "nope"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
