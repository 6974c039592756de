"""The errors of the kernels, and the base of every error that this package raises on purpose."""


class AceError(Exception):
    """Base of all errors that name a mistake in what was given, and what to do about it."""


class ArgumentError(AceError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class PatternError(AceError, ValueError):
    """The n:m pattern or the sparsity is invalid, or does not fit the weight."""


class BackendError(AceError, RuntimeError):
    """The requested backend cannot serve this tensor."""
