"""Ranks for tests: processes of one gloo group, which stay up from test to test, since starting one takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
                # Dynamo makes such an object itself where it traces an autograd function.
                warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)
                answer = True, function(*args)
        except BaseException:  # the parent raises it
            answer = False, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()


class Ranks:
    """`size` processes that run the same function; what it takes and returns must be picklable."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 2 * TIMEOUT_S) -> list[Any]:
        """The results of all ranks, in order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(timeout_s):
                answers.append((False, "no answer"))
                continue
            answers.append(pipe.recv())
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    @property
    def is_open(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
