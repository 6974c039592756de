"""The errors of the kernels, and the base class of all errors that this package raises on purpose."""


class AceError(Exception):
    """Base class of all errors about a user's input. The message says what was given, what is allowed, what to do."""


class ArgumentError(AceError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class PatternError(AceError, ValueError):
    """The n:m pattern or the sparsity is invalid, or does not fit the weight."""


class BackendError(AceError, RuntimeError):
    """The requested backend is not available, or does not support this tensor."""
