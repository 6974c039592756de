"""A terminal that is gone, such as that of a lost connection: what is printed to it fails."""

from __future__ import annotations

import errno
import os
import sys
import termios
from contextlib import suppress


def is_lost_terminal(error: BaseException) -> bool:
    """True if an error comes from printing to a terminal that is gone."""
    return isinstance(error, OSError) and error.errno == errno.EIO and any(map(_is_gone, (1, 2)))


def _is_gone(file: int) -> bool:
    try:
        termios.tcgetattr(file)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False


def leave_terminal() -> None:
    """Print to nowhere from now on, so that the process can still end with a status of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
