"""Resident memory of a fresh process that loads a model and continues a prompt.

    python -m benchmarks.harness.resident DIR NEW_TOKENS

Prints one JSON object with the fields of :class:`Resident`, in bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer

from ace_triton.formats.registry import load_model
from ace_triton.generation import generate

PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Resident:
    """Resident bytes of one process.

    Attributes:
        after: after the model was loaded and continued a prompt.
        peak: the maximum from start to end.
    """

    after: int
    peak: int


def measure_resident(folder: Path, new_tokens: int) -> Resident:
    """Measure a new process that loads a model, packed or not, and generates ``new_tokens`` tokens on one thread.

    Raises:
        RuntimeError: if the process fails, with its errors as the message.
    """
    words = [sys.executable, "-m", "benchmarks.harness.resident", str(folder.resolve()), str(new_tokens)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(words, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return Resident(**json.loads(done.stdout))


def resident() -> Resident:
    """Resident memory of this process.

    Raises:
        RuntimeError: if the system is not Linux.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("resident memory is read from /proc/self/status, which only Linux has")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return Resident(*(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")))


def main(folder: Path, new_tokens: int) -> None:
    """Load, generate, print."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(folder)
    generate(model, tokenizer, PROMPT, max_new_tokens=new_tokens)
    typer.echo(json.dumps(asdict(resident())))


if __name__ == "__main__":
    typer.run(main)
