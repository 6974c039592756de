"""Make a smaller dense model from a model: remove channels, key-value groups, experts or blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..decoders.calibration_forms import Calibration
from .report import ShrinkReport
from .run import Progress, Run
from .settings import ShrinkSettings, settings_of


@dataclass(frozen=True)
class Shrunk:
    """The result of :func:`shrink_model`.

    Attributes:
        model: the smaller model, of the same class, in evaluation mode; None after a dry run.
        report: what was removed.
    """

    model: Any
    report: ShrinkReport


def shrink_model(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    ratio: float = 0.2,
    method: str = "saap",
    settings: ShrinkSettings | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Shrunk:
    """Make a smaller dense model by structured pruning. The given model does not change.

    All blocks of the smaller model have the same widths, so its checkpoint is an ordinary one: ``save_pretrained``
    writes it and ``from_pretrained`` of plain transformers loads it. With ``widths="uneven"`` feed-forwards have
    different widths, and :func:`ace_triton.load_model` loads it. What can be removed is found on the model: channels of
    the feed-forward, key-value groups with their query heads, experts of mixtures, or whole blocks (method "depth"). A
    trial run proves that nothing else depends on them, and a second one that the smaller model computes what the dense
    model computes without them.

    Args:
        model: a transformers model with its weights in memory, in any floating dtype.
        calibration: as for :func:`~ace_triton.prune_blocks.prune_model`. None is allowed for method "magnitude" without
            an update.
        ratio: least share of the blocks' parameters to remove.
        method: "saap", "flap", "llm-pruner", "wanda-sp", "magnitude" or "depth".
        settings: all settings at once, instead of ratio, method and options.
        dry_run: only find what would be removed, with estimates of memory and time; the result has no model.
        progress: called with the name of a stage, and the number of steps done and of all steps.
        options: other fields of :class:`~ace_triton.structures.settings.ShrinkSettings`.

    Raises:
        RecipeError: if a setting is invalid.
        ArgumentError: if the model's structures cannot be removed, the ratio leaves nothing, or the text does not fit
            the model. The message names the reason.
    """
    chosen = settings_of(settings, ratio, method, options)
    return Shrunk(*Run(model, calibration, chosen, progress).result(dry_run))
