"""Prunes the layers of one unit after another, and records what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import nn

from .block_fit import BlockFit
from .budgets import find_budgets
from .checked_terms import UnreadCheck, read_checks, score_matrix
from .decoders.batches import Batch, trial_batch
from .decoders.blocks import linears_of
from .decoders.collect import InputCollector
from .decoders.experts import ExpertLinear
from .decoders.lanes import Lanes
from .decoders.layer_roles import gated_consumers
from .decoders.plan import Plan, Unit, misfit
from .decoders.watcher import Watcher
from .decoders.weight_store import WeightStore
from .errors import ArgumentError
from .kernels.finite_check import FiniteCheck
from .linears import as_kernel_dtype
from .methods.registry import Needs
from .model_report import LayerReport
from .processes import shares
from .prune import PruneResult, prune_checked
from .prune_together import LayerToPrune, prune_together, suits
from .recipe import Recipe
from .reordering.reorder import Folds, Reorderer, find_folds
from .reordering.rotate import Rotator
from .reordering.trial import ORDERS, ROTATIONS, Trial
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .timing import Stopwatch
from .weight_checks import check_weight


@dataclass
class Selection:
    """Prunes units and records the result."""

    recipe: Recipe
    clock: Stopwatch
    plan: Plan
    store: WeightStore
    weights: dict[str, torch.Tensor]
    finite: FiniteCheck
    lanes: Lanes
    layers: list[LayerReport] = field(default_factory=list)
    fits: list[BlockFit] = field(default_factory=list)
    rotator: Rotator | None = None
    reorderer: Reorderer | None = None
    patterns: Mapping[str, Sparsity] = field(default_factory=dict)
    called_once: set[frozenset[str]] = field(default_factory=set)
    """Sets of layers, by their names inside the block, that were each called once in a whole batch."""
    groups: dict[tuple[type, frozenset[str]], list[set[str]]] = field(default_factory=dict)
    """For each kind of block, groups of layers that share an input, in the order in which they run; layers are named by
    their names inside the block."""

    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Find each block's pattern and the channels that can be rotated or reordered, if the recipe asks for that.

        Raises:
            ArgumentError: if values are to be rotated and none of them can be; nothing was changed.
        """
        pattern = self.recipe.sparsity
        if self.recipe.budgets:
            found = self.store.once("budgets", lambda: self._budgets(model, batches))
            self.patterns = {unit: replace(pattern, pattern=own) for unit, own in found.items()}
        layers = {name: layer for block in self.plan.blocks for name, layer in linears_of(block.module, block.name)}
        if self.recipe.rotate:
            with self.clock.measure("rotate"):
                folds = self.store.once("rotations", lambda: self._folds(model, batches, 1, ROTATIONS).to_dict())
            found = Folds.from_dict(folds, layers)
            _check_rotations(model, found)
            self.rotator = Rotator(found, self.clock)
        if self.recipe.permute:
            m = pattern.m
            assert m is not None
            with self.clock.measure("permute"):
                folds = self.store.once("folds", lambda: self._folds(model, batches, m, ORDERS).to_dict())
            self.reorderer = Reorderer(Folds.from_dict(folds, layers), m, self.clock)

    def _budgets(self, model: nn.Module, batches: Sequence[Batch]) -> dict[str, str | float]:
        """By block, its pattern, or the fraction that is pruned."""
        found = find_budgets(model, self.plan.towers, self.recipe.sparsity, batches[:1], self.clock, self.in_use)
        return {unit: pattern.pattern for unit, pattern in found.items()}

    def _folds(self, model: nn.Module, batches: Sequence[Batch], m: int, trial: Trial) -> Folds:
        batch, plan, wanted = trial_batch(model, batches), self.plan, set(self.plan.layers).__contains__
        return find_folds(model, plan.blocks, batch, m, wanted=wanted, shared=plan.shares, trial=trial)

    def restored(self, unit: Unit) -> bool:
        """True if an earlier run finished the unit; its record is taken over."""
        record = self.store.finished(unit.name)
        if record is None:
            return False
        for entry in record["layers"]:
            self.layers.append(LayerReport(**entry))
            self.plan.pruned(entry["name"], entry["parameters"])
        for name, reason in record["skipped"].items():
            self.plan.skip(name, self.weights[name], reason)
        self.fits += [BlockFit(**entry) for entry in record["fits"]]
        if self.rotator is not None:
            self.rotator.restore(record["rotated"])
        if self.reorderer is not None:
            self.reorderer.restore(record["reordered"])
        return True

    @contextmanager
    def in_use(self, unit: Unit) -> Iterator[None]:
        """A context in which a unit runs and is pruned, where the store puts its weights meanwhile."""
        with self.store.in_use(modules_of(self.plan, unit)) as elsewhere:
            if not elsewhere:
                yield
                return
            before = self.weights, self.finite
            experts = [layer for layer in unit.layers.values() if isinstance(layer, ExpertLinear)]
            for expert in experts:
                expert.view_stack()
            # Known by identity, which moved weights do not keep.
            self.weights = {name: check_weight(layer, name) for name, layer in unit.layers.items()}
            self.finite = FiniteCheck()
            yield
            self.weights, self.finite = before
        for expert in experts:
            expert.view_stack()

    @contextmanager
    def dense(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context in which those of the units that an earlier run finished have their dense weights again."""
        with ExitStack() as dense:
            for unit in units:
                if self.store.finished(unit.name) is not None:
                    dense.enter_context(self.store.as_loaded(modules_of(self.plan, unit)))
            yield

    @contextmanager
    def recorded(self, unit: Unit) -> Iterator[None]:
        """A context in which a unit is pruned; at its end the store saves the unit with the record of what was done."""
        layers, skipped, fits = len(self.layers), len(self.plan.skipped), len(self.fits)
        rotated = 0 if self.rotator is None else len(self.rotator.rotated)
        reordered = 0 if self.reorderer is None else len(self.reorderer.reordered)
        yield
        record = {
            "layers": [asdict(layer) for layer in self.layers[layers:]],
            "skipped": {entry.name: entry.reason for entry in self.plan.skipped[skipped:]},
            "fits": [asdict(fit) for fit in self.fits[fits:]],
            "rotated": [] if self.rotator is None else [asdict(e) for e in self.rotator.rotated[rotated:]],
            "reordered": [] if self.reorderer is None else [asdict(e) for e in self.reorderer.reordered[reordered:]],
        }
        self.store.finish(unit.name, modules_of(self.plan, unit), record)

    def start_tower(self) -> None:
        """Forget what is known of the order of layers: blocks of another tower may be called in other ways."""
        self.called_once.clear()
        self.groups.clear()

    def observe(self, unit: Unit, run: Callable[[Watcher], None] | None) -> InputCollector:
        """The statistics of a unit's layers from a run of the calibration set, in all processes; None: no run."""

        def make(lane: int, each_once: bool) -> InputCollector:
            known = each_once or unit.names_inside in self.called_once
            return InputCollector(unit.observed, self.recipe.needs, self.clock, each_once=known, lane=lane)

        return make(0, False) if run is None else self.lanes.collect(make, run)

    def rotate(self, unit: Unit, run: Callable[[Watcher], None]) -> None:
        """Rotate the values of a unit that is still dense, by Gram matrices from a run of the calibration set."""
        layers = {} if self.rotator is None else self.rotator.observed(unit.layers)
        if self.rotator is None or not layers:
            return

        def make(lane: int, each_once: bool) -> InputCollector:
            return InputCollector(layers, Needs(gram=True), self.clock, each_once=each_once, lane=lane)

        collector = self.lanes.collect(make, run)
        pattern = self.patterns.get(unit.name, self.recipe.sparsity)
        with self.clock.measure("rotate"):
            self.rotator.rotate(unit.layers, pattern, collector, self.lanes.processes)

    def prune(self, unit: Unit, collector: InputCollector | None) -> None:
        if collector is not None:
            collector.read_numbers()
            if collector.each_once:
                self.called_once.add(unit.names_inside)
        pattern = self.patterns.get(unit.name, self.recipe.sparsity)
        recipe = self.recipe.for_layers(pattern)
        if self.reorderer is not None and pattern.n is not None:
            with self.clock.measure("permute"):
                scores = partial(self._scores, collector=collector)
                self.reorderer.reorder(list(unit.layers), pattern.n, scores, collector)
        consumers = gated_consumers(unit.feed_forward, collector.groups) if collector is not None else {}
        chosen: dict[str, ActivationStats | None] = {}
        for name in unit.layers:
            weight, stats = self.weights[name], None
            if collector is not None:
                stats = _statistics(collector, name, consumers.get(name), weight.shape[0])
                if stats is None:
                    self.plan.skip(name, weight, "no calibration token reached it")
                    continue
            why_not = misfit(weight, pattern, pattern.axis or recipe.metric.axis(stats))
            if why_not is not None:
                self.plan.skip(name, weight, why_not)
                continue
            chosen[name] = stats
        self._prune_layers(unit.layers, chosen, recipe)

    def _prune_layers(
        self, layers: Mapping[str, nn.Module], chosen: Mapping[str, ActivationStats | None], recipe: Recipe
    ) -> None:
        """Prune layers by their statistics; each process does its share, and gets the others' from them."""
        processes = self.lanes.processes
        costs = [float(self.weights[name].numel() * self.weights[name].shape[1]) for name in chosen]
        owners = dict(zip(chosen, shares(costs, processes.size), strict=True))
        done: dict[str, LayerReport] = {}
        unread: list[UnreadCheck] = []
        with self.clock.measure("select"):
            own = [
                LayerToPrune(name, layers[name], self.weights[name], stats)
                for name, stats in chosen.items()
                if owners[name] == processes.rank
            ]
            for result in self._results(own, recipe, unread):
                done[result.name] = LayerReport(
                    result.name, result.kept / result.total, result.pattern, result.axis, result.total
                )
            read_checks(unread)
            for name, owner in owners.items():
                report = processes.broadcast(done.get(name), owner)
                assert report is not None
                processes.broadcast_into(self.weights[name], owner)
                self.plan.pruned(name, report.parameters)
                self.layers.append(report)

    def _results(
        self, layers: Sequence[LayerToPrune], recipe: Recipe, unread: list[UnreadCheck]
    ) -> Iterator[PruneResult]:
        """Prune layers; those on one GPU together, if the recipe allows it."""
        together: dict[torch.device, list[LayerToPrune]] = {}
        alone: list[LayerToPrune] = []
        for entry in layers:
            found = suits(entry.weight, recipe)
            (together.setdefault(entry.weight.device, []) if found else alone).append(entry)
        for same in together.values():
            yield from prune_together(same, recipe, self.finite, unread)
        for entry in alone:
            yield prune_checked(
                *(entry.layer, entry.weight, entry.stats, recipe, entry.name, self.finite),
                clock=self.clock,
                unread=unread,
            )

    def _scores(self, name: str, *, collector: InputCollector | None) -> torch.Tensor | None:
        """Scores to order a layer's inputs by; None if no token reached it or its groups run along the outputs."""
        stats = None if collector is None else collector.statistics(name)
        axis = self.recipe.sparsity.axis or self.recipe.metric.axis(stats)
        if axis == "out" or (stats is None and self.recipe.needs.tokens):
            return None
        return score_matrix(self.recipe, as_kernel_dtype(self.weights[name]), stats)


def _check_rotations(model: nn.Module, found: Folds) -> None:
    if not found.proven:
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in found.unfolded)) or "none is found among the layers"
        raise ArgumentError(
            f"rotate: no output projection of the attention of {type(model).__name__} can be rotated ({reasons}): "
            "leave rotate out"
        )


def _statistics(
    collector: InputCollector, name: str, consumer: str | None, out_features: int
) -> ActivationStats | None:
    stats = collector.statistics(name)
    fed = collector.statistics(consumer) if consumer is not None else None
    if stats is not None and fed is not None:
        stats.consumer_norm = fed.norm.repeat(out_features // fed.in_features)
    return stats


def modules_of(plan: Plan, unit: Unit) -> list[nn.Module]:
    """The modules whose weights a unit may change: its block, or its layers outside the blocks."""
    return [block.module for block in plan.blocks if block.name == unit.name] or list(unit.layers.values())
