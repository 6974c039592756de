"""Runs the calibration set through the towers of a model, and prunes each unit by the statistics of its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from .block_fit import dense_outputs, fit_block
from .decoders.batches import Batch, trial_batch
from .decoders.blocks import Block, Tower
from .decoders.collect import InputCollector
from .decoders.experts import ExpertLinear
from .decoders.kept_tensors import keeper
from .decoders.layer_roles import finished_modules
from .decoders.plan import Plan, Unit
from .decoders.replay import Replay, Runner, WholeForward, make_runner
from .model_report import TowerRun
from .selection import Selection

Progress = Callable[[int, int, str], None]


def prune_with_statistics(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    selection: Selection,
    progress: Progress | None,
) -> dict[str, TowerRun]:
    """Prune everything by the statistics of its inputs; returns how each tower was run, by name."""
    at_once = selection.recipe.sequential == "none"
    last = plan.towers[-1][0]
    outside: InputCollector | None = None
    trial = trial_batch(model, batches)
    own = [batches[number] for number in selection.lanes.batches]
    passes = [_TowerPass(model, tower, units, own, trial, selection) for tower, units in plan.towers if units]

    def observe_outside(unit: Unit) -> InputCollector:
        whole = WholeForward(model, own, selection.clock, last.blocks, last.masks)
        return selection.observe(unit, whole.run_all)

    if at_once:
        with selection.dense(plan.units):
            for tower in passes:
                tower.start()
                tower.observe_ahead()
            outside = observe_outside(plan.outside) if plan.outside else None
    done = 0
    runs: dict[str, TowerRun] = {}
    while passes:
        tower = passes.pop(0)
        if not at_once:
            tower.start()
        selection.start_tower()
        for unit in tower.prune():
            done += 1
            if selection.store.finished(unit.name) is None:
                _report(progress, done, len(plan.units), unit.name)
        runs[tower.tower.name] = "forwards" if isinstance(tower.runner, WholeForward) else "blocks"
    if plan.outside and not selection.restored(plan.outside):
        with selection.in_use(plan.outside), selection.recorded(plan.outside):
            selection.prune(plan.outside, outside or observe_outside(plan.outside))
        _report(progress, done + 1, len(plan.units), plan.outside.name)
    return runs


@dataclass
class _TowerPass:
    """Prunes the blocks of one tower, one after the other."""

    model: nn.Module
    tower: Tower
    units: Sequence[Unit]
    batches: Sequence[Batch]
    trial: Batch
    selection: Selection
    runner: Runner = field(init=False)
    observed: dict[int, InputCollector] = field(default_factory=dict)
    """Statistics of the dense model, by unit, if they were collected before anything was pruned."""

    def start(self) -> None:
        """Record what the tower's blocks read, with the present weights of the towers before it."""
        blocks, clock = self.tower.blocks, self.selection.clock
        keep = keeper(self.selection.store.offload_folder)
        self.runner = make_runner(self.model, blocks, self.batches, clock, self.tower.masks, self.trial, keep=keep)
        if self._epochs and not isinstance(self.runner, Replay):
            warnings.warn(
                f"block_epochs: the blocks of {self.tower.name or 'the model'} cannot be run one at a time, so they "
                "are not trained",
                stacklevel=5,
            )

    @property
    def _epochs(self) -> int:
        update = self.selection.recipe.update
        return 0 if update is None else update.block_epochs

    def observe_ahead(self) -> None:
        """Collect the statistics of the dense model now, if a later run could not."""
        if isinstance(self.runner, WholeForward):
            todo = [i for i, unit in enumerate(self.units) if self.selection.store.finished(unit.name) is None]
            self.observed = {index: self._observe(index) for index in todo}

    def prune(self) -> Iterator[Unit]:
        """Prune the tower; yields each finished unit."""
        runner, at_once = self.runner, self.selection.recipe.sequential == "none"
        todo = [index for index, unit in enumerate(self.units) if self.selection.store.finished(unit.name) is None]
        last = max(todo, default=-1)  # No hidden states are needed after the last unit that is not finished.
        for index, unit in enumerate(self.units):
            finished: Sequence[nn.Module] = ()
            if self.selection.restored(unit) and at_once:
                if index < last:
                    with self.selection.dense([unit]):
                        runner.run(index, None, advance=True)
                yield unit
                continue
            with self.selection.in_use(unit):
                if self.selection.store.finished(unit.name) is None:
                    with self.selection.recorded(unit):
                        finished = self._prune(index, unit)
                if not at_once and index < last:
                    runner.run(index, None, advance=True, finished=finished)
            yield unit

    def _prune(self, index: int, unit: Unit) -> Sequence[nn.Module]:
        """Prune a unit and fit it; returns the modules of its block whose outputs may be cached."""
        update, runner = self.selection.recipe.update, self.runner
        if update is None or not self._epochs or not isinstance(runner, Replay):
            return self._prune_layers(index, unit)
        clock = self.selection.clock
        with clock.measure("block_fit"):
            target = dense_outputs(runner, index, keeper(self.selection.store.offload_folder)())
        self._prune_layers(index, unit)
        with clock.measure("block_fit"):
            self.selection.fits.append(
                fit_block(unit.name, self.tower.blocks[index].module, runner, index, target, update)
            )
        return ()

    def _prune_layers(self, index: int, unit: Unit) -> Sequence[nn.Module]:
        """Prune a unit; returns the modules of its block whose outputs may be cached."""
        self.selection.rotate(unit, partial(self.runner.run, index, advance=False))
        if self.selection.recipe.sequential == "layers":
            return _prune_by_input(self.tower.blocks[index], unit, self.runner, index, self.selection)
        self.selection.prune(unit, self.observed.pop(index, None) or self._observe(index))
        return ()

    def _observe(self, index: int) -> InputCollector:
        unit, at_once = self.units[index], self.selection.recipe.sequential == "none"
        run = partial(self.runner.run, index, advance=at_once) if unit.layers or at_once else None
        return self.selection.observe(unit, run)


def prune_without_statistics(plan: Plan, selection: Selection, progress: Progress | None) -> dict[str, TowerRun]:
    for done, unit in enumerate(plan.units, 1):
        if not selection.restored(unit):
            with selection.in_use(unit), selection.recorded(unit):
                selection.prune(unit, None)
            _report(progress, done, len(plan.units), unit.name)
    return {}


def _prune_by_input(block: Block, unit: Unit, runner: Runner, index: int, selection: Selection) -> Sequence[nn.Module]:
    """Prune a block in groups of layers that share an input, with a run before each; returns the finished modules.

    A stack of experts counts as one layer. The first block of a kind observes all layers in its first run, to find
    their order. Every other run observes only the layers that are pruned next.
    """
    kind, inside = (type(block.module), unit.names_inside), unit.name_inside
    rest = dict(unit.layers)
    while rest:
        pending = set(map(inside, rest))
        observed = next((group for group in selection.groups.get(kind, ()) if group & pending), pending)
        layers = {name: layer for name, layer in rest.items() if inside(name) in observed}
        finished = finished_modules(block, unit.layers, rest)
        run = partial(runner.run, index, advance=False, finished=finished)
        collector = selection.observe(replace(unit, layers=layers), run)
        if not selection.groups.get(kind):
            selection.groups[kind] = [set(map(inside, _with_stacks(set(group), rest))) for group in collector.groups]
        reached = next((group for group in collector.groups if not layers.keys().isdisjoint(group)), list(layers))
        now = {name: layer for name, layer in layers.items() if name in _with_stacks(set(reached), layers)}
        selection.prune(replace(unit, layers=now), collector)
        rest = {name: layer for name, layer in rest.items() if name not in now}
    return finished_modules(block, unit.layers, rest)


def _with_stacks(names: set[str], layers: Mapping[str, nn.Module]) -> set[str]:
    """The names, and the names of all experts that are stored in one tensor with a named expert."""
    stacks = {_matrix(name) for name in names if isinstance(layers.get(name), ExpertLinear)}
    return names | {name for name in layers if _matrix(name) in stacks}


def _matrix(name: str) -> str:
    """The last part of a layer's name, which all experts of a stack share."""
    return name.rpartition(".")[2]


def _report(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)
