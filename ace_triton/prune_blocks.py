"""Prune the blocks of a model, one after the other."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .budgets import find_budgets
from .decoders.batches import TOKENS_OF_A_FORWARD, Batch, Calibration, batches_of, run_model, trial_batch
from .decoders.blocks import Block, Tower, find_towers, finished_modules, gated_consumers, linears_of, possible_stacks
from .decoders.calibration_mode import calibration_mode
from .decoders.collect import InputCollector
from .decoders.experts import ExpertLinear, find_layouts
from .decoders.lanes import Lanes
from .decoders.loaded_weights import weights_as_loaded
from .decoders.plan import NameFilter, Plan, Unit, misfit
from .decoders.replay import Runner, WholeForward, make_runner
from .decoders.watcher import Watcher
from .decoders.weight_store import InMemory, WeightStore
from .errors import RecipeError
from .kernels.finite_check import FiniteCheck
from .linears import as_kernel_dtype, linear_weight
from .model_report import LayerReport, ModelReport, TowerReport, TowerRun
from .presets import NOT_GIVEN, NotGiven, recipe_of
from .processes import Processes, shares
from .prune import prune_checked, score_matrix
from .recipe import Recipe, Sequential
from .reordering.reorder import Folds, Reorderer, find_folds
from .solvers.update import Update
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .threads import few_threads
from .timing import Stopwatch
from .weight_checks import check_finite, check_weight

Progress = Callable[[int, int, str], None]


def prune_model(
    model: nn.Module,
    calibration: Calibration | None,
    method: str | Recipe = "ace",
    sparsity: str | float | Sparsity | NotGiven = NOT_GIVEN,
    *,
    sequential: Sequential | NotGiven = NOT_GIVEN,
    permute: bool | NotGiven = NOT_GIVEN,
    update: str | Mapping[str, Any] | Update | NotGiven | None = NOT_GIVEN,
    budgets: str | NotGiven | None = NOT_GIVEN,
    batch_size: int | None = None,
    include: str | Sequence[str] | NotGiven | None = NOT_GIVEN,
    exclude: str | Sequence[str] | NotGiven | None = NOT_GIVEN,
    progress: Progress | None = None,
    **options: Any,
) -> ModelReport:
    """Prune the linear layers in the blocks of a transformer in place.

    The model runs block by block on the calibration set. A block's layers are pruned by the statistics of their inputs;
    then the pruned block runs again, and its outputs are the next block's inputs. Embeddings, norms, routers, adapters
    and the head stay dense; the report names every matrix of the blocks that stays dense, and why. A model whose own
    forward rescales its weights (RWKV) ends with the weights as they were loaded, pruned.

    A model with several towers (an encoder and a decoder, vision and text) is pruned tower by tower, in the order in
    which they run: the decoder sees the outputs of the pruned encoder.

    Args:
        model: any module with an ``nn.ModuleList`` of blocks, with its weights in memory, on any device and in any
            floating dtype; forwards run in that dtype.
        calibration: token ids, int64 [n_sequences, length]; or an object with such ``ids`` and a ``mask`` (bool, True
            for real tokens; None if there is no padding); or a list of batches, each a dict of tensors with what the
            model's forward takes (``input_ids``, ``pixel_values``, ``decoder_input_ids``, ``input_features``).
            Inputs of two dimensions whose name ends in "attention_mask" are padding masks, 1 for real tokens. Padding
            is ignored. None is allowed for a method that needs no tokens (magnitude).
        method: a :class:`~ace_triton.recipe.Recipe`, which takes no parts beside it; the name of a preset ("fast",
            "balanced", "best"), whose parts the arguments below replace; or a metric's name
            (:func:`~ace_triton.methods.registry.metric_names`).
        sparsity: as in :func:`~ace_triton.prune.prune_linear`. Default: "2:4".
        sequential: what is pruned before the model runs again on its pruned weights. "none": the whole model, by
            statistics of the dense model; half the forwards, and coarser masks. "blocks": a block. "layers": the layers
            that share an input, so that inside a block too each layer sees the outputs of the pruned layers before it
            (SparseGPT's ``true_sequential``); takes more time. Default: "blocks".
        permute: for n:m, first reorder the input channels of each down and output projection, and with them the
            rows of the layers that feed it (excluded layers too), so that less of the score is lost. The model
            computes the same. Layers that cannot be reordered keep their order and are listed in the report. Default:
            False.
        update: "rescale" scales each row of a pruned layer so that its outputs have the energy of the dense row's
            outputs on the layer's present inputs, which come from the pruned blocks before it. "lstsq" moves every kept
            weight to where the layer best reproduces its dense outputs. An
            :class:`~ace_triton.solvers.update.Update` sets options. Default: no update.
        budgets: "outliers" lets blocks whose scores have more outliers keep more, with the same total: up to 0.16 more
            of a fraction, or one more of every m for n:m (:mod:`ace_triton.budgets`). Takes one more forward of a
            batch. Default: the same share in every block.
        batch_size: sequences of token ids in one forward; None for as many as make about 2,048 tokens.
        include: shell patterns; only layers whose dotted name matches one are pruned. This is the only way to prune
            linear layers outside the blocks ("lm_head"). Default: all layers of the blocks.
        exclude: shell patterns of layers to leave dense. Default: none.
        progress: called after each block with the number of finished blocks, of all blocks, and the block's name.
        options: the metric's own.

    Raises:
        RecipeError: if the method, an option or another part of the recipe is invalid, something is given beside a
            Recipe, or the model is a single layer or not in memory; nothing was changed.
        PatternError: if the sparsity is invalid; nothing was changed.
        ValueError: if the calibration set does not fit the model, a name pattern matches no layer, or the model's own
            forward changes its weights beyond repair; nothing was changed.
        PruneError: if a weight cannot be pruned (NaN or infinity, quantized); nothing was changed. Or if statistics
            have NaN or infinity (an overflow in fp16): the blocks before that layer, and the layers before it in its
            block, are already pruned.
    """
    recipe = recipe_of(
        method,
        options,
        sparsity=sparsity,
        sequential=sequential,
        permute=permute,
        update=update,
        budgets=budgets,
        include=include,
        exclude=exclude,
    )
    _check_model(model)
    return prune_stored(model, calibration, recipe, InMemory(), batch_size=batch_size, progress=progress)


def prune_stored(
    model: nn.Module,
    calibration: Calibration | None,
    recipe: Recipe,
    store: WeightStore,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """:func:`prune_model` for a model whose weights a store keeps, such as one larger than memory.

    Args:
        model, calibration, batch_size, progress: as for :func:`prune_model`.
        recipe: how to prune.
        store: keeps the weights; units that it has finished before are not pruned again.

    Raises:
        AceError: as :func:`prune_model`; what the store has finished stays finished.
    """
    clock = Stopwatch(next(model.parameters()).device)
    with ExitStack() as running:
        running.enter_context(calibration_mode(model))
        running.enter_context(weights_as_loaded(model, restorable=store.keeps_changes_private))
        batches = batches_of(model, calibration, batch_size) if recipe.calibrated else []
        towers = find_towers(model, batches[0] if batches else None)
        plan = _plan(model, recipe, [tower for tower in towers if tower.is_reached], batches)
        with clock.measure("select"):
            weights, finite = _checked_weights(plan, store)
            rehearse(recipe, next(iter(weights.values())))
        lanes = Lanes(len(batches), Processes.now())
        selection = _Selection(recipe, clock, plan, store, weights, finite, lanes)
        running.enter_context(few_threads(TOKENS_OF_A_FORWARD * max(w.numel() for w in weights.values())))
        selection.prepare(model, batches)
        if recipe.needs.tokens:
            runs = _with_statistics(model, plan, batches, selection, progress)
        else:
            runs = _without_statistics(plan, selection, progress)
        account = plan.close()
    return ModelReport(
        recipe,
        clock.seconds(),
        _peak_bytes(model),
        tuple(selection.layers),
        tuple(plan.skipped),
        tuple(plan.excluded),
        account,
        None if selection.reorderer is None else selection.reorderer.report(),
        tuple(TowerReport.of(tower, runs.get(tower.name, "none")) for tower in towers),
    )


def _plan(model: nn.Module, recipe: Recipe, towers: Sequence[Tower], batches: Sequence[Batch]) -> Plan:
    blocks = [block for tower in towers for block in tower.blocks]
    stacks = [stack for block in blocks for stack in possible_stacks(block.module, block.name)]
    layouts = find_layouts(lambda: run_model(model, trial_batch(model, batches)), stacks) if stacks else {}
    known_stacks = [(stack, layouts[stack.name]) for stack in stacks if stack.name in layouts]
    experts = [name for stack, layout in known_stacks for name in stack.linears(transposed=False, rows=layout.rows)]
    names = NameFilter.of(model, recipe.include, recipe.exclude, experts)
    return Plan(model, recipe.metric, recipe.needs, recipe.sparsity, names, towers, stacks, layouts)


def _checked_weights(plan: Plan, store: WeightStore) -> tuple[dict[str, torch.Tensor], FiniteCheck]:
    """The weights of all layers, checked for NaN and infinity, and the check that knows them."""
    weights, finite = {}, FiniteCheck()
    for unit in plan.units:
        for name, layer in unit.layers.items():
            weights[name] = check_weight(layer, name)
            if store.finished(unit.name) is None:
                check_finite(weights[name], name, finite)
        for module in _modules(plan, unit):
            store.release(module)
    return weights, finite


def _modules(plan: Plan, unit: Unit) -> list[nn.Module]:
    """The modules whose weights a unit may change: its block, or its layers outside the blocks."""
    return [block.module for block in plan.blocks if block.name == unit.name] or list(unit.layers.values())


@dataclass
class _Selection:
    """Prunes units and records the result."""

    recipe: Recipe
    clock: Stopwatch
    plan: Plan
    store: WeightStore
    weights: Mapping[str, torch.Tensor]
    finite: FiniteCheck
    lanes: Lanes
    layers: list[LayerReport] = field(default_factory=list)
    reorderer: Reorderer | None = None
    patterns: Mapping[str, Sparsity] = field(default_factory=dict)
    called_once: set[frozenset[str]] = field(default_factory=set)
    """Sets of layers, by their names inside the block, that were each called once in a whole batch."""
    groups: dict[tuple[type, frozenset[str]], list[set[str]]] = field(default_factory=dict)
    """For each kind of block, groups of layers that share an input, in the order in which they run; layers are named by
    their names inside the block."""

    def prepare(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Find each block's pattern and the channels that can be reordered, if the recipe asks for that."""
        pattern = self.recipe.sparsity
        if self.recipe.budgets:
            found = self.store.once("budgets", lambda: self._budgets(model, batches))
            self.patterns = {unit: replace(pattern, pattern=own) for unit, own in found.items()}
        if self.recipe.permute:
            assert pattern.m is not None
            with self.clock.measure("permute"):
                folds = self.store.once("folds", lambda: self._folds(model, batches).to_dict())
            layers = {name: layer for block in self.plan.blocks for name, layer in linears_of(block.module, block.name)}
            self.reorderer = Reorderer(Folds.from_dict(folds, layers), pattern.m, self.clock)

    def _budgets(self, model: nn.Module, batches: Sequence[Batch]) -> dict[str, str | float]:
        """By block, its pattern, or the fraction that is pruned."""
        found = find_budgets(model, self.plan.towers, self.recipe.sparsity, batches[:1], self.clock)
        return {unit: pattern.pattern for unit, pattern in found.items()}

    def _folds(self, model: nn.Module, batches: Sequence[Batch]) -> Folds:
        batch, m, plan = trial_batch(model, batches), self.recipe.sparsity.m, self.plan
        assert m is not None
        return find_folds(model, plan.blocks, batch, m, wanted=set(plan.layers).__contains__, shared=plan.shares)

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
        if self.reorderer is not None:
            self.reorderer.restore(record["reordered"])
        return True

    @contextmanager
    def dense(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context in which those of the units that an earlier run finished have their dense weights again."""
        with ExitStack() as dense:
            for unit in units:
                if self.store.finished(unit.name) is not None:
                    dense.enter_context(self.store.as_loaded(_modules(self.plan, unit)))
            yield

    @contextmanager
    def recorded(self, unit: Unit) -> Iterator[None]:
        """A context in which a unit is pruned; at its end the store saves the unit with the record of what was done."""
        layers, skipped = len(self.layers), len(self.plan.skipped)
        reordered = 0 if self.reorderer is None else len(self.reorderer.reordered)
        yield
        record = {
            "layers": [asdict(layer) for layer in self.layers[layers:]],
            "skipped": {entry.name: entry.reason for entry in self.plan.skipped[skipped:]},
            "reordered": [] if self.reorderer is None else [asdict(e) for e in self.reorderer.reordered[reordered:]],
        }
        self.store.finish(unit.name, _modules(self.plan, unit), record)

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

    def prune(self, unit: Unit, collector: InputCollector | None) -> None:
        if collector is not None and collector.each_once:
            self.called_once.add(unit.names_inside)
        pattern = self.patterns.get(unit.name, self.recipe.sparsity)
        recipe = replace(self.recipe, sparsity=pattern, permute=False, budgets=None)
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
        with self.clock.measure("select"):
            for name, stats in chosen.items():
                if owners[name] == processes.rank:
                    result = prune_checked(
                        layers[name], self.weights[name], stats, recipe, name, self.finite, clock=self.clock
                    )
                    kept = result.kept / result.total
                    done[name] = LayerReport(name, kept, result.pattern, result.axis, result.total)
            for name, owner in owners.items():
                report = processes.broadcast(done.get(name), owner)
                assert report is not None
                processes.broadcast_into(self.weights[name], owner)
                self.plan.pruned(name, report.parameters)
                self.layers.append(report)

    def _scores(self, name: str, *, collector: InputCollector | None) -> torch.Tensor | None:
        """Scores to order a layer's inputs by; None if no token reached it or its groups run along the outputs."""
        stats = None if collector is None else collector.statistics(name)
        axis = self.recipe.sparsity.axis or self.recipe.metric.axis(stats)
        if axis == "out" or (stats is None and self.recipe.needs.tokens):
            return None
        return score_matrix(self.recipe, as_kernel_dtype(self.weights[name]), stats)


def _statistics(
    collector: InputCollector, name: str, consumer: str | None, out_features: int
) -> ActivationStats | None:
    stats = collector.statistics(name)
    fed = collector.statistics(consumer) if consumer is not None else None
    if stats is not None and fed is not None:
        stats.consumer_norm = fed.norm.repeat(out_features // fed.in_features)
    return stats


def _with_statistics(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    selection: _Selection,
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
            _report(progress, done, len(plan.units), unit.name)
        runs[tower.tower.name] = "forwards" if isinstance(tower.runner, WholeForward) else "blocks"
    if plan.outside:
        if not selection.restored(plan.outside):
            with selection.recorded(plan.outside):
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
    selection: _Selection
    runner: Runner = field(init=False)
    observed: dict[int, InputCollector] = field(default_factory=dict)
    """Statistics of the dense model, by unit, if they were collected before anything was pruned."""

    def start(self) -> None:
        """Record what the tower's blocks read, with the present weights of the towers before it."""
        blocks, clock = self.tower.blocks, self.selection.clock
        self.runner = make_runner(self.model, blocks, self.batches, clock, self.tower.masks, self.trial)

    def observe_ahead(self) -> None:
        """Collect the statistics of the dense model now, if a later run could not."""
        if isinstance(self.runner, WholeForward):
            todo = [i for i, unit in enumerate(self.units) if self.selection.store.finished(unit.name) is None]
            self.observed = {index: self._observe(index) for index in todo}

    def prune(self) -> Iterator[Unit]:
        """Prune the tower; yields each finished unit."""
        runner, at_once = self.runner, self.selection.recipe.sequential == "none"
        for index, unit in enumerate(self.units):
            finished: Sequence[nn.Module] = ()
            if self.selection.restored(unit):
                if at_once:
                    with self.selection.dense([unit]):
                        runner.run(index, None, advance=True)
            else:
                with self.selection.recorded(unit):
                    finished = self._prune(index, unit)
            if not at_once and index + 1 < len(self.units):
                runner.run(index, None, advance=True, finished=finished)
            yield unit

    def _prune(self, index: int, unit: Unit) -> Sequence[nn.Module]:
        """Prune a unit; returns the modules of its block whose outputs may be cached."""
        if self.selection.recipe.sequential == "layers":
            return _prune_by_input(self.tower.blocks[index], unit, self.runner, index, self.selection)
        self.selection.prune(unit, self.observed.pop(index, None) or self._observe(index))
        return ()

    def _observe(self, index: int) -> InputCollector:
        unit, at_once = self.units[index], self.selection.recipe.sequential == "none"
        run = partial(self.runner.run, index, advance=at_once) if unit.layers or at_once else None
        return self.selection.observe(unit, run)


def _without_statistics(plan: Plan, selection: _Selection, progress: Progress | None) -> dict[str, TowerRun]:
    for done, unit in enumerate(plan.units, 1):
        if not selection.restored(unit):
            with selection.recorded(unit):
                selection.prune(unit, None)
        _report(progress, done, len(plan.units), unit.name)
    return {}


def _prune_by_input(block: Block, unit: Unit, runner: Runner, index: int, selection: _Selection) -> Sequence[nn.Module]:
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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or linear_weight(model) is not None:
        raise RecipeError(
            f"prune_model takes a model with blocks, got a {type(model).__name__}; prune_linear prunes a single layer"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RecipeError(
                f"{name} is on the meta device (offloaded, or never loaded); load the model whole, without "
                "device_map offloading to CPU or disk"
            )


def rehearse(recipe: Recipe, like: torch.Tensor | None = None) -> None:
    """Prune a temporary small layer, so that an invalid option is found before anything runs.

    Args:
        recipe: how to prune.
        like: a weight whose dtype and device are used; None for fp32 on the CPU.
    """
    like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
    dtype = as_kernel_dtype(like[:1]).dtype
    layer = torch.nn.utils.skip_init(nn.Linear, 32, 32, bias=False, device=like.device, dtype=dtype)
    ramp = torch.linspace(-1, 1, 32 * 32, dtype=torch.float32, device=like.device).reshape(32, 32).to(dtype)
    weight = layer.weight.detach().copy_(ramp)
    prune_checked(layer, weight, ramp, recipe, f"method {recipe.method!r}", FiniteCheck().record(weight))


def _peak_bytes(model: nn.Module) -> int:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
