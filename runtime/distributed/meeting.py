"""Ranks before they are a group: each says at their store how it would go on. And after: the main one says why it ends.

A group cannot be made by ranks that differ in its shape, and hangs if one of them has stopped at a bad flag.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ultramem.runtime.distributed.agreement import first_difference, flatten
from ultramem.runtime.distributed.lost_rank import LostRankError, reason

_PATIENCE = timedelta(seconds=5)
"""How long ranks that end wait for one another's words."""


@dataclass(frozen=True)
class Meeting:
    """The ranks of a job at the store through which they find each other."""

    store: Store
    rank: int
    size: int
    timeout_s: float

    def require_agreement(self, description: dict[str, Any] | None, error: Exception | None = None) -> None:
        """Raise on every rank unless all would do the same.

        Args:
            description: of what this rank would do, as JSON has it; None if it can do nothing,
            error: because of this.

        Raises:
            ValueError: a rank brought an error, or names the first field that differs, with its values by rank.
            Exception: `error`, if all ranks brought the same.
            LostRankError: a rank did not come.
        """
        words = {"error": None if error is None else str(error), "fields": flatten(description or {})}
        heard = [json.loads(text) for text in self._exchange("agreement", json.dumps(words))]
        errors = [each["error"] for each in heard]
        if error is not None and all(each == errors[0] for each in errors):
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")
        if difference := first_difference([each["fields"] for each in heard]):
            raise ValueError(difference)

    def say(self, line: str) -> None:
        """Print `line` on stderr, once for all ranks that end with it.

        Ranks wait a few seconds for the main one, and speak for themselves if it has nothing or something else to say.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks when the first one does
        if self.rank == 0:
            print(line, file=sys.stderr, flush=True)
            self._try_to_exchange_endings(line)
        elif self._try_to_exchange_endings(line) != line:
            print(f"rank {self.rank}: {line}", file=sys.stderr, flush=True)

    def _try_to_exchange_endings(self, line: str) -> str | None:
        """The main rank's last line, or None if it has none; the main rank stays until the others have heard."""
        try:
            if self.rank == 0:
                self.store.set("ended", line)
                self.store.wait([f"heard/{rank}" for rank in range(1, self.size)], _PATIENCE)
                return line
            self.store.wait(["ended"], _PATIENCE)
            last = str(self.store.get("ended").decode())
            self.store.set(f"heard/{self.rank}", "")
        except dist.DistError:
            return None
        return last

    def _exchange(self, name: str, words: str) -> Sequence[str]:
        """What all ranks say, in order."""
        try:
            self.store.set(f"{name}/{self.rank}", words)
            said = []
            for rank in range(self.size):
                self.store.wait([f"{name}/{rank}"], timedelta(seconds=self.timeout_s))
                said.append(self.store.get(f"{name}/{rank}").decode())
        except dist.DistError as error:
            raise LostRankError(f"rank {self.rank} of {self.size}: {reason(error)}") from error
        return said


def meet(timeout_s: float) -> Meeting | None:
    """The ranks that `torchrun` started, or None where this process is alone.

    Args:
        timeout_s: how long this rank waits for the others.

    Raises:
        ValueError: the variables of a rank's environment are not all there.
        LostRankError: the others did not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except dist.DistError as error:
        raise LostRankError(f"of {size} ranks some did not come in {timeout_s:g} s: {reason(error)}") from error
    return Meeting(PrefixStore("ultramem", store), rank, size, timeout_s)
