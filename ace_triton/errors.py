"""Every error that this package raises on purpose; :class:`AceError` catches them all."""

from .kernels.errors import AceError, ArgumentError, BackendError, PatternError

__all__ = [
    "AceError",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "GenerationError",
    "PackedError",
    "PackedWeightError",
    "PatternError",
    "PruneError",
    "RecipeError",
    "RecoveryError",
    "StatsError",
    "StudyError",
    "TextError",
]


class CheckpointError(AceError, ValueError):
    """A checkpoint that cannot be read or written. The message says what to do."""


class GenerationError(AceError, ValueError):
    """A prompt that cannot be continued."""


class PackedError(CheckpointError):
    """A packed checkpoint that is damaged, altered, of a newer version, or none."""


class PackedWeightError(AceError, RuntimeError):
    """A packed weight was written to, or changed between its forward and its backward pass."""


class PruneError(AceError, ValueError):
    """A layer that cannot be pruned as asked; nothing was changed."""


class StatsError(AceError, ValueError):
    """Statistics that cannot be used as asked, with what to do."""


class StudyError(AceError, ValueError):
    """A study cannot be started or resumed."""


class TextError(AceError, ValueError):
    """Text that cannot be read, with what can."""


class RecipeError(AceError, ValueError):
    """What is asked for is invalid: an unknown method, option, update or combination."""


class RecoveryError(AceError, ValueError):
    """A recovery that cannot start or resume, with what to do."""
