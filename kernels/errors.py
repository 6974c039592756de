"""Errors of the kernels, and the base class of every error that this package raises on purpose."""

from __future__ import annotations


class AceError(Exception):
    """Base of all errors about invalid input; the message says what was given, what is allowed and what to do."""


class ArgumentError(AceError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class PatternError(AceError, ValueError):
    """The n:m pattern or the sparsity is invalid, or a group of the weight breaks it.

    Attributes:
        row, group: output and group at fault, counted from 0; None if the error is not about one group.
        count: non-zeros of that group, or its kept weights if packed metadata were checked.
    """

    def __init__(
        self, message: str, row: int | None = None, group: int | None = None, count: int | None = None
    ) -> None:
        super().__init__(message)
        self.row, self.group, self.count = row, group, count


class BackendError(AceError, RuntimeError):
    """The requested backend is not available, or cannot run on these tensors."""
