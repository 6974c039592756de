"""What a recovery goes on from after a kill."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .kept_adamw import KeptAdamW

FORMAT = "ace_triton.recovery.3"


@dataclass
class RecoveryState:
    """How far a training has come.

    Attributes:
        fingerprint: of its settings and text.
        steps, seconds: taken so far.
        cpu_seconds: of the process, all threads together, over the same span.
        losses: one a step.
    """

    fingerprint: str
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        path: str | Path | None,
        settings: object,
        text: bytes,
        optimizer: KeptAdamW,
    ) -> RecoveryState:
        """From the start; or from a file, into the optimiser and its parameters.

        Args:
            path: of the file, if there is one; None for none.
            settings: of the training; their ``repr`` tells them from others.
            text: what tells its text from another.
            optimizer: at its start.

        Raises:
            ValueError: a file that cannot be read, or of a training with other settings, text or weights.
        """
        shapes = [(name, tuple(parameter.shape)) for name, parameter in optimizer.values.items()]
        digest = hashlib.sha256(f"{settings!r} {shapes!r}".encode())
        digest.update(text)
        fresh = cls(digest.hexdigest())
        if path is None or not Path(path).is_file():
            return fresh
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as the state of a recovery ({error}); remove it") from error
        if saved.get("format") != FORMAT or saved["fingerprint"] != fresh.fingerprint:
            raise ValueError(
                f"{path}: the state of a recovery with other settings, text or weights; remove it, or give the same"
            )
        optimizer.load_state_dict(saved["optimizer"])
        return cls(fresh.fingerprint, saved["steps"], saved["seconds"], saved["cpu_seconds"], saved["losses"])

    def record(self, loss: float, seconds: float, cpu_seconds: float) -> None:
        """A step was taken, at so many seconds from the start."""
        self.steps += 1
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self.losses.append(loss)

    def save(self, path: str | Path, optimizer: KeptAdamW) -> None:
        """Write the file so that it is either the old one or the whole new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "losses": self.losses,
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, partial)
        os.replace(partial, target)
