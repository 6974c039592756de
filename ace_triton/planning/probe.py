"""Estimate the time of a pruning run: prune two blocks of the model on a few tokens."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..block_fit import HELD_OUT
from ..decoders.blocks import Block
from ..errors import AceError, ArgumentError
from ..inputs.model_source import open_safetensors, reason, safetensors_files
from ..model_report import ModelReport
from ..prune_blocks import prune_model
from ..recipe import Recipe
from .layers import PlannedModel, kind_of
from .memory import Calibrated
from .skeleton import Skeleton

SEQUENCES, LENGTH = 2, 128
"""Number of sequences of a probe, and the most tokens of each."""

SPREAD = 0.02
"""Standard deviation of weights whose values are not in the model's files under their own names."""


@dataclass(frozen=True)
class Estimate:
    """The estimated time of a run, without loading, reading text and saving.

    Attributes:
        seconds: time of all blocks.
        stages: the same by stage, as in :attr:`~ace_triton.model_report.ModelReport.seconds`.
        blocks: names of the blocks that were pruned for the estimate.
        real_weights: True if these blocks had their own weights; False if random ones.
        probe_seconds: time that the estimate took.
    """

    seconds: float
    stages: dict[str, float]
    blocks: tuple[str, ...]
    real_weights: bool
    probe_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def estimate(built: Skeleton, layers: PlannedModel, recipe: Recipe, calibrated: Calibrated | None) -> Estimate:
    """Prune two blocks with their real weights on a few tokens, and scale the times to the whole model.

    The blocks are of the kind with the most parameters. Afterwards the model's weights have no meaning.

    Raises:
        ArgumentError: if the blocks cannot run alone.
    """
    started = time.perf_counter()
    model, blocks = built.model, _typical(layers.plan.blocks)
    real = _fill(built, blocks)
    length = LENGTH if calibrated is None else min(LENGTH, calibrated.length)
    ids = torch.arange(SEQUENCES * length, dtype=torch.int64, device="cpu") % _vocabulary(model)
    probed = replace(recipe, budgets=None, include=None, exclude=())
    tokens = None if calibrated is None else ids.view(SEQUENCES, length)
    try:
        with only(model, layers.plan.blocks, blocks), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # One of two sequences is trained on and one held out, if the recipe trains blocks.
            report = prune_model(model, tokens, probed, batch_size=None if _epochs(recipe) == 0 else 1)
    except AceError:
        raise
    except Exception as error:
        raise ArgumentError(f"two blocks of {type(model).__name__} cannot run alone ({reason(error)})") from error
    stages = _scaled(report, layers, len(blocks), calibrated, SEQUENCES * length)
    names = tuple(block.name for block in blocks)
    return Estimate(sum(stages.values()), stages, names, real, time.perf_counter() - started)


def _typical(blocks: Sequence[Block]) -> list[Block]:
    """The first two blocks of the kind that has the most parameters in all, in one list of blocks."""
    sizes: Counter[object] = Counter()
    for block in blocks:
        sizes[kind_of(block.module)] += sum(p.numel() for p in block.module.parameters())
    kind = sizes.most_common(1)[0][0]
    alike = [block for block in blocks if kind_of(block.module) == kind]
    place = _list_of(alike[0])
    return [block for block in alike if _list_of(block) == place][:2]


def _list_of(block: Block) -> str:
    return block.name.rpartition(".")[0]


@contextmanager
def only(model: nn.Module, blocks: Sequence[Block], kept: list[Block]) -> Iterator[None]:
    """A context in which the model has only some of its blocks."""
    parent, _, key = _list_of(kept[0]).rpartition(".")
    owner: Any = model.get_submodule(parent)
    whole = getattr(owner, key)
    try:
        setattr(owner, key, nn.ModuleList([block.module for block in kept]))
        yield
    finally:
        setattr(owner, key, whole)


def _fill(built: Skeleton, blocks: list[Block]) -> bool:
    """Give the blocks their weights from the model's files, or random ones; returns True for the files."""
    stored = _places(built.source.path)
    inside = {p for block in blocks for p in block.module.parameters()}
    generator, real = torch.Generator().manual_seed(0), True
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            if parameter in inside and name in stored:
                with open_safetensors(stored[name]) as file:
                    parameter.copy_(file.get_tensor(name))
            elif parameter in inside or parameter.dim() < 2:
                real = real and parameter not in inside
                parameter.fill_(0.0 if "bias" in name else 1.0) if parameter.dim() < 2 else parameter.normal_(
                    std=SPREAD, generator=generator
                )
        # Only these rows are read, so that the rest of a large table takes no memory.
        table = next(built.model.get_input_embeddings().parameters())
        table[: SEQUENCES * LENGTH].normal_(generator=generator)
    return real


def _places(folder: Path | None) -> dict[str, Path]:
    """The file of each stored tensor, by name."""
    found: dict[str, Path] = {}
    for path in [] if folder is None or not folder.is_dir() else safetensors_files(folder):
        with open_safetensors(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _epochs(recipe: Recipe) -> int:
    return 0 if recipe.update is None else recipe.update.block_epochs


def _vocabulary(model: Any) -> int:
    return int(next(model.get_input_embeddings().parameters()).shape[0])


def _scaled(
    report: ModelReport, layers: PlannedModel, blocks: int, calibrated: Calibrated | None, probe_tokens: int
) -> dict[str, float]:
    """The time of each stage for the whole model, from the report on some blocks of it."""
    seconds, recipe = report.seconds, report.recipe
    planned = sum(layer.elements for unit in layers.units for layer in unit.layers if layer.is_pruned)
    share = planned / max(sum(layer.parameters for layer in report.layers), 1)
    rotate = ("rotate",) if recipe.rotate else ()
    quantize = ("quantize",) if recipe.quantize is not None else ()
    stages = {name: getattr(seconds, name) * share for name in (*rotate, "permute", "select", "update", *quantize)}
    if calibrated is not None and recipe.needs.tokens:
        tokens = calibrated.samples * calibrated.length / probe_tokens
        stages["statistics"] = seconds.statistics * share * tokens
        if epochs := _epochs(recipe):
            # A step takes about three forwards, a measurement one; the dense outputs take one, too.
            costs = [1 + 3 * epochs * trained + (epochs + 1) * (1 - trained) for trained in (1 - 1 / HELD_OUT, 0.5)]
            stages["block_fit"] = seconds.block_fit * share * tokens * costs[0] / costs[1]
        # Unless the whole model is pruned at once, each block but the last runs again after it is pruned. To rotate
        # its values, it runs once more before.
        twice = recipe.sequential != "none"
        runs = [((2 + recipe.rotate) * count - 1 if twice else count) for count in (layers.blocks, blocks)]
        stages["calibration"] = seconds.calibration * tokens * runs[0] / runs[1]
    return stages
