"""Real jobs for tests: `ultramem train` as processes that can be killed, started from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 150

CONFIG = """
[model]
vocab_size = 257
hidden_size = 32
inner_size = 48
num_heads = 2
num_layers = 2
insertions = "1:2"
dropout = 0.1
[model.memory]
hidden_size = 32
num_layers = 2
value_dim = 16
key_dim = 8
knum = 7
top_m = 4
[train]
steps = 12
batch_size = 4
sequence_length = 16
compile = false
checkpoint_every = 3
eval_every = 0
eval_tokens = 64
final_eval_tokens = 64
"""
"""49 rows: no number of ranks divides them."""


_IMPORTED_ONCE = [
    "ultramem.train_cli",
    "ultramem.runtime.train",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
]


class Job:
    """`ultramem train` on some ranks.

    Args:
        folder: for what they print.
        flags: by rank.
        prepare: is called in each process, with its rank, before the command.
    """

    def __init__(
        self, folder: Path, flags: Sequence[Sequence[str]], prepare: Callable[[int], None] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED_ONCE)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        size = len(flags)
        self.output = folder / f"output-{port}.txt"
        self.output.touch()
        self.processes: list[Any] = []
        for rank, each in enumerate(flags):
            variables = {} if size == 1 else _rank_variables(rank, size, port)
            argv = ["train", *each]
            process = context.Process(target=_command, args=(argv, variables, rank, prepare, self.output), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, *, only: Sequence[int] | None = None) -> list[int]:
        """Exit codes, once the ranks of `only` (or all) have ended."""
        end = time.monotonic() + PATIENCE_S
        waited = [self.processes[rank] for rank in (range(len(self.processes)) if only is None else only)]
        for process in waited:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in waited]
        if None in codes:
            self.kill()
            raise AssertionError(f"still running after {PATIENCE_S} s: {codes}\n{self.printed}")
        return codes

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the job does."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end or not all(process.is_alive() for process in self.processes):
                self.kill()
                raise AssertionError(f"it never came\n{self.printed}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def printed(self) -> str:
        """What all ranks have printed."""
        return self.output.read_text()


def _rank_variables(rank: int, size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def _command(
    argv: list[str], variables: dict[str, str], rank: int, prepare: Callable[[int], None] | None, output: Path
) -> None:
    os.environ.update(variables)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from ultramem.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.exit(main(argv))
