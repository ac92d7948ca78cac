"""Ranks that die, hang, are told to end or differ: the job ends with a message, and goes on with --resume."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
from jobs import CONFIG, PATIENCE_S, Job

from ultramem.runtime import train_step

STEPS, FAULT_STEP, CHECKPOINT_EVERY = 12, 8, 3
ROWS = ["--table-placement", "rows"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.toml").write_text(CONFIG)
    (folder / "text.txt").write_text("It is a truth universally acknowledged. " * 40)
    return ["--config", str(folder / "tiny.toml"), "--data", str(folder / "text.txt"), *ROWS]


@pytest.fixture(scope="module")
def whole_losses(recipe, tmp_path_factory):
    """Of a run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_its_end(folder, [*recipe, "--out", str(folder / "run")])
    return losses_of(folder / "run")


def run_to_its_end(folder, flags, ranks=2):
    job = Job(folder, [flags] * ranks)
    codes = job.wait()
    assert codes == [0] * ranks, job.printed
    return job.printed


def errors_of(job):
    """Lines on what went wrong; before them the main rank may have told how rows will travel."""
    return [line for line in job.printed.splitlines() if not line.startswith("Rows are pooled at ")]


def losses_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(steps) == list(range(1, len(steps) + 1))
    return list(steps.values())


def checkpoints_of(run):
    return sorted(path.stem for path in (run / "checkpoints").glob("*.json"))


def at_fault_step(action):
    """Do it before the step's text is read."""
    read = train_step.training_batch

    def training_batch(*args, step, **rest):
        if step == FAULT_STEP:
            action()
        return read(*args, step=step, **rest)

    train_step.training_batch = training_batch


def kill_rank_1(rank):
    if rank == 1:
        at_fault_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_rank_0(rank):
    if rank == 0:
        at_fault_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop_rank_1(rank):
    if rank == 1:
        at_fault_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def interrupt_rank_1(rank):
    if rank == 1:
        at_fault_step(lambda: os.kill(os.getpid(), signal.SIGINT))


def terminate_rank_1(rank):
    if rank == 1:
        at_fault_step(lambda: os.kill(os.getpid(), signal.SIGTERM))


def stall_in_second_save(rank):
    """Rank 1 writes a part of its second checkpoint, and no more."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, calls = FileSystemWriter.write_data, itertools.count(1)

    def write_data(self, plan, planner):
        if rank == 1 and next(calls) == 2:
            Path(self.path, "__1_0.distcp").write_bytes(b"half of it")
            time.sleep(2 * PATIENCE_S)
        return write(self, plan, planner)

    FileSystemWriter.write_data = write_data


@pytest.mark.parametrize("lost", [0, 1])
def test_after_a_kill_the_job_ends_and_resumes(recipe, whole_losses, tmp_path, lost):
    flags = [*recipe, "--out", str(tmp_path / "run")]
    job = Job(tmp_path, [flags] * 2, kill_rank_0 if lost == 0 else kill_rank_1)
    codes = job.wait()
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert f"ultramem train: lost another rank (rank {1 - lost} of 2: " in job.printed
    assert job.printed.rstrip().endswith("; continue with --resume")
    assert "Traceback" not in job.printed
    # The second checkpoint may have been on its way to the disk.
    step = int(checkpoints_of(tmp_path / "run")[-1].removeprefix("step-"))
    assert step in (CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY)
    assert f"resuming after step {step} of {STEPS}" in run_to_its_end(tmp_path, [*flags, "--resume"])
    assert losses_of(tmp_path / "run") == whole_losses


def test_a_kill_in_mid_save_costs_the_steps_since_the_checkpoint_before(recipe, whole_losses, tmp_path):
    run = tmp_path / "run"
    flags = [*recipe, "--out", str(run)]
    job = Job(tmp_path, [flags] * 2, stall_in_second_save)
    part = run / "checkpoints/step-00000006/__1_0.distcp"
    job.until(part.exists)
    # The third has to wait for the second, so training has gone on to its step, and no further.
    job.until(lambda: len((run / "metrics.jsonl").read_text().splitlines()) == 3 * CHECKPOINT_EVERY)
    job.processes[1].kill()
    assert job.wait() == [1, -signal.SIGKILL]
    assert "lost another rank" in job.printed
    assert checkpoints_of(run) == ["step-00000003"]
    assert f"resuming after step 3 of {STEPS}" in run_to_its_end(tmp_path, [*flags, "--resume"])
    assert losses_of(run) == whole_losses
    assert checkpoints_of(run) == ["step-00000009", "step-00000012"]


def test_a_rank_that_hangs_ends_the_job_within_the_timeout(recipe, whole_losses, tmp_path):
    flags = [*recipe, "--out", str(tmp_path / "run"), "--timeout-s", "4"]
    job = Job(tmp_path, [flags] * 2, stop_rank_1)
    began = time.monotonic()
    try:
        assert job.wait(only=[0]) == [1]
    finally:
        job.kill()
    assert time.monotonic() - began < PATIENCE_S
    assert "ultramem train: lost another rank (rank 0 of 2: timed out" in job.printed
    run_to_its_end(tmp_path, [*flags, "--resume"])
    assert losses_of(tmp_path / "run") == whole_losses


@pytest.mark.parametrize(
    ("of_rank_1", "difference"),
    [
        (["--lr", "0.5"], "train.lr must be the same on all ranks, got 0.001 on rank 0, 0.5 on rank 1"),
        (["--table-copies", "2"], "parallel.table_copies must be the same on all ranks, got 1 on rank 0, 2 on rank 1"),
        (["--timeout-s", "7"], "parallel.timeout_s must be the same on all ranks, got 600.0 on rank 0, 7.0 on rank 1"),
        (["--preset", "nothing"], "rank 1: preset must be one of"),
    ],
)
def test_ranks_that_differ_refuse_to_start(recipe, tmp_path, of_rank_1, difference):
    flags = [*recipe, "--out", str(tmp_path / "run")]
    job = Job(tmp_path, [flags, flags + of_rank_1])
    assert job.wait() == [2, 2]
    (error,) = errors_of(job)
    assert error.startswith(f"ultramem train: error: {difference}")
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_text_refuse_to_start(recipe, tmp_path):
    flags = [*recipe, "--out", str(tmp_path / "run")]
    job = Job(tmp_path, [flags] * 2, other_text_on_rank_1)
    assert job.wait() == [2, 2]
    (error,) = errors_of(job)
    assert error.startswith("ultramem train: error: data.sha256 must be the same on all ranks, got ")


def other_text_on_rank_1(rank):
    from ultramem.runtime import data

    if rank == 1:
        load = data.load_corpus

        def load_corpus(name, **rest):
            path = Path(name).with_name("other.txt")
            path.write_text(Path(name).read_text() + "However little known. ")
            from dataclasses import replace

            return replace(load(str(path), **rest), name=name)

        data.load_corpus = load_corpus


@pytest.mark.parametrize("flag", [["--batch-size", "3"], ["--data", "nowhere.txt"]])
def test_what_is_wrong_on_all_ranks_is_said_once(recipe, tmp_path, flag):
    job = Job(tmp_path, [[*recipe, "--out", str(tmp_path / "run"), *flag]] * 2)
    assert job.wait() == [2, 2]
    (error,) = errors_of(job)
    assert error.startswith("ultramem train: error: ")


@pytest.mark.parametrize(("prepare", "code"), [(interrupt_rank_1, 130), (terminate_rank_1, 143)])
def test_a_signal_to_one_rank_ends_all_at_the_same_step(recipe, whole_losses, tmp_path, prepare, code):
    run = tmp_path / "run"
    flags = [*recipe, "--out", str(run)]
    job = Job(tmp_path, [flags] * 2, prepare)
    assert job.wait() == [code, code]
    assert checkpoints_of(run)[-1] == f"step-{FAULT_STEP:08d}"
    assert job.printed.count("; continue with --resume") == 1
    assert f"ultramem train: stopped at step {FAULT_STEP}" in job.printed
    run_to_its_end(tmp_path, [*flags, "--resume"])
    assert losses_of(run) == whole_losses
