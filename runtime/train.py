"""Training: steps, evaluations, health reports and checkpoints, so that resuming gives the same bits.

A step is a function of (weights, optimiser state, seed, step number). So a checkpoint holds the first two, and the
counts behind the health reports.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ultramem.config import ModelConfig, TrainConfig, to_dict
from ultramem.counts import count
from ultramem.graph import build_model
from ultramem.machine import gemm_flops_per_second
from ultramem.runtime.best import Best, load_best, read_best, save_best
from ultramem.runtime.checkpoint import save_checkpoint, state_tensors
from ultramem.runtime.data import Batch, Corpus, Documents, Stream, evaluation_batches, training_batch
from ultramem.runtime.determinism import deterministic_algorithms
from ultramem.runtime.distributed import ALONE, Ranks, ShardedLoss, balance_together, require_agreement
from ultramem.runtime.distributed.checkpoint import CheckpointWriter, load_newest, whole_state
from ultramem.runtime.distributed.compiling import compiling_exchanges
from ultramem.runtime.evaluate import Evaluation, evaluate, make_summed_loss
from ultramem.runtime.health import MemoryHealth
from ultramem.runtime.metrics import MetricsLog, require_tensorboard
from ultramem.runtime.optimizers import make_optimizers, sync
from ultramem.runtime.run import RunFolder, describe
from ultramem.runtime.stop_signals import StopFlag, Stopped, stop_signals
from ultramem.runtime.train_step import TrainStep, autocast_dtype, check_finite, make_train_loss
from ultramem.runtime.weights import save_weights

BACKWARD_AND_FORWARD = 3
"""FLOPs of a trained token over those of a forward: the backward takes the gradients of inputs and of weights."""


class Progress(Protocol):
    """Told about the run as it goes on."""

    def message(self, text: str) -> None: ...

    def step(self, row: dict[str, Any], steps: int) -> None: ...

    def evaluation(self, row: dict[str, Any]) -> None: ...


class Result(NamedTuple):
    """What a finished run reached, with the weights that it ends with."""

    step: int
    """Steps that were done."""
    weights_step: int
    """The step of the weights: the last, or the best one."""
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
    tensorboard: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Train a model on `corpus` into the run folder `out`.

    Args:
        model_config: of the model; its vocabulary becomes that of the corpus's tokenizer.
        config: how to train it.
        corpus: text to train and to evaluate on.
        out: run folder to write.
        resume: go on from the last checkpoint in `out`, or from step 0.
        device: where to.
        tensorboard: write the metrics for TensorBoard too, into `out`/tensorboard.
        progress: is told of every step and evaluation.
        ranks: that train together (see `join_ranks`); the main one writes the folder.

    Raises:
        FileExistsError: `out` holds something and `resume` is off.
        ImportError: TensorBoard is asked for and not installed.
        ValueError: the text is shorter than a sequence or none is held out, `resume` meets another configuration or a
            damaged file, or the loss is no longer finite.
        Stopped: on SIGINT or SIGTERM, after a checkpoint.
    """
    stream = corpus.train_stream()
    training_batch(stream, step=0, seed=0, batch_size=1, sequence_length=config.sequence_length)  # long enough?
    if not any(len(document) for document in corpus.held_out):
        raise ValueError(f"data: {corpus.name} has too little text for a held_out part, got no token of it")
    if tensorboard:
        require_tensorboard()
    model_config = replace(model_config, vocab_size=corpus.tokenizer.vocab_size)
    if config.micro_batch_size % ranks.size:
        raise ValueError(
            f"batch_size / accumulate must be a multiple of the {ranks.size} ranks, got {config.micro_batch_size}"
        )
    if config.table_optimizer == "row_adagrad" and ranks.shares and ranks.parallel.table_placement == "columns":
        raise ValueError(
            "table_optimizer must be adamw or lazy_adamw where table_placement is columns (the accumulator of a row is "
            "a mean over all of them), got 'row_adagrad'"
        )
    run = RunFolder(out)
    require_agreement(
        ranks, {**describe(model_config, config, corpus), "parallel": to_dict(config.parallel), "resume": resume}
    )
    ranks.on_main(lambda: run.create(model_config, config, corpus, resume=resume))
    with deterministic_algorithms(), stop_signals() as stop, compiling_exchanges(ranks):
        trainer = _Trainer(model_config, config, corpus, stream, run, torch.device(device), progress, stop, ranks)
        return trainer.run(tensorboard=tensorboard)


class _Trainer:
    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        corpus: Corpus,
        stream: Tensor | Stream,
        folder: RunFolder,
        device: torch.device,
        progress: Progress | None,
        stop: StopFlag,
        ranks: Ranks,
    ) -> None:
        self.config, self.corpus, self.folder, self.stop, self.ranks = config, corpus, folder, stop, ranks
        self.progress = progress if ranks.is_main else None
        self.fingerprint = hashlib.sha256(
            json.dumps(describe(model_config, config, corpus), sort_keys=True).encode()
        ).hexdigest()
        self.writer = None
        if ranks.size > 1:
            self.writer = CheckpointWriter(
                folder.checkpoints, self.fingerprint, keep=config.keep_checkpoints, ranks=ranks
            )
        torch.manual_seed(config.seed)
        self.model = build_model(model_config, device=device, shard=ranks.table_shard(), experts=ranks.expert_shard())
        balance_together(self.model, ranks)
        self.model.recomputes = config.activation_checkpointing
        self.health_every = config.eval_every if config.health_every is None else config.health_every
        self.health = MemoryHealth(self.model, ranks) if self.health_every else None
        loss = make_train_loss(self.model, config)
        self.sharded = None
        if ranks.size > 1 and config.parallel.dense == "fsdp":
            loss = self.sharded = ShardedLoss(self.model, loss, ranks)
        self.optimizers = make_optimizers(self.model, config)
        self.step = TrainStep(self.model, self.optimizers, config, stream, ranks=ranks, loss=loss)
        self.eval_loss = make_summed_loss(self.model, compiled=config.compile)
        peak = gemm_flops_per_second(device, autocast_dtype(config, device.type) or torch.float32)
        self.mfu_per_rate = BACKWARD_AND_FORWARD * count(model_config).flops_per_token / peak

    def run(self, *, tensorboard: bool) -> Result:
        config, folder = self.config, self.folder
        done = self._restore()
        rows = self.ranks.on_main(lambda: folder.keep_metrics_until(done)) or []
        seconds_before = max((row["seconds"] for row in rows), default=0.0)
        train_loss = next((row["loss"] for row in reversed(rows) if "loss" in row), float("nan"))
        self.best = read_best(folder.best)
        began = time.perf_counter()
        if config.compile and done < config.steps:
            self._say("compiling the training step (once; about a minute on two cores)")
        with ExitStack() as stack:
            log = None
            if self.writer is not None:
                stack.callback(self.writer.close)
            if self.ranks.is_main:
                log = stack.enter_context(MetricsLog(folder, after_step=done, tensorboard=tensorboard))

            def write(row: dict[str, Any]) -> None:
                if log is not None:
                    log(row | {"seconds": round(seconds_before + time.perf_counter() - began, 3)})

            for step in range(done + 1, config.steps + 1):
                row = self.step(step, stop=lambda: self.stop.signum or 0)
                signum = row.pop("stop") or None
                train_loss = row["loss"]
                row["mfu"] = round(self.mfu_per_rate * row["tokens_per_second"], 4)
                write(row)
                self.stop.may_raise = False  # from here on there is work to save
                if self.progress:
                    self.progress.step(row, config.steps)
                for report in self._reports(step):
                    write(report)
                if self.ranks.size == 1:  # several ranks end after the same step, so what came since waits for the next
                    signum = self.stop.signum
                last = step == config.steps
                if last or signum is not None or step % config.checkpoint_every == 0:
                    self._save_checkpoint(step)
                if signum is not None and not last:
                    self._finish_checkpoint()
                    raise Stopped(step, signum)
            self._finish_checkpoint()
            weights_step = self._final_weights()
            held_out = self._evaluate(self.corpus.held_out, config.final_eval_tokens)
            write(_eval_row(config.steps, "held_out", held_out))
            outside = None
            if self.corpus.out_of_domain:
                outside = self._evaluate(self.corpus.out_of_domain, config.final_eval_tokens)
                write(_eval_row(config.steps, "out_of_domain", outside))
        save_weights(self.model, folder.path, self.ranks)
        seconds = round(seconds_before + time.perf_counter() - began, 3)
        return Result(config.steps, weights_step, train_loss, held_out, outside, seconds)

    def _reports(self, step: int) -> Iterator[dict[str, Any]]:
        """Rows of an evaluation and of the memory's health, if `step` is the time for them."""
        config = self.config
        if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            # So that the best weights owe nothing; at every evaluation, for a resumed run to do it at the same steps.
            sync(self.optimizers)
            row = _eval_row(step, "held_out_sample", self._evaluate(self.corpus.held_out, config.eval_tokens))
            check_finite("held-out loss", row["eval_loss"], step, config)
            yield row
            if self.progress:
                self.progress.evaluation(row)
            if self.best is None or row["eval_loss"] < self.best.eval_loss:
                self.best = Best(step=step, eval_loss=row["eval_loss"])
                self._save_best(self.best)
        if self.health is not None and (step % self.health_every == 0 or step == config.steps):
            tokens = config.micro_batch_size * config.sequence_length
            batch = next(self._batches(self.corpus.held_out, tokens))
            with self._whole_weights():
                reports = self.health.report(batch)
            yield from ({"step": step, **report} for report in reports)

    def _restore(self) -> int:
        """Steps that are done."""
        others = {} if self.health is None else self.health.state()
        step = load_newest(self.folder.checkpoints, self.fingerprint, self.model, self.optimizers, others)
        if step is None:
            return 0
        if self.health is not None:
            self.health.load_state(others)
        self._say(f"resuming after step {step} of {self.config.steps}")
        return step

    def _save_checkpoint(self, step: int) -> None:
        # Lazy optimisers are not synced here: what they owe is in their state, and a checkpoint at another step (after
        # Ctrl-C) must not change how the run goes on.
        others = {} if self.health is None else self.health.state()
        if self.writer is None:
            tensors, keep = state_tensors(self.model, self.optimizers, others), self.config.keep_checkpoints
            save_checkpoint(self.folder.checkpoints, step, tensors, self.fingerprint, keep=keep)
            return
        self.writer.save(step, whole_state(self.model, self.optimizers, others))

    def _finish_checkpoint(self) -> None:
        if self.writer is not None:
            self.writer.wait()

    def _final_weights(self) -> int:
        """Leave the weights that the run ends with in the model; returns their step."""
        sync(self.optimizers)  # also before other weights come in: no row may be stale then
        if self.config.save == "last":
            return self.config.steps
        assert self.best is not None
        load_best(self.folder.best, self.model)
        return self.best.step

    def _save_best(self, best: Best) -> None:
        save_best(self.folder.best, best, self.model, self.folder.path, self.ranks)

    def _whole_weights(self) -> AbstractContextManager[None]:
        """Dense weights are plain tensors in here."""
        return nullcontext() if self.sharded is None else self.sharded.whole_weights()

    def _evaluate(self, documents: Documents, max_tokens: int | None) -> Evaluation:
        with self._whole_weights():
            return evaluate(
                self.model,
                self.eval_loss,
                self._batches(documents, max_tokens),
                token_bytes=self.corpus.tokenizer.token_bytes,
                ranks=self.ranks,
            )

    def _batches(self, documents: Documents, max_tokens: int | None) -> Iterator[Batch]:
        return evaluation_batches(
            documents,
            batch_size=self.config.micro_batch_size,
            sequence_length=self.config.sequence_length,
            max_tokens=max_tokens,
        )

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.message(text)


def _eval_row(step: int, split: str, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "step": step,
        "split": split,
        "eval_loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "text_bytes": evaluation.text_bytes,
    }


__all__ = ["Progress", "Result", "Stopped", "train"]
