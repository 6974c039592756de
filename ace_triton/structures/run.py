"""One run of structured pruning: finds structures, ranks them, chooses widths, and builds and checks the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..decoders.batches import trial_batch
from ..decoders.blocks import Tower, find_towers
from ..decoders.calibration_forms import Calibration, batches_of
from ..decoders.calibration_mode import calibration_mode
from ..errors import ArgumentError
from .budget import (
    added_parameters,
    block_parameters,
    check_rows,
    checkpoint_bytes,
    kept_structures,
    n_parameters,
    needed_parameters,
    possible_shares,
)
from .choice import NOTHING, Choice
from .compensation import Repair, Stored, mean_in_bias, repaired_tensors, solve_blocks
from .coupled import Entry, find_structures, outputs_of, same_outputs
from .coupled_layers import NAMES
from .depth import block_influences, kept_blocks
from .estimate import Estimate, memory_phases
from .importance import weight_of
from .mixtures import staying_experts
from .ranking import Earlier, Ranked, ranked
from .report import ShrinkReport
from .run_notes import by_kind, notes_on
from .settings import ShrinkSettings
from .shares import best_share
from .smaller import (
    Kept,
    bias_changes,
    build,
    column_mask,
    depth_changes,
    kept_tensors,
    masked,
    shapes_of,
    skipped,
    text_config,
    width_changes,
    without_unfit_kinds,
)
from .speed import needed_for_speed
from .uneven import SHAPES, check_equal_widths
from .weights import InMemory, Weights

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of steps done and of all steps."""

TOKENS_OF_A_BATCH = 512
"""Number of tokens in a batch of token ids: a step of the gradient, and a sample of the stability."""


class Run:
    """One run of :func:`~ace_triton.structures.shrink.shrink_model`, with its arguments.

    Args:
        model, calibration, settings, progress: as for ``shrink_model``.
        earlier: what earlier runs on the same model and calibration set have found; this run adds to it.
        clock: gives the time in seconds.
        weights: where the model's weights are.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration | None,
        settings: ShrinkSettings,
        progress: Progress | None = None,
        earlier: Earlier | None = None,
        clock: Callable[[], float] = time.perf_counter,
        weights: Weights | None = None,
    ) -> None:
        self._model, self._settings, self._progress, self._clock = model, settings, progress, clock
        self._weights = weights or InMemory()
        self._earlier = earlier or Earlier()
        self.seconds: dict[str, float] = {}
        text_config(model)
        check_equal_widths(model.config, type(model).__name__)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ArgumentError(
                "the model's weights are not in memory: load it whole, or shrink it in files with shrink_checkpoint"
            )
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
        tokens = TOKENS_OF_A_BATCH
        self.batches = [] if calibration is None else batches_of(model, calibration, None, tokens)
        self._trial = trial_batch(model, self.batches)
        towers = find_towers(model, self._trial if self.batches else None)
        reached = [tower for tower in towers if tower.is_reached]
        if len(reached) != 1:
            raise ArgumentError(
                f"{type(model).__name__} has {len(reached)} towers of blocks "
                f"({', '.join(tower.name for tower in reached)}), and structured pruning takes a model with one: give "
                "the language model alone, or prune to n:m"
            )
        self.tower: Tower = reached[0]
        self._needed = needed_parameters(model, self.tower.blocks, settings)

    def result(self, dry_run: bool) -> tuple[nn.Module | None, ShrinkReport]:
        """The smaller model, and what was removed; no model after a dry run. The dense model is in memory."""
        choice = self.choice()
        if dry_run:
            return None, self.report(choice, estimate=self._estimate(choice))
        tensors = kept_tensors(self._model.state_dict(), choice.structures, self.tower.blocks, choice.all_kept)
        shapes = self.shapes(choice)
        with self.stage("build and check"):
            smaller = build(self._model, choice.changes, {**shapes, **tensors})
            del tensors
            self.check(smaller, choice)
        errors: list[tuple[float, float]] = []
        if self._settings.chosen_update != "none" and choice.kept_columns:
            with self.stage("update") as step, torch.no_grad():

                def write(index: int, repaired: Mapping[str, Repair]) -> None:
                    for name, tensor in self.repaired_tensors(choice, repaired, smaller.state_dict()).items():
                        smaller.state_dict()[name].copy_(tensor)
                    errors.extend((repair.lost, repair.left) for repair in repaired.values())

                self.update(choice, write, step)
        return smaller, self.report(choice, smaller, errors)

    def choice(self, ranking: Callable[[Callable[[], Ranked]], Ranked] = lambda rank: rank()) -> Choice:
        """What is kept.

        Args:
            ranking: gives the ranking; it calls its argument unless it has the one of an earlier run.
        """
        return self._kept_blocks() if self._settings.method == "depth" else self._kept_structures(ranking)

    def shapes(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The tensors of the smaller model without values, on the meta device."""
        shapes = kept_tensors(shapes_of(self._model), choice.structures, self.tower.blocks, choice.all_kept)
        if self._settings.chosen_update == "bias":
            _, shapes = bias_changes(self._model, choice.changes, shapes, by_kind(choice.structures, choice.kept))
        return shapes

    def _kept_blocks(self) -> Choice:
        model, blocks = self._model, self.tower.blocks
        with self.stage("importance", "influence") as step:
            found = self._earlier.influence or block_influences(model, self.tower, self.batches, self._weights, step)
            influence, sizes = self._earlier.influence = found
        kept = kept_blocks(influence, self.tower, self._needed)
        gone = [block for index, block in enumerate(blocks) if index not in kept]
        shapes = kept_tensors(shapes_of(model), NOTHING, blocks, Kept({}, kept))
        return Choice(
            NOTHING,
            {},
            depth_changes(model, len(blocks), kept, shapes),
            {"blocks": (len(blocks), len(kept))},
            sum(p.numel() for block in gone for p in block.module.parameters()),
            kept,
            tuple(sizes),
        )

    def _kept_structures(self, ranking: Callable[[Callable[[], Ranked]], Ranked]) -> Choice:
        model, settings, blocks = self._model, self._settings, self.tower.blocks
        with self.stage("find structures", "structures"):
            structures = self._earlier.structures or without_unfit_kinds(
                model, find_structures(model, blocks, self._trial, self._weights), blocks
            )
            self._earlier.structures = structures
        structures = structures.of_experts(settings.experts)
        if settings.widths == "uneven" and "channels" not in structures.coupled:
            reason = structures.refused.get("channels", "the model has no feed-forward channels")
            raise ArgumentError(f"widths 'uneven': {reason}; leave widths out (--widths equal)")
        if not structures.coupled:
            reasons = "; ".join(f"{NAMES[kind]}: {reason}" for kind, reason in structures.refused.items())
            raise ArgumentError(
                f"no structure of {type(model).__name__} can be removed ({reasons}); remove blocks (--method depth)"
            )
        needed, notes = self._needed, staying_experts(self.tower.blocks)
        if settings.speedup is not None:
            with self.stage("time a block"), self._weights.loaded(blocks[0].module):
                needed, gain = needed_for_speed(model, structures, blocks, settings, self._trial, self._clock)
            notes.append(f"a block runs {gain:.2f} times as fast on one token here")
        shares = possible_shares(structures, settings, needed, added_parameters(model, settings))
        for share in shares:
            check_rows(model, structures, share)

        def rank() -> Ranked:
            return ranked(
                model, self.tower, structures, self.batches, settings, self._weights, self._earlier, self.stage
            )

        importance, moments = ranking(rank)
        with self.stage("compare shares"):
            share, tried = best_share(
                model, self.tower, self.batches, structures, importance, shares, settings, self._weights
            )
        kept, left = kept_structures(structures, importance, share, settings), share.left(structures)
        columns = [name for name in kept if name in structures.columns]
        shapes = kept_tensors(shapes_of(model), structures, blocks, Kept(kept))
        changes = width_changes(model, structures, left, shapes, uneven=settings.widths == "uneven")
        without = shapes
        if settings.chosen_update == "bias":
            changes, shapes = bias_changes(model, changes, shapes, by_kind(structures, kept))
        new_biases = sum(tensor.numel() for name, tensor in shapes.items() if name not in without)
        with_bias = frozenset(name for name in columns if f"{name}.bias" in shapes)
        notes += notes_on(model, structures, kept, with_bias, settings, uneven=SHAPES in changes)
        return Choice(
            structures,
            kept,
            changes,
            {kind: (structures.count(kind), left.get(kind, structures.count(kind))) for kind in structures.coupled},
            share.parameters - new_biases,
            with_bias=with_bias,
            moments={name: moments[name] for name in columns if name in moments},
            tried=tried,
            notes=tuple(notes),
        )

    def update(
        self,
        choice: Choice,
        solved: Callable[[int, dict[str, Repair]], None],
        progress: Callable[..., None],
        stored: Callable[[int], Stored | None] = lambda _: None,
    ) -> None:
        """Let kept weights make up for what is removed, block after block.

        Args:
            choice: what is kept.
            solved: called with the index of a block and the repairs of its layers.
            progress: called with the number of blocks done, and of all blocks.
            stored: as for :func:`~ace_triton.structures.compensation.solve_blocks`.
        """
        blocks = self.tower.blocks
        if self._settings.chosen_update == "lstsq":
            solve_blocks(
                self._model,
                self.tower,
                self.batches,
                choice,
                self._settings,
                self._weights,
                solved,
                stored=stored,
                progress=progress,
            )
            return
        for index, block in enumerate(blocks):
            if stored(index) is None:
                with self._weights.loaded(block.module):
                    solved(index, self._in_biases(choice, choice.structures.within(block)))
            progress(index + 1, len(blocks))

    def _in_biases(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Repair]:
        found, structures = {}, choice.structures
        for entry in entries:
            if (name := entry.consumer) in choice.moments:
                mask = column_mask(structures.columns[name], structures.layers[name], choice.kept[name])
                found[name] = mean_in_bias(weight_of(structures, structures.columns[name]), mask, choice.moments[name])
        return found

    def repaired_tensors(
        self, choice: Choice, repaired: Mapping[str, Repair], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The new values of the tensors of repaired layers.

        Args:
            choice: what is kept.
            repaired: the repairs by name of the layer.
            tensors: the tensors of the smaller model so far.
        """
        layers = choice.structures.layers
        found: dict[str, torch.Tensor] = {}
        for name, repair in repaired.items():
            bias = tensors[f"{name}.bias"] if name in choice.with_bias else None
            found |= repaired_tensors(repair, name, layers[name], bias)
        return found

    def _estimate(self, choice: Choice) -> Estimate:
        """What the run would take; the least squares of two blocks are timed for it."""
        done, seconds = sum(self.seconds.values()), 0.0
        if self._settings.chosen_update == "lstsq" and choice.kept_columns:
            times = [self._clock()]
            with self.stage("time two blocks"):
                solve_blocks(
                    self._model,
                    self.tower,
                    self.batches,
                    choice,
                    self._settings,
                    self._weights,
                    lambda *_: None,
                    progress=lambda *_: times.append(self._clock()),
                    most=2,
                )
            seconds = times[1] - times[0] + (times[-1] - times[-2]) * (len(self.tower.blocks) - 1)
        phases = memory_phases(
            self._model,
            choice.structures,
            self.batches,
            self.shapes(choice),
            self._settings,
            self.tower.blocks,
            in_files=self._weights.in_files,
            hidden_in_memory=self._weights.keep is dict,
        )
        weights = sum(parameter.nbytes for parameter in set(self._model.parameters()))
        return Estimate(phases, done + seconds, weights)

    def check(self, smaller: nn.Module, choice: Choice) -> None:
        """ArgumentError if the smaller model, before an update, computes something else than the dense one's rest."""
        gone = choice.removed_blocks
        blocks = [self.tower.blocks[index] for index in gone]
        without = skipped(blocks, [choice.sizes[index] for index in gone])
        with calibration_mode(self._model), calibration_mode(smaller):
            with masked(choice.structures, choice.kept), without:
                expected = outputs_of(self._model, self._trial)
            if not same_outputs(outputs_of(smaller, self._trial), expected):
                raise ArgumentError(
                    f"{type(self._model).__name__}: a model of the smaller configuration computes something else than "
                    f"this model without the removed {'blocks' if gone else 'structures'}, so its family is not "
                    "supported; prune to n:m instead"
                )

    def report(
        self,
        choice: Choice,
        smaller: nn.Module | None = None,
        errors: Sequence[tuple[float, float]] = (),
        estimate: Estimate | None = None,
    ) -> ShrinkReport:
        """The report of the run.

        Args:
            choice: what is kept.
            smaller: the smaller model; None after a dry run.
            errors: errors of the repaired layers before and after the update.
            estimate: what the run would take.
        """
        blocks, model, removed = block_parameters(self.tower.blocks), n_parameters(self._model), choice.removed
        if smaller is not None:
            removed = model - n_parameters(smaller)
        mean = tuple(sum(values) / len(errors) for values in zip(*errors, strict=True)) if errors else None
        return ShrinkReport(
            self._settings,
            blocks,
            blocks - removed,
            model,
            model - removed,
            choice.widths,
            choice.changes,
            removed_blocks=choice.removed_blocks,
            kept={name: chosen.tolist() for name, chosen in choice.kept.items()},
            refused={NAMES[kind]: reason for kind, reason in choice.structures.refused.items()},
            tried=choice.tried,
            output_error=None if mean is None else (mean[0], mean[1]),
            notes=choice.notes,
            seconds=dict(self.seconds),
            bytes_before=checkpoint_bytes(shapes_of(self._model)),
            bytes_after=checkpoint_bytes(self.shapes(choice)),
            estimate=estimate,
        )

    @contextmanager
    def stage(self, name: str, part: object = None) -> Iterator[Callable[..., None]]:
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
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
