"""What a time was measured on: the processor, and the instruction set of the CPU library."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ace_triton.kernels import cpu_library

MACHINE_KEYS = ("processor", "instruction set")
"""The facts of a machine that tell its results apart from others."""


def this_machine() -> dict[str, str]:
    """The processor, and the instruction set that the CPU library uses on it."""
    return {"processor": processor(), "instruction set": cpu_library.isa()}


def processor() -> str:
    """The processor's name, with family and model if Linux reports them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0]
    facts = dict([part.strip() for part in row.split(":", 1)] for row in first.splitlines() if ":" in row)
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def title(facts: Mapping[str, str]) -> str:
    """A machine, by what tells its results apart from others."""
    return ", ".join(facts[key] for key in MACHINE_KEYS)


def find_machine(machines: Sequence[dict[str, Any]], facts: Mapping[str, str]) -> dict[str, Any] | None:
    """The results of a machine in the ``machines`` of a record; None if the record has none."""
    return next((machine for machine in machines if title(machine["environment"]) == title(facts)), None)
