"""Environment variables of a command's process. Importing this module sets them.

OpenMP and tqdm read theirs only once, when torch is imported, so this module must be imported before torch. A program
that imports ace_triton as a library keeps its own environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which a user chooses how OpenMP's threads wait."""

COMMAND, PACKAGE = "ace-triton", "ace_triton"


def set_environment(
    argv: Sequence[str] = sys.argv,
    original: Sequence[str] = sys.orig_argv,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """In a process of the command line, let waiting threads sleep and hide tqdm's progress bars.

    OpenMP's threads spin at the end of every parallel region until the last thread arrives. If another process uses
    the core of one thread, all others spin for a time slice, in each of the thousands of regions of a small model.
    Variables that the user has set stay as they are.

    Args:
        argv: ``sys.argv``, which is ["-m", ...] while ``python -m`` imports the package.
        original: ``sys.orig_argv``.
        environment: ``os.environ``.
    """
    if not is_command(argv, original):
        return
    environment.setdefault("TQDM_DISABLE", "1")
    if not any(environment.get(name) for name in WAITING_VARIABLES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """True for ``ace-triton ...`` and ``python -m ace_triton ...``."""
    if not argv:
        return False
    if argv[0] != "-m":
        return Path(argv[0]).stem.removesuffix("-script") == COMMAND
    # The module's name is the last word before the program's own words, or ends it: "-m ace_triton", "-mace_triton".
    module = original[-len(argv)]
    return module == PACKAGE or (module.startswith("-") and module.endswith(f"m{PACKAGE}"))


set_environment()
