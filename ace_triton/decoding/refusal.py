"""Why the compiled step does not decode a model."""

from ..errors import GenerationError


class StepRefusedError(GenerationError):
    """The compiled step does not decode this model, or not with these options.

    Args:
        reason: why, in one line.
        what: what the step does not take.

    Attributes:
        reason: why, in one line.
    """

    def __init__(self, reason: str, what: str = "decode this model") -> None:
        super().__init__(f"the compiled step does not {what}: {reason}; transformers decodes it")
        self.reason = reason
