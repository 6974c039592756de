"""Describe a calibration text, and warn if it is repetitive or if the dense model hardly predicts it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .evaluate import perplexity_of
from .inputs.calibration import Calibration

SPAN = 16
"""Length in tokens of the spans that are compared. A span is repeated if the same span occurred before."""

MOST_REPEATED = 0.5
"""Share of repeated spans above which the report warns."""

TRIAL_TOKENS = 512
"""Approximate number of calibration tokens for the perplexity of the dense model."""

ADVICE = "Calibrate on text like the text that the model will be used on."


@dataclass(frozen=True)
class CalibrationReport:
    """Facts about a calibration text.

    Attributes:
        source: name of the text, without folders; "self" if the model wrote it.
        sequences, length: number of calibration sequences, and number of tokens in each.
        bos: the beginning of the sequences: "each (1)" or "stream (1)" with the token id, or "none".
        documents, distinct_documents: number of documents read from the source; None if the model wrote the text.
        text_tokens: number of tokens in all documents; None if the model wrote the text.
        distinct_tokens: number of different token ids in the sequences.
        repeated: share of the spans of SPAN tokens that occurred before in the sequences.
        perplexity: perplexity of the dense model on the first sequences; None if it is not finite.
        limit: perplexity above which the report warns: the square root of the vocabulary size. Above it, the model
            needs more than half the bits of a uniform guess.
    """

    source: str
    sequences: int
    length: int
    bos: str
    documents: int | None
    distinct_documents: int | None
    text_tokens: int | None
    distinct_tokens: int
    repeated: float
    perplexity: float | None
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {**asdict(self), "warnings": self.warnings()}

    def lines(self) -> list[str]:
        """Text for the user: what was read, and one line of advice."""
        origin = "written by the model itself"
        if self.documents is not None:
            many = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
            if self.distinct_documents != self.documents:
                many += f", {self.distinct_documents:,} distinct"
            origin = f"from {self.source} ({many}, {self.text_tokens:,} tokens)"
        predicted = "" if self.perplexity is None else f"; dense perplexity on it: {self.perplexity:.1f}"
        return [
            f"calibration: {self.sequences} sequences of {self.length} tokens {origin}, "
            f"{self.distinct_tokens:,} distinct tokens, {self.repeated:.0%} repeated, bos: {self.bos}{predicted}",
            ADVICE,
        ]

    def warnings(self) -> list[str]:
        """Reasons not to use this text; empty if there are none."""
        found = []
        if self.repeated > MOST_REPEATED:
            documents = "" if self.documents is None else f" (distinct documents: {self.distinct_documents:,})"
            found.append(
                f"{self.repeated:.0%} of the calibration text repeats itself{documents}: pruning would fit these few "
                "passages; give more text, or more varied text"
            )
        if self.perplexity is None or self.perplexity > self.limit:
            value = "not finite" if self.perplexity is None else f"{self.perplexity:.0f}"
            found.append(
                f"the dense model hardly predicts the calibration text (perplexity {value}, warned above "
                f"{self.limit:.0f}): it is unlike the text that the model was trained on; give text in the model's "
                "language and domain"
            )
        return found


def report_on(calibration: Calibration, model: Any, source: str) -> CalibrationReport:
    """Examine calibration sequences, and run the dense model on the first ones.

    Args:
        calibration: the result of :func:`~ace_triton.inputs.calibration.load_calibration`.
        model: the model before pruning.
        source: name of the text.
    """
    sequences, length = calibration.ids.shape
    begun = len(calibration.beginning.of_each)
    first = calibration.ids[: max(1, TRIAL_TOKENS // length)]
    measured = perplexity_of(model, first, skipped=max(1, begun))
    return CalibrationReport(
        source=Path(source).name if Path(source).exists() else source,
        sequences=sequences,
        length=length,
        bos=str(calibration.beginning),
        documents=calibration.documents,
        distinct_documents=calibration.distinct_documents,
        text_tokens=calibration.text_tokens,
        distinct_tokens=len(calibration.ids.unique()),
        repeated=repeated_share(calibration.ids[:, begun:]),
        perplexity=measured if math.isfinite(measured) else None,
        limit=math.sqrt(next(model.get_input_embeddings().parameters()).shape[0]),
    )


def repeated_share(sequences: torch.Tensor, span: int = SPAN) -> float:
    """Share of the spans of consecutive tokens that are equal to an earlier span.

    Args:
        sequences: int64 [n_sequences, length].
        span: tokens in a span; a shorter sequence is one span.
    """
    span = min(span, sequences.shape[1])
    count = sequences.shape[1] - span + 1
    hashed = torch.zeros(len(sequences), count, dtype=torch.int64, device=sequences.device)
    for offset in range(span):
        hashed = hashed * 6364136223846793005 + sequences[:, offset : offset + count] + 1442695040888963407
    return 1 - len(hashed.unique()) / hashed.numel()
