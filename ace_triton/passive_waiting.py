"""How the threads of torch wait for one another. Importing this module settles it, which must be before torch is
imported."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By which a user says how OpenMP's threads wait."""

COMMAND, PACKAGE = "ace-triton", "ace_triton"


def wait_passively(
    argv: Sequence[str] = sys.argv,
    original: Sequence[str] = sys.orig_argv,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """In a process of the command line, let waiting threads sleep, unless the user says otherwise.

    OpenMP's threads spin at the end of every parallel region until the last one is there. If another process has the
    core of one of them, all others spin for a time slice, in each of the thousands of regions of a small model.
    libgomp reads the variable once, when torch loads it. A program that imports this package decides for itself.

    Args:
        argv: ``sys.argv``, which is ["-m", ...] while ``python -m`` imports the package.
        original: ``sys.orig_argv``.
        environment: ``os.environ``.
    """
    if is_command(argv, original) and not any(environment.get(name) for name in VARIABLES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """True for ``ace-triton ...`` and ``python -m ace_triton ...``."""
    if not argv:
        return False
    if argv[0] != "-m":
        return Path(argv[0]).stem.removesuffix("-script") == COMMAND
    # The module is the last word before the program's own, or the end of that word: "-m ace_triton", "-mace_triton".
    module = original[-len(argv)]
    return module == PACKAGE or (module.startswith("-") and module.endswith(f"m{PACKAGE}"))


wait_passively()
