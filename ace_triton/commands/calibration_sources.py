"""What a model that is no causal language model is calibrated on, by the options of ``ace-triton prune``."""

from __future__ import annotations

import hashlib

from ..errors import ArgumentError
from ..inputs.calibration import SELF, read_calibration
from ..inputs.model_inputs import Reads, Sources, sources_of
from ..inputs.model_task import ModelTask
from .recipe_file import CalibrationSettings, digest_of, with_digest
from .sources import check_length

TEXT_ALONE = Reads(frozenset({"input_ids"}))
"""What a model reads whose class is not known before it is loaded."""


def read_sources(source: str, task: ModelTask, settings: CalibrationSettings) -> tuple[CalibrationSettings, Sources]:
    """The calibration settings with the text's digest, and the text and files; the model is not loaded.

    Args:
        source: the model.
        task: what it is loaded for.
        settings: as the options say.

    Raises:
        AceError: if the model does not read what is given or needs more, or a text or a folder cannot be used.
    """
    model_class = task.model_class
    what = task.auto_class if model_class is None else model_class.__name__
    media = settings.images is not None or settings.audio is not None
    if settings.bos != "auto":
        raise ArgumentError(f"--bos is for causal language models on text alone: leave it out for a {what}")
    if settings.text == SELF:
        raise ArgumentError(f"--calibration {SELF}: only causal language models write text; name a text")
    reads = TEXT_ALONE if model_class is None else Reads.of(model_class.forward, task.name)  # type: ignore[attr-defined]
    if not media and not reads.images and not reads.audio:
        check_length(source, settings.length, "--length")
    found = sources_of(
        reads,
        what,
        lambda: list(read_calibration(settings.text)),
        text=settings.text,
        images=settings.images,
        audio=settings.audio,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    return with_digest(settings, _digest_of(found)), found


def _digest_of(sources: Sources) -> str | None:
    """The digest of all that a model is calibrated on: documents, and files in order with the texts beside them."""
    of_text = None if sources.documents is None else digest_of(sources.documents)
    files = [*sources.images, *sources.audio]
    if not files:
        return of_text
    digests = [hashlib.sha256(file.path.read_bytes()).hexdigest() + (file.text or "") for file in files]
    return digest_of([*digests, of_text or ""])
