"""How a command that runs on several ranks ends: with one line, whichever of them know why."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ultramem.input_errors import INPUT_ERRORS, one_line

if TYPE_CHECKING:
    from ultramem.runtime.distributed import Meeting

LOST_A_RANK = 1
"""Exit code of ranks that miss another."""


@contextmanager
def ending_of_ranks(meeting: Meeting | None, prefix: str, *, traceback: bool) -> Iterator[None]:
    """Print why the command ended in here, once for all ranks, and exit; one process alone is left to its caller.

    Args:
        meeting: of the ranks; None: there is one process.
        prefix: of the line.
        traceback: let errors of bad input pass.
    """
    from ultramem.runtime.distributed import LostRankError
    from ultramem.runtime.stop_signals import Stopped

    if meeting is None:
        yield
        return
    try:
        yield
    except INPUT_ERRORS as error:
        if traceback:
            raise
        meeting.say(f"{prefix}: error: {one_line(error)}")
        code = 2
    except OSError as error:  # such as a full disk
        if traceback:
            raise
        meeting.say(f"{prefix}: {one_line(error)}")
        code = 1
    except Stopped as stop:
        meeting.say(f"{prefix}: {stop}")
        code = 128 + stop.signum
    except KeyboardInterrupt:
        meeting.say(f"{prefix}: stopped")
        code = 128 + signal.SIGINT
    except LostRankError as error:
        # The words differ from rank to rank, and the main one may be lost: every rank says what it knows.
        print(f"{prefix}: lost another rank ({error}); continue with --resume", file=sys.stderr, flush=True)
        # Threads that write a checkpoint may wait for the lost rank too, and nothing that they write will be whole.
        os._exit(LOST_A_RANK)
    else:
        return
    sys.exit(code)
