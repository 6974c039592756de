"""The saved state from which an interrupted recovery resumes."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RecoveryError
from ..solvers.kept_adamw import KeptAdamW

FORMAT = "ace_triton.recovery.4"

_COUNTERS = {"steps": int, "seconds": float, "cpu_seconds": float}


@dataclass
class RecoveryState:
    """Progress of a training.

    Attributes:
        fingerprint: digest of the settings, text and models of the training (:func:`fingerprint`).
        steps, seconds: number of steps, and wall-clock time so far.
        cpu_seconds: CPU time of all processes over the same span, all threads together.
        losses: loss of each step.
    """

    fingerprint: str
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, path: str | Path | None, fingerprint: str, optimizer: KeptAdamW) -> RecoveryState:
        """A new state, or the state in a file, whose weights and moments are loaded into the optimizer.

        Args:
            path: path of the file. None, or a path without a file, gives a new state.
            fingerprint: fingerprint of this training.
            optimizer: a new optimizer.

        Raises:
            RecoveryError: the file cannot be read, is damaged, or belongs to another training.
        """
        if path is None or not Path(path).is_file():
            return cls(fingerprint)
        try:
            saved: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise RecoveryError(f"{path}: cannot be read as the state of a recovery ({error}); remove it") from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise RecoveryError(f"{path}: is not the state of a recovery of this version ({FORMAT}); remove it")
        if saved.get("fingerprint") != fingerprint:
            raise RecoveryError(
                f"{path}: is the state of a recovery with other settings, text, weights or teacher; remove it, or "
                "repeat that recovery's command"
            )
        try:
            for name, kind in _COUNTERS.items():
                if not isinstance(saved.get(name), kind) or not 0 <= saved[name] < math.inf:
                    raise RecoveryError(f"invalid {name}")
            losses = saved.get("losses")
            if not isinstance(losses, list) or len(losses) != saved["steps"] or not all(map(_is_finite, losses)):
                raise RecoveryError("invalid losses")
            optimizer.load_state_dict(saved.get("optimizer"))
        except ValueError as error:
            raise RecoveryError(f"{path}: the state of a recovery is damaged ({error}); remove it") from error
        return cls(fingerprint, losses=losses, **{name: saved[name] for name in _COUNTERS})

    def record(self, loss: float, seconds: float, cpu_seconds: float) -> None:
        """Add a step that ended this many seconds after the start."""
        self.steps += 1
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self.losses.append(loss)

    def save(self, path: str | Path, optimizer: KeptAdamW) -> None:
        """Write the file atomically; raise OSError and leave the old file unchanged if that fails."""
        target, partial = Path(path), _partial(path)
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **{name: getattr(self, name) for name in _COUNTERS},
            "losses": self.losses,
            "optimizer": optimizer.state_dict(),
        }
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            os.replace(partial, target)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            raise OSError(
                f"{path}: the state of the recovery could not be written ({error}); the same call resumes from the "
                "last saved state"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def spent_before(path: str | Path | None) -> tuple[int, float] | None:
    """Steps and seconds in the state in a file, whose tensors are not read; None if there is no valid state."""
    if path is None or not Path(path).is_file():
        return None
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return None
    steps, seconds = (saved.get(name) if isinstance(saved, dict) else None for name in ("steps", "seconds"))
    return (steps, seconds) if isinstance(steps, int) and isinstance(seconds, float) else None


def saved_steps(path: str | Path | None) -> int | None:
    """Number of steps in the state in a file; None if there is no valid state."""
    spent = spent_before(path)
    return None if spent is None else spent[0]


def remove_state(path: str | Path) -> None:
    """Remove the file, and the partial file that a kill may have left."""
    for file in (Path(path), _partial(path)):
        file.unlink(missing_ok=True)


def _partial(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name}.partial")


def _is_finite(loss: object) -> bool:
    return isinstance(loss, float) and math.isfinite(loss)


def fingerprint(settings: object, text: bytes, *models: nn.Module) -> str:
    """A digest that differs if two trainings differ.

    Args:
        settings: hashed by their ``repr``.
        text: bytes that identify the text.
        models: hashed by all bits of their parameters and buffers.
    """
    tensors = [(name, tensor) for model in models for name, tensor in model.state_dict().items()]
    digest = hashlib.sha256(f"{settings!r}\n".encode())
    digest.update(hashlib.sha256(text).digest())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, _), part in zip(tensors, pool.map(_digest_of, (tensor for _, tensor in tensors)), strict=True):
            digest.update(f"{name} ".encode() + part)
    return digest.hexdigest()


def _digest_of(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@contextmanager
def locked(path: str | Path | None) -> Iterator[None]:
    """Hold the lock of ``path``, a file that may not exist yet; None locks nothing.

    Raises:
        RecoveryError: another process holds the lock.
    """
    if path is None:
        yield
        return
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(lock)
    if file is None:
        raise RecoveryError(f"{path}: another process runs this recovery; wait until it ends, or stop it")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _lock(lock: Path) -> int | None:
    """Open and lock the file at a path. Returns its descriptor; None if another process holds the lock."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.fstat(file).st_ino == lock.stat().st_ino:
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        os.close(file)
