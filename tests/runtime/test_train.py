"""Training: schedules, exact resuming, what a run folder holds, and one graph per callable."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import ultramem
from ultramem.runtime.data import evaluation_batches, load_corpus, training_batch
from ultramem.runtime.evaluate import evaluate, make_summed_loss
from ultramem.runtime.run import RunFolder
from ultramem.runtime.schedule import learning_rate, value_lr_ratio
from ultramem.runtime.train import train
from ultramem.runtime.train_step import make_train_loss


class _StopAt:
    """Ends a run the hard way, as an exception between two steps."""

    def __init__(self, step):
        self.at = step

    def message(self, text):
        pass

    def step(self, row, steps):
        if row["step"] == self.at:
            raise RuntimeError("pulled the plug")

    def evaluation(self, row):
        pass


def _losses(folder):
    return [row["loss"] for row in RunFolder(folder).read_metrics() if "loss" in row]


def test_a_run_folder_holds_all_of_the_run(small_model, small_train, text, tmp_path):
    out = tmp_path / "run"
    result = train(small_model, small_train, load_corpus(text), out)
    config = json.loads((out / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["train"]["steps"] == 6
    assert config["environment"]["torch"] == torch.__version__
    rows = RunFolder(out).read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [(row["step"], row["split"]) for row in rows if "split" in row] == [
        (3, "held_out_sample"),
        (6, "held_out_sample"),
        (6, "held_out"),
    ]
    assert rows[-1]["bits_per_byte"] == result.held_out.bits_per_byte
    assert result.held_out.tokens == len(load_corpus(text).held_out[0])
    model = ultramem.load(out)
    batches = evaluation_batches(load_corpus(text).held_out, batch_size=2, sequence_length=16)
    assert evaluate(model, make_summed_loss(model, compiled=False), batches) == result.held_out


def test_training_learns(small_model, small_train, text, tmp_path):
    config = replace(small_train, steps=60, batch_size=8, eval_every=0, checkpoint_every=60, lr=5e-3)
    train(small_model, config, load_corpus(text), tmp_path / "run")
    losses = _losses(tmp_path / "run")
    assert losses[0] > 5  # about ln 257
    assert sum(losses[-5:]) / 5 < 2.5  # one sentence, again and again


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_resuming_gives_the_same_bits(small_model, small_train, text, tmp_path, stop_at):
    corpus = load_corpus(text)
    whole = train(small_model, small_train, corpus, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        train(small_model, small_train, corpus, tmp_path / "cut", progress=_StopAt(stop_at))
    resumed = train(small_model, small_train, corpus, tmp_path / "cut", resume=True)
    assert resumed.held_out == whole.held_out
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    for name in ("model.safetensors", "checkpoints/step-00000006.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_a_finished_run_changes_nothing(small_model, small_train, text, tmp_path):
    first = train(small_model, small_train, load_corpus(text), tmp_path / "run")
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    rows = [{**row, "seconds": 0} for row in RunFolder(tmp_path / "run").read_metrics()]
    again = train(small_model, small_train, load_corpus(text), tmp_path / "run", resume=True)
    assert again.held_out == first.held_out
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights
    assert [{**row, "seconds": 0} for row in RunFolder(tmp_path / "run").read_metrics()] == rows


def test_an_existing_folder_is_not_touched(small_model, small_train, text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="exists already"):
            train(small_model, small_train, load_corpus(text), out, resume=resume)
    assert [path.name for path in out.iterdir()] == ["diary.txt"]


def test_resuming_under_another_configuration_names_the_field(small_model, small_train, text, tmp_path):
    train(small_model, small_train, load_corpus(text), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.lr must be 0\.001 .* got 0\.5"):
        train(small_model, replace(small_train, lr=0.5), load_corpus(text), tmp_path / "run", resume=True)
    other = replace(small_model, inner_size=40)
    with pytest.raises(ValueError, match=r"model\.inner_size must be 48 .* got 40"):
        train(other, small_train, load_corpus(text), tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "no tensors", "bad record", "other run"])
def test_a_damaged_checkpoint_is_refused_and_kept(small_model, small_train, text, tmp_path, damage):
    out = tmp_path / "run"
    train(small_model, small_train, load_corpus(text), out)
    tensors = out / "checkpoints/step-00000006.safetensors"
    record = tensors.with_suffix(".json")
    data = bytearray(tensors.read_bytes())
    if damage == "flip a bit":
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(data[:-100])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "bad record":
        record.write_text("{")
    else:
        record.write_text(record.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"checkpoint .*(damaged|another configuration)"):
        train(small_model, small_train, load_corpus(text), out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_only_the_newest_checkpoints_are_kept_and_leftovers_go(small_model, small_train, text, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="plug"):
        train(small_model, small_train, load_corpus(text), out, progress=_StopAt(3))
    half = out / "checkpoints/.step-00000004.safetensors.99.tmp"  # what a kill in mid-write leaves
    half.write_bytes(b"half")
    unrecorded = out / "checkpoints/step-00000004.safetensors"  # what a kill between the two files leaves
    unrecorded.write_bytes(b"not yet a checkpoint")
    train(small_model, small_train, load_corpus(text), out, resume=True)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}.{kind}" for step in (4, 6) for kind in ("json", "safetensors")]
    assert unrecorded.stat().st_size > 1000


COMMAND = [
    *(sys.executable, "-m", "ultramem", "train", "--preset", "ultramem-tiny", "--data", "austen", "--no-compile"),
    *("--steps", "12", "--batch-size", "2", "--sequence-length", "24", "--checkpoint-every", "3", "--eval-every", "0"),
    *("--resume", "--json"),
]


def _bits_per_byte(out):
    return json.loads(out.splitlines()[-1])["held_out"]["bits_per_byte"]


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Emma Woodhouse, handsome, clever, and rich. " * 50)
    return str(path)


def test_sigkill_at_any_moment_loses_nothing(tmp_path, short_text):
    command = [short_text if word == "austen" else word for word in COMMAND]
    whole = subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True, text=True)
    started = time.monotonic()
    kills = 0
    for delay_after_line in (0, 1, 4, 7, 10):
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        metrics = tmp_path / "cut/metrics.jsonl"
        while process.poll() is None and time.monotonic() - started < 240:
            lines = metrics.read_text().count("\n") if metrics.exists() else -1
            if lines >= delay_after_line:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.communicate()
    assert kills >= 3
    resumed = subprocess.run([*command, "--out", tmp_path / "cut"], check=True, capture_output=True, text=True)
    assert _bits_per_byte(resumed.stdout) == _bits_per_byte(whole.stdout)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_ctrl_c_saves_and_exits_130(tmp_path, short_text):
    command = [short_text if word == "austen" else word for word in COMMAND]
    command[command.index("12")] = "100000"
    process = subprocess.Popen(
        [*command, "--checkpoint-every", "100000", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].endswith("continue with --resume")
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("*.json")
    assert json.loads(checkpoint.read_text())["step"] == len(_losses(tmp_path / "run"))


def test_schedules():
    config = ultramem.TrainConfig(steps=1000, lr=1.0, warmup_ratio=0.1, lr_end_ratio=0.1, value_lr_ratio=10.0)
    assert learning_rate(config, 1) == pytest.approx(0.01)
    assert learning_rate(config, 100) == pytest.approx(1.0)
    assert learning_rate(config, 550) == pytest.approx(0.55)
    assert learning_rate(config, 1000) == pytest.approx(0.1)
    assert value_lr_ratio(config, 1) == 10
    assert value_lr_ratio(config, 1000) == pytest.approx(1)
    assert value_lr_ratio(replace(config, steps=1001), 501) == pytest.approx(5.5)


def test_a_diverging_run_says_so(small_model, small_train, text, tmp_path):
    config = replace(small_train, lr=1e30, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"the loss at step \d is (nan|inf); lower lr"):
        train(small_model, config, load_corpus(text), tmp_path / "run")


def test_one_graph_per_callable_and_no_recompilation(small_model, small_train):
    """A train run and evaluations at three lengths: fullgraph holds, and nothing compiles after the first calls."""
    torch._dynamo.reset()
    config = replace(small_train, compile=True)
    model = ultramem.build_model(replace(small_model, dropout=0.0))
    train_loss, eval_loss = make_train_loss(model, config), make_summed_loss(model, compiled=True)
    optimizer = torch.optim.AdamW(ultramem.param_groups(model, lr=1e-3), fused=True)
    stream = load_corpus("austen").train_stream()
    held_out = (load_corpus("austen").held_out[0][:500],)

    def step(number):
        batch = training_batch(stream, step=number, seed=0, batch_size=2, sequence_length=16)
        total, parts = train_loss(*batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return parts[0].item()

    def run_eval(length):
        return evaluate(model, eval_loss, evaluation_batches(held_out, batch_size=2, sequence_length=length))

    step(1)
    run_eval(16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = [step(number) for number in (2, 3)]
        evaluations = [run_eval(length) for length in (16, 32, 7)]
    assert all(math.isfinite(loss) for loss in compiled)
    eager = make_summed_loss(model, compiled=False)
    for length, evaluation in zip((16, 32, 7), evaluations, strict=True):
        batches = evaluation_batches(held_out, batch_size=2, sequence_length=length)
        assert evaluation.loss == pytest.approx(evaluate(model, eager, batches).loss, rel=1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["memory", "dense"])
def test_compiled_and_eager_losses_agree(small_model, small_train, text, tmp_path, dense):
    """The first steps of a compiled run are those of an eager one, to float32 rounding."""
    torch._dynamo.reset()
    config = replace(small_train, steps=3, eval_every=0)
    model = replace(small_model, dropout=0.0)  # compiled dropout draws other masks than eager dropout
    if dense:
        model = replace(model, memory=None, insertions="")
    train(model, config, load_corpus(text), tmp_path / "eager")
    train(model, replace(config, compile=True), load_corpus(text), tmp_path / "compiled")
    assert _losses(tmp_path / "compiled") == pytest.approx(_losses(tmp_path / "eager"), rel=1e-4)
