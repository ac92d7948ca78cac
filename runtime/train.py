"""Training: one compiled graph for forward and backward, checkpoints that resume to the same bits.

A step is a function of (weights, optimiser state, seed, step number): its windows of text and its dropout masks are
drawn from a seed made of the last two. So a checkpoint holds the first two and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # the name that everybody uses
from torch import Tensor

from ultramem.config import ModelConfig, TrainConfig
from ultramem.graph import Transformer, build_model, param_groups
from ultramem.graph.weights import save_weights
from ultramem.runtime.checkpoint import load_latest_checkpoint, restore, save_checkpoint
from ultramem.runtime.data import Corpus, evaluation_batches, step_seed, training_batch
from ultramem.runtime.evaluate import Evaluation, SummedLoss, evaluate, make_summed_loss
from ultramem.runtime.run import RunFolder, describe


class Stopped(Exception):  # noqa: N818  # not an error: the user asked for it
    """Training ended early on a signal; the work up to `step` is in a checkpoint."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped at step {step}; continue with --resume")
        self.step = step
        self.signum = signum


class Progress(Protocol):
    """Told about the run as it goes on."""

    def message(self, text: str) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None: ...


class Result(NamedTuple):
    """What a finished run reached."""

    step: int
    train_loss: float
    held_out: Evaluation
    out_of_domain: Evaluation | None
    seconds: float


def train(
    model_config: ModelConfig,
    config: TrainConfig,
    corpus: Corpus,
    out: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Train a model on `corpus` into the run folder `out`.

    Raises:
        FileExistsError: `out` holds something and `resume` is off.
        ValueError: the text is shorter than a sequence, or `resume` meets another configuration or a damaged file.
        Stopped: on SIGINT or SIGTERM, after a checkpoint.
    """
    stream = corpus.train_stream()
    training_batch(stream, step=0, seed=0, batch_size=1, sequence_length=config.sequence_length)  # long enough?
    run = RunFolder(out)
    run.create(model_config, config, corpus, resume=resume)
    with _deterministic(), _stop_signals() as stop:
        return _Trainer(model_config, config, corpus, run, torch.device(device), progress, stop).run()


class _Trainer:
    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        corpus: Corpus,
        run: RunFolder,
        device: torch.device,
        progress: Progress | None,
        stop: _StopFlag,
    ) -> None:
        self.config, self.corpus, self.run_folder, self.device = config, corpus, run, device
        self.progress, self.stop = progress, stop
        self.stream = corpus.train_stream()
        self.fingerprint = hashlib.sha256(
            json.dumps(describe(model_config, config, corpus), sort_keys=True).encode()
        ).hexdigest()
        torch.manual_seed(config.seed)
        self.model = build_model(model_config, device=device)
        groups = param_groups(
            self.model, lr=config.lr, value_lr_ratio=config.value_lr_ratio, weight_decay=config.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
        self.loss = make_train_loss(self.model, config)
        self.eval_loss = make_summed_loss(self.model, compiled=config.compile)

    def run(self) -> Result:
        config, folder = self.config, self.run_folder
        checkpoint = load_latest_checkpoint(folder.checkpoints, self.fingerprint)
        done = 0
        if checkpoint is not None:
            restore(checkpoint, self.model, self.optimizer)
            done = checkpoint.step
            self._say(f"resuming after step {done} of {config.steps}")
        rows = folder.keep_metrics_until(done)
        seconds_before = max((row["seconds"] for row in rows), default=0.0)
        losses = [row["loss"] for row in rows if "loss" in row]
        started = time.perf_counter()
        if config.compile and done < config.steps:
            self._say("compiling the training step (once; about a minute on two cores)")
        with folder.metrics.open("a") as metrics:

            def write(row: dict[str, Any]) -> None:
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()

            def seconds() -> float:
                return round(seconds_before + time.perf_counter() - started, 3)

            for step in range(done + 1, config.steps + 1):
                row = self._step(step)
                losses.append(row["loss"])
                write(row | {"seconds": seconds()})
                self.stop.may_raise = False  # from here on there is work to save
                if self.progress:
                    self.progress.step(row, config.steps)
                last = step == config.steps
                if config.eval_every and step % config.eval_every == 0 and not last:
                    sample = self._evaluate(self.corpus.held_out, config.eval_tokens)
                    write(_eval_row(step, "held_out_sample", sample, seconds()))
                    self._say(f"step {step}: {sample.bits_per_byte:.3f} bits per byte on held-out text")
                if step % config.checkpoint_every == 0 or last or self.stop.signum is not None:
                    save_checkpoint(folder.checkpoints, step, self.model, self.optimizer, self.fingerprint)
                if self.stop.signum is not None and not last:
                    raise Stopped(step, self.stop.signum)
            held_out = self._evaluate(self.corpus.held_out, None)
            write(_eval_row(config.steps, "held_out", held_out, seconds()))
            outside = self._evaluate(self.corpus.out_of_domain, None) if self.corpus.out_of_domain else None
            if outside is not None:
                write(_eval_row(config.steps, "out_of_domain", outside, seconds()))
        save_weights(self.model, folder.path)
        return Result(config.steps, losses[-1], held_out, outside, seconds())

    def _step(self, step: int) -> dict[str, Any]:
        """One optimiser step; `step` counts from 1."""
        config = self.config
        began = time.perf_counter()
        lr = learning_rate(config, step)
        ratio = value_lr_ratio(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * ratio if group["name"] == "values" else lr
        batch = training_batch(
            self.stream,
            step=step,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
        )
        torch.manual_seed(step_seed(config.seed, step))  # dropout
        total, parts = self.loss(batch.inputs_BS.to(self.device), batch.targets_BS.to(self.device))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, aux_loss = parts.tolist()
        if not math.isfinite(loss):
            raise ValueError(f"the loss at step {step} is {loss}; lower lr ({config.lr}) or value_lr_ratio")
        tokens = config.batch_size * config.sequence_length
        return {
            "step": step,
            "loss": loss,
            "aux_loss": aux_loss,
            "grad_norm": norm.item(),
            "lr": lr,
            "value_lr": lr * ratio,
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
        }

    def _evaluate(self, documents: tuple[Tensor, ...], max_tokens: int | None) -> Evaluation:
        batches = evaluation_batches(
            documents,
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            max_tokens=max_tokens,
        )
        return evaluate(self.model, self.eval_loss, batches)

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.message(text)


TrainLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_train_loss(model: Transformer, config: TrainConfig) -> TrainLoss:
    """(inputs, targets) -> (loss to differentiate, its parts [cross-entropy, aux loss]); one graph, if compiled."""
    device_type = model.embedding.weight.device.type
    autocast = _autocast_dtype(config, device_type)

    def loss(inputs_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
            output = model(inputs_BS)
        cross_entropy = F.cross_entropy(output.logits.float().flatten(0, 1), targets_BS.flatten())
        # The parts as a copy: where a dense model's aux loss is a constant 0, the compiler (torch 2.13) takes the sum
        # for an alias of a detached output, and returns it without a gradient.
        parts = torch.stack([cross_entropy.detach(), output.aux_loss.detach()])
        return cross_entropy + output.aux_loss, parts

    return torch.compile(loss, fullgraph=True) if config.compile else loss


def _autocast_dtype(config: TrainConfig, device_type: str) -> torch.dtype | None:
    if config.precision == "auto":
        return torch.bfloat16 if device_type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if config.precision == "bfloat16" else None


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `lr_end_ratio` of the peak at the last step (Table 4)."""
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    share = config.lr_end_ratio + (1 - config.lr_end_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share


def value_lr_ratio(config: TrainConfig, step: int) -> float:
    """Learning rate of the value tables over the others': `value_lr_ratio` at the start, linear to 1 at the end."""
    return config.value_lr_ratio + (1 - config.value_lr_ratio) * (step - 1) / max(1, config.steps - 1)


def _eval_row(step: int, split: str, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "eval_loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "seconds": seconds,
    }


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same bits in every run; set back afterwards."""
    # cuBLAS reads this when its first handle is made; without it PyTorch refuses deterministic matmuls on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set by a module property
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it only costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


class _StopFlag:
    """Set by a signal. Before the first step there is nothing to save, so the signal raises at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.may_raise = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.may_raise or self.signum is not None:  # a second signal does not wait for the step to end
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def _stop_signals() -> Iterator[_StopFlag]:
    flag = _StopFlag()
    try:
        before = {each: signal.signal(each, flag) for each in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield flag
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


__all__ = ["Progress", "Result", "Stopped", "SummedLoss", "learning_rate", "make_train_loss", "train", "value_lr_ratio"]
