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
from ultramem.machine import gemm_flops_per_second
from ultramem.runtime.data import evaluation_batches, load_corpus
from ultramem.runtime.evaluate import evaluate, make_summed_loss
from ultramem.runtime.health import MemoryHealth
from ultramem.runtime.run import RunFolder
from ultramem.runtime.schedule import learning_rate, value_lr_ratio
from ultramem.runtime.train import train
from ultramem.runtime.train_step import TrainStep
from ultramem.runtime.unigram import unigram_loss


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
    for delay_after_line in (0, 4, 10):
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
    assert kills >= 2
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


def test_micro_batches_give_the_gradient_of_the_whole_batch(small_model, small_train, text):
    """To the rounding of float32 sums: a few units in the last place of the largest entry."""
    stream = load_corpus(text).train_stream()
    gradients, losses = {}, {}
    for accumulate in (1, 2, 4):
        torch.manual_seed(0)
        model = ultramem.build_model(replace(small_model, dropout=0.0))
        config = replace(small_train, batch_size=4, accumulate=accumulate, max_grad_norm=0.0)
        step = TrainStep(model, [torch.optim.SGD(ultramem.param_groups(model, lr=0.0))], config, stream)
        step.optimizers[0].zero_grad = lambda set_to_none: None
        losses[accumulate] = step(1)["loss"]
        gradients[accumulate] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for accumulate in (2, 4):
        assert losses[accumulate] == pytest.approx(losses[1], rel=1e-6)
        assert (gradients[accumulate] - gradients[1]).abs().max() < 1e-6 * gradients[1].abs().max()


def test_value_tables_have_their_own_rate(small_model, small_train, text):
    model = ultramem.build_model(small_model)
    optimizer = torch.optim.SGD(ultramem.param_groups(model, lr=0.0))
    config = replace(small_train, value_lr_decay=False, value_lr_ratio=7.0)
    row = TrainStep(model, [optimizer], config, load_corpus(text).train_stream())(2)
    assert row["value_lr"] == pytest.approx(7 * row["lr"])
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"values": row["value_lr"], "weights": row["lr"], "scales": row["lr"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"accumulate": 2},
        {"table_optimizer": "lazy_adamw"},
        {"table_optimizer": "row_adagrad", "accumulate": 2},
        {"table_optimizer": "lazy_adamw", "table_dtype": "bfloat16"},
        {"table_dtype": "bfloat16", "precision": "bfloat16"},
    ],
    ids=str,
)
def test_resuming_gives_the_same_bits_however_it_is_trained(small_model, small_train, text, tmp_path, fields):
    corpus, config = load_corpus(text), replace(small_train, **fields)
    train(small_model, config, corpus, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        train(small_model, config, corpus, tmp_path / "cut", progress=_StopAt(3))
    train(small_model, config, corpus, tmp_path / "cut", resume=True)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def misleading_text(tmp_path):
    """What is held out gets less likely with every step."""
    path = tmp_path / "misleading.txt"
    path.write_text("a" * 1900 + "b" * 100)
    return load_corpus(str(path))


@pytest.mark.parametrize("save", ["last", "best"])
def test_the_best_weights_are_kept(small_model, small_train, misleading_text, tmp_path, save):
    config = replace(small_train, eval_every=2, lr=1e-2, warmup_ratio=0.0, save=save)
    result = train(small_model, config, misleading_text, tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if row.get("split") == "held_out_sample"]
    assert rows[0]["eval_loss"] == min(row["eval_loss"] for row in rows) < rows[-1]["eval_loss"]
    assert json.loads((tmp_path / "run/best/best.json").read_text()) == {
        "step": 2,
        "eval_loss": rows[0]["eval_loss"],
    }
    best = ultramem.load(tmp_path / "run/best")
    batches = evaluation_batches(misleading_text.held_out, batch_size=2, sequence_length=16)
    evaluation = evaluate(best, make_summed_loss(best, compiled=False), batches)
    assert (evaluation == result.held_out) == (save == "best")
    assert result.weights_step == (2 if save == "best" else 6)
    weights = [(tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "best/model.safetensors")]
    assert (weights[0] == weights[1]) == (save == "best")
    with pytest.raises(RuntimeError, match="plug"):
        train(small_model, config, misleading_text, tmp_path / "cut", progress=_StopAt(5))
    resumed = train(small_model, config, misleading_text, tmp_path / "cut", resume=True)
    assert (resumed.weights_step, resumed.held_out) == (result.weights_step, result.held_out)
    assert (tmp_path / "cut/best/model.safetensors").read_bytes() == weights[1]


def test_bfloat16_tables_stay_so_on_disk(small_model, small_train, text, tmp_path):
    result = train(small_model, replace(small_train, table_dtype="bfloat16"), load_corpus(text), tmp_path / "run")
    model = ultramem.load(tmp_path / "run")
    assert model.memories[0].table.values_NV.dtype == torch.bfloat16
    assert model.embedding.weight.dtype == torch.float32
    batches = evaluation_batches(load_corpus(text).held_out, batch_size=2, sequence_length=16)
    assert evaluate(model, make_summed_loss(model, compiled=False), batches) == result.held_out


def test_as_many_checkpoints_as_asked_for_are_kept(small_model, small_train, text, tmp_path):
    config = replace(small_train, checkpoint_every=1, keep_checkpoints=3)
    train(small_model, config, load_corpus(text), tmp_path / "run")
    steps = [json.loads(path.read_text())["step"] for path in sorted((tmp_path / "run/checkpoints").glob("*.json"))]
    assert steps == [4, 5, 6]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"accumulate": 3}, r"accumulate must divide batch_size \(16\), got 3"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"health_every": -1}, "health_every must be at least 0, got -1"),
        ({"save": "best", "eval_every": 0}, "save must be last where eval_every is 0"),
        ({"table_optimizer": "sgd"}, "table_optimizer must be one of adamw, lazy_adamw, row_adagrad, got 'sgd'"),
    ],
)
def test_bad_options_name_the_field(fields, said):
    with pytest.raises(ValueError, match=said):
        ultramem.TrainConfig(**fields)


def test_losses_in_autocast_are_those_of_float32_to_bfloat16_rounding(small_model, small_train, text, tmp_path):
    """To a unit in the last place at the first step; updates then multiply it."""
    model = replace(small_model, dropout=0.0)
    for precision in ("float32", "bfloat16"):
        train(model, replace(small_train, precision=precision), load_corpus(text), tmp_path / precision)
    assert _losses(tmp_path / "bfloat16") != _losses(tmp_path / "float32")
    low, high = _losses(tmp_path / "bfloat16"), _losses(tmp_path / "float32")
    assert low[0] == pytest.approx(high[0], rel=2**-8)
    assert low == pytest.approx(high, rel=2**-6)


def test_training_beats_a_unigram_model(small_model, small_train, text, tmp_path):
    corpus = load_corpus(text)
    config = replace(small_train, steps=60, batch_size=8, eval_every=0, checkpoint_every=60, lr=5e-3)
    result = train(small_model, config, corpus, tmp_path / "run")
    assert result.held_out.loss < unigram_loss(corpus.train_stream(), 257)


def test_the_metrics_say_how_fast_it_went(small_model, small_train, text, tmp_path):
    train(small_model, small_train, load_corpus(text), tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if "loss" in row]
    rate = gemm_flops_per_second(torch.device("cpu"), torch.float32)
    for row in rows:
        flops = 3 * ultramem.count(small_model).flops_per_token * row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(flops / rate, abs=1e-4)


def test_schedules():
    config = ultramem.TrainConfig(steps=1000, lr=1.0, warmup_ratio=0.1, lr_end_ratio=0.1, value_lr_ratio=10.0)
    assert learning_rate(config, 1) == pytest.approx(0.01)
    assert learning_rate(config, 100) == pytest.approx(1.0)
    assert learning_rate(config, 550) == pytest.approx(0.55)
    assert learning_rate(config, 1000) == pytest.approx(0.1)
    assert value_lr_ratio(config, 1) == 10
    assert value_lr_ratio(config, 1000) == pytest.approx(1)
    assert value_lr_ratio(replace(config, steps=1001), 501) == pytest.approx(5.5)
    constant = replace(config, value_lr_decay=False)
    assert [value_lr_ratio(constant, step) for step in (1, 500, 1000)] == [10, 10, 10]


def test_a_diverging_run_says_so(small_model, small_train, text, tmp_path):
    config = replace(small_train, lr=1e30, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"the loss at step \d is (nan|inf); lower lr"):
        train(small_model, config, load_corpus(text), tmp_path / "run")


def test_one_graph_per_callable_and_no_recompilation(small_model, small_train):
    """Micro-batches, health reports and evaluations at three lengths: nothing compiles after the first calls."""
    torch._dynamo.reset()
    model = ultramem.build_model(replace(small_model, dropout=0.0))
    optimizers = [torch.optim.AdamW(ultramem.param_groups(model, lr=1e-3), fused=True)]
    health, eval_loss = MemoryHealth(model), make_summed_loss(model, compiled=True)
    config = replace(small_train, compile=True, batch_size=4, accumulate=2)
    step = TrainStep(model, optimizers, config, load_corpus("austen").train_stream())
    held_out = (load_corpus("austen").held_out[0][:500],)

    def batches(length):
        return evaluation_batches(held_out, batch_size=2, sequence_length=length)

    step(1)
    evaluate(model, eval_loss, batches(16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (2, 3):
            assert math.isfinite(step(number)["loss"])
            report, _ = health.report(next(batches(16)))
            assert report["reads"] == 4 * 16 * small_model.memory.num_slots * (2 if number == 2 else 1)
        evaluations = [evaluate(model, eval_loss, batches(length)) for length in (16, 32, 7)]
    eager = make_summed_loss(model, compiled=False)
    for length, evaluation in zip((16, 32, 7), evaluations, strict=True):
        assert evaluation.loss == pytest.approx(evaluate(model, eager, batches(length)).loss, rel=1e-5)


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
