"""What a model that is no causal language model is calibrated on, by the options of ``ace-triton prune``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch

from ..errors import ArgumentError
from ..inputs.calibration import SELF, read_calibration
from ..inputs.companions import Companions
from ..inputs.model_inputs import Reads, Sources, model_inputs, sources_of
from ..inputs.model_source import ModelSource
from ..inputs.model_task import ModelTask
from .recipe_file import CalibrationSettings, digest_of, with_digest
from .sources import check_length

TEXT_ALONE = Reads(frozenset({"input_ids"}))
"""What a model reads whose class is not known before it is loaded."""

SHORT_TEXT = "a short text"
"""What a plan takes in place of a text, which it does not read."""


def read_sources(source: str, task: ModelTask, settings: CalibrationSettings) -> tuple[CalibrationSettings, Sources]:
    """The calibration settings with the digest of what they name, and the text and files; the model is not loaded.

    Args:
        source: the model.
        task: what it is loaded for.
        settings: as the options say.

    Raises:
        RecipeError: if the text or the files are not the recorded ones.
        AceError: if the model does not read what is given or needs more, or a text or a folder cannot be used.
    """
    found = _sources(source, task, settings, lambda: list(read_calibration(settings.text)))
    return with_digest(settings, _digest_of(found)), found


def trial_inputs(
    source: str, task: ModelTask, settings: CalibrationSettings, *, trust_remote_code: bool
) -> dict[str, torch.Tensor] | None:
    """The inputs that a model's processor makes from the first image or sound, with a short text if it reads text.

    No text is read, and the model is not loaded.

    Returns:
        The inputs; None if the model is calibrated on text alone.

    Raises:
        AceError: as for :func:`read_sources`, or if the processor or the file cannot be used.
    """
    sources = _sources(source, task, replace(settings, samples=1), lambda: [SHORT_TEXT])
    if not sources.images and not sources.audio:
        return None
    from transformers import AutoConfig

    found = ModelSource.find(source)
    config = AutoConfig.from_pretrained(
        str(found.path or found.name), trust_remote_code=trust_remote_code, local_files_only=found.offline
    )
    companions = Companions(found, trust_remote_code)
    batches, _ = model_inputs(SimpleNamespace(config=config), companions, _reads(task), sources)
    return batches[0]


def _sources(
    source: str, task: ModelTask, settings: CalibrationSettings, read_text: Callable[[], list[str]]
) -> Sources:
    reads, what = _reads(task), task.auto_class if task.model_class is None else task.model_class.__name__
    media = settings.images is not None or settings.audio is not None
    if settings.bos != "auto":
        raise ArgumentError(f"--bos is for causal language models on text alone: leave it out for a {what}")
    if settings.text == SELF:
        raise ArgumentError(f"--calibration {SELF}: only causal language models write text; name a text")
    if not media and not reads.images and not reads.audio:
        check_length(source, settings.length, "--length")
    return sources_of(
        reads,
        what,
        read_text,
        text=settings.text,
        images=settings.images,
        audio=settings.audio,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def _reads(task: ModelTask) -> Reads:
    return TEXT_ALONE if task.model_class is None else Reads.of(task.model_class.forward, task.name)  # type: ignore[attr-defined]


def _digest_of(sources: Sources) -> str | None:
    """The digest of all that a model is calibrated on: documents, and files in order with the texts beside them."""
    of_text = None if sources.documents is None else digest_of(sources.documents)
    files = [*sources.images, *sources.audio]
    if not files:
        return of_text
    digests = [hashlib.sha256(file.path.read_bytes()).hexdigest() + (file.text or "") for file in files]
    return digest_of([*digests, of_text or ""])
