"""Why the compiled step does not decode a model."""

from ..errors import GenerationError


class StepRefusedError(GenerationError):
    """The compiled step does not decode this model, or not this call.

    Attributes:
        reason: why, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the compiled step does not decode this model: {reason}; transformers decodes it")
        self.reason = reason
