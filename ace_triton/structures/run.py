"""One run of structured pruning: finds structures, ranks them, chooses widths, and builds and checks the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, Calibration, batches_of, trial_batch
from ..decoders.blocks import Tower, find_towers
from ..decoders.calibration_mode import calibration_mode
from ..errors import ArgumentError
from .budget import (
    Share,
    block_parameters,
    checkpoint_bytes,
    kept_structures,
    n_parameters,
    needed_parameters,
    possible_shares,
)
from .compensation import Repair, mean_in_bias, repairs, write_repairs
from .coupled import NAMES, Structures, find_structures, outputs_of, same_outputs
from .depth import block_influences, kept_blocks
from .estimate import Estimate, memory_phases
from .gradients import batch_loss
from .importance import Importance, InputStats, importance_of, input_statistics, merged, weight_of
from .report import ShrinkReport
from .settings import ShrinkSettings
from .smaller import (
    Changes,
    Kept,
    bias_changes,
    build,
    column_mask,
    depth_changes,
    kept_tensors,
    masked,
    skipped,
    text_config,
    width_changes,
    without_unfit_kinds,
)
from .speed import needed_for_speed

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of steps done and of all steps."""

TOKENS_OF_A_BATCH = 512
"""Number of tokens in a batch: a step of the gradient, and a sample of the stability."""

TRIED_BATCHES = 4
"""Number of batches on which possible shares are compared."""

Tensors = dict[str, torch.Tensor]


@dataclass
class Earlier:
    """What runs on one model and calibration set have found, so that later runs with other settings reuse it.

    Attributes:
        structures: the structures; None before the first run.
        stats: statistics of the dense model's inputs; None if no run needed them.
        importance: by the settings that it depends on.
        influence: of blocks, with the sizes of their tuples; None if no run needed it.
        seconds: time that each part took, by a name of it.
    """

    structures: Structures | None = None
    stats: InputStats | None = None
    importance: dict[object, Importance] = field(default_factory=dict)
    influence: tuple[torch.Tensor, list[int | None]] | None = None
    seconds: dict[object, float] = field(default_factory=dict)


class Run:
    """One run of :func:`~ace_triton.structures.shrink.shrink_model`, with its arguments.

    Args:
        model, calibration, settings, progress: as for ``shrink_model``.
        earlier: what earlier runs on the same model and calibration set have found; this run adds to it.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration | None,
        settings: ShrinkSettings,
        progress: Progress | None = None,
        earlier: Earlier | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._settings, self._progress, self._clock = model, settings, progress, clock
        self._earlier = earlier or Earlier()
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []
        text_config(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ArgumentError("the model's weights are not in memory, and shrink does not stream: load it whole")
        if any(not p.is_floating_point() or p.element_size() < 2 for p in model.parameters()):
            raise ArgumentError(
                f"{type(model).__name__} has quantized weights: shrink the floating-point model, then quantize the "
                "result"
            )
        if calibration is None and settings.needs_text:
            raise ArgumentError(
                f"method {settings.method!r} with update {settings.chosen_update!r} needs calibration text: give token "
                "ids (magnitude with update 'none' needs none)"
            )
        self._batches = [] if calibration is None else _batches(model, calibration)
        self._trial = trial_batch(model, self._batches)
        towers = find_towers(model, self._trial if self._batches else None)
        reached = [tower for tower in towers if tower.is_reached]
        if len(reached) != 1:
            raise ArgumentError(
                f"{type(model).__name__} has {len(reached)} towers of blocks "
                f"({', '.join(tower.name for tower in reached)}), and structured pruning takes a model with one: give "
                "the language model alone, or prune to n:m"
            )
        self._tower: Tower = reached[0]
        self._needed = needed_parameters(model, self._tower.blocks, settings)

    def result(self, dry_run: bool) -> tuple[nn.Module | None, ShrinkReport]:
        """The smaller model, and what was removed; no model after a dry run."""
        return self._without_blocks(dry_run) if self._settings.method == "depth" else self._narrower(dry_run)

    def _without_blocks(self, dry_run: bool) -> tuple[nn.Module | None, ShrinkReport]:
        model, blocks = self._model, self._tower.blocks
        with self._stage("importance", "influence") as step:
            found = self._earlier.influence or block_influences(model, self._tower, self._batches, step)
            influence, sizes = self._earlier.influence = found
        kept = kept_blocks(influence, self._tower, self._needed)
        gone = tuple(index for index in range(len(blocks)) if index not in kept)
        tensors = kept_tensors(model, Structures({}, {}, {}), blocks, Kept({}, kept))
        changes = depth_changes(model, len(blocks), kept, tensors)
        estimate = self._estimate(Structures({}, {}, {}), {}, tensors) if dry_run else None
        parameters = sum(p.numel() for index in gone for p in blocks[index].module.parameters())
        smaller = None
        if not dry_run:
            with self._stage("build and check"):
                smaller = build(model, changes, tensors)
                with skipped([blocks[index] for index in gone], [sizes[index] for index in gone]):
                    self._check(smaller, "blocks")
        widths = {"blocks": (len(blocks), len(kept))}
        return smaller, self._report(
            smaller, widths, changes, parameters, tensors, removed_blocks=gone, estimate=estimate
        )

    def _narrower(self, dry_run: bool) -> tuple[nn.Module | None, ShrinkReport]:
        model, settings, blocks = self._model, self._settings, self._tower.blocks
        with self._stage("find structures", "structures"):
            structures = self._earlier.structures or without_unfit_kinds(
                model, find_structures(model, blocks, self._trial), blocks
            )
            self._earlier.structures = structures
        if not structures.coupled:
            reasons = "; ".join(f"{NAMES[kind]}: {reason}" for kind, reason in structures.refused.items())
            raise ArgumentError(
                f"no structure of {type(model).__name__} can be removed ({reasons}); remove blocks (--method depth)"
            )
        if settings.speedup is None:
            needed = self._needed
        else:
            with self._stage("time a block"):
                needed, gain = needed_for_speed(model, structures, blocks, settings, self._trial, self._clock)
            self._notes.append(f"a block runs {gain:.2f} times as fast on one token here")
        shares = possible_shares(structures, blocks, settings, needed)
        stats: InputStats | None = None
        if settings.needs_statistics:
            with self._stage("statistics", "statistics") as step:
                stats = self._earlier.stats or input_statistics(model, structures, self._batches, step)
                self._earlier.stats = stats
        ranking = settings.ranking
        with self._stage("importance", ranking) as step:
            importance = self._earlier.importance.get(ranking) or importance_of(
                model, structures, self._batches, settings, stats, step
            )
            self._earlier.importance[ranking] = importance
        with self._stage("compare shares"):
            share, tried = self._best(shares, structures, importance)
        kept, left = kept_structures(structures, importance, share), share.left(structures)
        tensors = kept_tensors(model, structures, blocks, Kept(kept))
        changes = width_changes(model, structures, left, tensors)
        estimate = self._estimate(structures, kept, tensors) if dry_run else None
        smaller: nn.Module | None = None
        repaired: dict[str, Repair] = {}
        if not dry_run:
            with self._stage("build and check"):
                smaller = build(model, changes, tensors)
                with masked(structures, kept):
                    self._check(smaller, "structures")
            if settings.chosen_update != "none":
                del smaller
                with self._stage("update") as step:
                    changes, tensors, repaired = self._repaired(structures, kept, changes, tensors, stats, step)
                    smaller = build(model, changes, tensors)
        return smaller, self._report(
            smaller,
            {kind: (structures.count(kind), left.get(kind, structures.count(kind))) for kind in structures.coupled},
            changes,
            share.parameters,
            tensors,
            estimate=estimate,
            kept={name: chosen.tolist() for name, chosen in kept.items()},
            refused={NAMES[kind]: reason for kind, reason in structures.refused.items()},
            tried=tried,
            output_error=_mean_errors(repaired),
        )

    def _best(
        self, shares: Sequence[Share], structures: Structures, importance: Mapping[str, torch.Tensor]
    ) -> tuple[Share, dict[int, float]]:
        """The share with the lowest loss on the first batches, and the losses by number of groups."""
        if len(shares) == 1 or not self._batches:
            return shares[0], {}  # The fewest groups: heads are worth more than channels.
        with calibration_mode(self._model):
            tried = {
                share.groups: self._loss(structures, kept_structures(structures, importance, share)) for share in shares
            }
        return min(shares, key=lambda share: tried[share.groups]), tried

    def _loss(self, structures: Structures, kept: Mapping[str, torch.Tensor]) -> float:
        """The loss without the structures that are not kept; for a model without logits, the error of its outputs."""
        losses = []
        for batch in self._batches[:TRIED_BATCHES]:
            try:
                with masked(structures, kept):
                    losses.append(float(batch_loss(self._model, batch)))
            except ArgumentError:
                dense = outputs_of(self._model, batch)
                with masked(structures, kept):
                    pairs = zip(outputs_of(self._model, batch), dense, strict=True)
                    losses.append(sum(float((one - two).norm() / two.norm()) for one, two in pairs))
        return sum(losses) / len(losses)

    def _repaired(
        self,
        structures: Structures,
        kept: Mapping[str, torch.Tensor],
        changes: Changes,
        tensors: Tensors,
        stats: InputStats | None,
        step: Callable[..., None],
    ) -> tuple[Changes, Tensors, dict[str, Repair]]:
        """The changes of the configuration and the tensors after the update, and the repair of each layer."""
        entries = structures.columns
        experts = {name: chosen for name, chosen in kept.items() if name in structures.mixtures}
        kept = {name: chosen for name, chosen in kept.items() if name in entries}
        if experts:
            self._notes.append("no update makes up for removed experts; it is for channels and key-value groups")
        with_bias = {name for name in kept if f"{name}.bias" in tensors}
        if self._settings.chosen_update == "bias":
            kinds = {entries[name].kind for name in kept}
            consumers = {kind: [n for n in kept if entries[n].kind == kind] for kind in kinds}
            changes, tensors = bias_changes(self._model, changes, tensors, consumers)
            with_bias = {name for name in kept if f"{name}.bias" in tensors}
            assert stats is not None
            repaired = {}
            for name in kept:
                mask = column_mask(entries[name], structures.layers[name], kept[name])
                repaired[name] = mean_in_bias(weight_of(structures, entries[name]), mask, merged(stats[name]))
            if missing := sorted({entries[name].kind for name in kept if name not in with_bias}):
                which = " and ".join(NAMES[kind] for kind in missing)
                self._notes.append(f"no bias was written for {which}: {type(self._model).__name__} has no place for it")
        else:
            settings, batches = self._settings, self._batches
            with masked(structures, experts):
                repaired = repairs(
                    self._model, self._tower, batches, structures, kept, settings, frozenset(with_bias), step
                )
        return changes, write_repairs(tensors, repaired, structures, frozenset(with_bias)), repaired

    def _estimate(self, structures: Structures, kept: Mapping[str, torch.Tensor], tensors: Tensors) -> Estimate:
        """What the run would take; the least squares of two blocks are timed for it."""
        done = sum(self._seconds.values())
        solved = {name: chosen for name, chosen in kept.items() if name in structures.columns}
        seconds = 0.0
        if self._settings.chosen_update == "lstsq" and solved:
            times = [self._clock()]
            experts = {name: chosen for name, chosen in kept.items() if name in structures.mixtures}
            with_bias = frozenset(name for name in solved if f"{name}.bias" in tensors)
            with self._stage("time two blocks"), masked(structures, experts):
                repairs(
                    self._model,
                    self._tower,
                    self._batches,
                    structures,
                    solved,
                    self._settings,
                    with_bias,
                    lambda *_: times.append(self._clock()),
                    most=2,
                )
            seconds = times[1] - times[0] + (times[-1] - times[-2]) * (len(self._tower.blocks) - 1)
        phases = memory_phases(self._model, structures, self._batches, tensors, self._settings)
        weights = sum(parameter.nbytes for parameter in set(self._model.parameters()))
        return Estimate(phases, done + seconds, weights)

    def _check(self, smaller: nn.Module, without: str) -> None:
        """ArgumentError if the smaller model does not compute what the dense one does, whose parts are hidden now."""
        with calibration_mode(self._model), calibration_mode(smaller):
            if not same_outputs(outputs_of(smaller, self._trial), outputs_of(self._model, self._trial)):
                raise ArgumentError(
                    f"{type(self._model).__name__}: a model of the smaller configuration computes something else than "
                    f"this model without the removed {without}, so its family is not supported; prune to n:m instead"
                )

    def _report(
        self,
        smaller: nn.Module | None,
        widths: Mapping[str, tuple[int, int]],
        changes: Changes,
        removed: int,
        tensors: Tensors,
        **facts: Any,
    ) -> ShrinkReport:
        blocks, model = block_parameters(self._tower.blocks), n_parameters(self._model)
        if smaller is not None:  # New biases count too.
            removed = model - n_parameters(smaller)
        return ShrinkReport(
            self._settings,
            blocks,
            blocks - removed,
            model,
            model - removed,
            widths,
            changes,
            notes=tuple(self._notes),
            seconds=dict(self._seconds),
            bytes_before=checkpoint_bytes(self._model.state_dict()),
            bytes_after=checkpoint_bytes(tensors),
            **facts,
        )

    @contextmanager
    def _stage(self, name: str, part: object = None) -> Iterator[Callable[..., None]]:
        """A context whose time is recorded; it gives a function that shows progress.

        Args:
            name: the stage.
            part: what of :class:`Earlier` is found inside. Its first time counts, also in a run that reuses it.
        """
        started = self._clock()

        def step(done: int, total: int, *_: object) -> None:
            if self._progress is not None:
                self._progress(name, done, total)

        step(0, 1)
        yield step
        step(1, 1)
        seconds = self._clock() - started
        if part is not None:
            seconds = self._earlier.seconds.setdefault(part, seconds)
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _batches(model: nn.Module, calibration: Calibration) -> list[Batch]:
    """Batches of about TOKENS_OF_A_BATCH tokens each."""
    if isinstance(calibration, (list, tuple)):
        return batches_of(model, calibration, None)
    ids = calibration if isinstance(calibration, torch.Tensor) else getattr(calibration, "ids", None)
    length = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else TOKENS_OF_A_BATCH
    return batches_of(model, calibration, max(1, TOKENS_OF_A_BATCH // max(length, 1)))


def _mean_errors(repaired: Mapping[str, Repair]) -> tuple[float, float] | None:
    if not repaired:
        return None
    count = len(repaired)
    return sum(r.lost for r in repaired.values()) / count, sum(r.left for r in repaired.values()) / count
