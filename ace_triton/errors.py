"""The errors that this package raises on purpose. All derive from :class:`AceError`."""

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
    "ProcessError",
    "PruneError",
    "RecipeError",
    "RecoveryError",
    "StatsError",
    "StudyError",
    "TextError",
]


class CheckpointError(AceError, ValueError):
    """A checkpoint cannot be read or written."""


class GenerationError(AceError, ValueError):
    """A prompt cannot be continued."""


class PackedError(CheckpointError):
    """A packed checkpoint is missing, damaged, altered or of a newer version."""


class PackedWeightError(AceError, RuntimeError):
    """A packed weight was written to, or changed between its forward and its backward pass."""


class ProcessError(AceError, RuntimeError):
    """Another process of the run has ended, so this one cannot continue. The other one's error is the cause."""


class PruneError(AceError, ValueError):
    """A layer cannot be pruned with these arguments; it is unchanged."""


class StatsError(AceError, ValueError):
    """Statistics are invalid, or lack what a method needs."""


class StudyError(AceError, ValueError):
    """A study cannot be started or resumed."""


class TextError(AceError, ValueError):
    """Text cannot be read or tokenized, or is too short."""


class RecipeError(AceError, ValueError):
    """A recipe is invalid: a method, option or update is unknown, or they do not go together."""


class RecoveryError(AceError, ValueError):
    """A recovery cannot start, resume or continue."""
