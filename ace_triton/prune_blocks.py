"""Prune the decoder blocks of a model, one after the other."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from .budgets import check_budgets, find_budgets
from .decoders.batches import TOKENS_OF_A_FORWARD, Batch, CalibrationSet, batches_of, trial_ids
from .decoders.blocks import Block, find_blocks, finished_modules, gated_consumers, possible_stacks
from .decoders.calibration_mode import calibration_mode
from .decoders.collect import InputCollector
from .decoders.experts import ExpertLinear, find_layouts
from .decoders.loaded_weights import weights_as_loaded
from .decoders.plan import NameFilter, Plan, Unit, misfit
from .decoders.replay import Runner, WholeForward, make_runner
from .errors import RecipeError
from .linears import as_kernel_dtype
from .model_report import LayerReport, ModelReport, Sequential
from .prune import check_weight, prune_checked, score_matrix
from .recipe import Request
from .reordering.reorder import Reorderer, find_folds
from .solvers.update import Update
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .threads import few_threads
from .timing import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]


def prune_model(
    model: PreTrainedModel,
    calibration: torch.Tensor | CalibrationSet | None,
    method: str = "ace",
    sparsity: str | float | Sparsity = "2:4",
    *,
    sequential: Sequential = "blocks",
    permute: bool = False,
    update: str | Mapping[str, Any] | Update | None = None,
    budgets: str | None = None,
    batch_size: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ModelReport:
    """Prune the linear layers of a Hugging Face causal decoder in place.

    Every block is run on the calibration set, its layers are pruned by what they saw of it, and it is run again: the
    pruned block's outputs are the next one's inputs. Embeddings, norms, routers, adapters and the head stay dense; the
    report names every matrix of the blocks that does, and why. A model whose own forward rescales its weights (RWKV)
    ends with the weights as they were loaded, pruned.

    Args:
        model: with its weights in memory, on any device and in any floating dtype; forwards run in it.
        calibration: token ids, int64 [n_sequences, length], or an object with such ``ids`` and a ``mask``
            (bool, True for real tokens; None where all are). Padding takes no part. None will do for a
            method that needs no tokens (magnitude).
        method: a metric's name (:func:`~ace_triton.methods.registry.metric_names`).
        sparsity: as in :func:`~ace_triton.prune.prune_linear`.
        sequential: what is pruned between two looks at the model. "none": all, by statistics of the dense model: half
            the forwards, and coarser masks. "blocks": a block. "layers": the layers that share an input, so that inside
            a block too a layer sees what the pruned ones before it give (SparseGPT's ``true_sequential``); in
            about a fifth more time.
        permute: for n:m, first reorder the input channels of each down and output projection, and with them the
            rows of the layers that feed it (excluded ones too), so that less of the score is lost. The model
            computes the same: what cannot be reordered so stays as it is and is in the report.
        update: "rescale" also scales each row of a pruned layer so that its outputs have the energy that the dense
            row gives them on the inputs that the layer now has, those that the pruned blocks before it make;
            "lstsq" moves every kept weight to where they best reproduce what the dense weights give; an
            :class:`~ace_triton.solvers.update.Update` says more.
        budgets: "outliers" lets blocks whose scores have more outliers keep more, with the total kept: by up to 0.16
            of a fraction, by one of every m of n:m (:mod:`ace_triton.budgets`); takes one more forward of a batch.
        batch_size: sequences in one forward; None for as many as make about 2,048 tokens.
        include: shell patterns; only layers whose dotted name matches one are pruned. The only way to the
            linear layers outside the blocks ("lm_head").
        exclude: shell patterns of layers to leave dense.
        progress: called with blocks done, blocks in all and the name of the block after each.
        options: the metric's own.

    Raises:
        ValueError: invalid arguments or calibration, a model that is no causal decoder, or one whose own forward
            changes its weights beyond repair; nothing was changed.
        PruneError: a weight that cannot be pruned (NaN or infinity, quantised): nothing was changed. Or
            statistics with NaN or infinity (an overflow in fp16): the blocks before that layer, and the
            layers before it in its block, are pruned already.
    """
    request = Request.of(method, sparsity, update, options)
    needs, pattern = request.needs, request.pattern
    if sequential not in get_args(Sequential):
        raise RecipeError(f"sequential must be one of {', '.join(get_args(Sequential))}; got {sequential!r}")
    request.check_permute(permute, sequential)
    check_budgets(budgets, pattern)
    _check_model(model)
    clock = Stopwatch(next(model.parameters()).device)
    with ExitStack() as running:
        running.enter_context(calibration_mode(model))
        running.enter_context(weights_as_loaded(model))
        plan = _plan(model, request, include, exclude)
        batches = batches_of(model, calibration, batch_size) if needs.tokens or budgets else []
        with clock.measure("select"):
            weights = {name: check_weight(layer, name) for name, layer in plan.layers.items()}
            rehearse(request, next(iter(weights.values())))
        selection = _Selection(request, clock, plan, weights)
        running.enter_context(few_threads(TOKENS_OF_A_FORWARD * max(w.numel() for w in weights.values())))
        if budgets:
            selection.patterns = find_budgets(model, plan.units, pattern, batches[:1], clock)
        if permute:
            selection.reorderer = _reorderer(model, plan, pattern, batches, clock)
        if needs.tokens:
            _with_statistics(model, plan, batches, sequential, selection, progress)
        else:
            units = [*plan.units, plan.outside] if plan.outside else plan.units
            for done, unit in enumerate(units, 1):
                selection.prune(unit, None)
                _tell(progress, done, len(units), unit.name)
        account = plan.close()
    return ModelReport(
        method,
        str(pattern),
        clock.seconds(),
        _peak_bytes(model),
        tuple(selection.layers),
        tuple(plan.skipped),
        tuple(plan.excluded),
        account,
        permutation=None if selection.reorderer is None else selection.reorderer.report(),
        update=request.update,
        budgets=budgets,
        sequential=sequential if needs.tokens else None,
    )


def _plan(
    model: PreTrainedModel, request: Request, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> Plan:
    blocks = find_blocks(model)
    stacks = [stack for block in blocks for stack in possible_stacks(block.module, block.name)]
    layouts = find_layouts(lambda: model(input_ids=trial_ids(model)), stacks) if stacks else {}
    laid_out = [(stack, layouts[stack.name]) for stack in stacks if stack.name in layouts]
    experts = [name for stack, layout in laid_out for name in stack.linears(transposed=False, rows=layout.rows)]
    names = NameFilter.of(model, include, exclude, experts)
    return Plan(model, request.metric, request.needs, request.pattern, names, blocks, stacks, layouts)


@dataclass
class _Selection:
    """Prunes units and keeps the record."""

    request: Request
    clock: Stopwatch
    plan: Plan
    weights: Mapping[str, torch.Tensor]
    layers: list[LayerReport] = field(default_factory=list)
    reorderer: Reorderer | None = None
    patterns: Mapping[str, Sparsity] = field(default_factory=dict)
    called_once: set[frozenset[str]] = field(default_factory=set)
    """Layers, named inside their block, of which a whole batch showed that each is called once."""
    turns: dict[tuple[type, frozenset[str]], list[set[str]]] = field(default_factory=dict)
    """Of a kind of block, its layers in the order in which they read their inputs, those of one input together; named
    inside the block."""

    def collector(self, unit: Unit) -> InputCollector:
        known = unit.names_inside in self.called_once
        return InputCollector(unit.observed, self.request.needs, self.clock, each_once=known)

    def prune(self, unit: Unit, collector: InputCollector | None) -> None:
        if collector is not None and collector.each_once:
            self.called_once.add(unit.names_inside)
        pattern = self.patterns.get(unit.name, self.request.pattern)
        request = replace(self.request, pattern=pattern)
        if self.reorderer is not None and pattern.n is not None:
            with self.clock.measure("permute"):
                scores = partial(self._scores, collector=collector)
                self.reorderer.reorder(list(unit.layers), pattern.n, scores, collector)
        consumers = gated_consumers(unit.feed_forward, collector.groups) if collector is not None else {}
        for name, layer in unit.layers.items():
            weight, stats = self.weights[name], None
            if collector is not None:
                stats = _statistics(collector, name, consumers.get(name), weight.shape[0])
                if stats is None:
                    self.plan.skip(name, weight, "no calibration token reached it")
                    continue
            why_not = misfit(weight, pattern, pattern.axis or request.metric.axis(stats))
            if why_not is not None:
                self.plan.skip(name, weight, why_not)
                continue
            with self.clock.measure("select"):
                result = prune_checked(layer, weight, stats, request, name, clock=self.clock)
            self.plan.pruned(name, result.total)
            self.layers.append(LayerReport(name, result.kept / result.total, result.pattern, result.axis, result.total))

    def _scores(self, name: str, *, collector: InputCollector | None) -> torch.Tensor | None:
        """By which a layer's inputs are ordered; None where no token reached it or its groups do not lie along them."""
        stats = None if collector is None else collector.statistics(name)
        axis = self.request.pattern.axis or self.request.metric.axis(stats)
        if axis == "out" or (stats is None and self.request.needs.tokens):
            return None
        return score_matrix(self.request, as_kernel_dtype(self.weights[name]), stats)


def _statistics(
    collector: InputCollector, name: str, consumer: str | None, out_features: int
) -> ActivationStats | None:
    stats = collector.statistics(name)
    fed = collector.statistics(consumer) if consumer is not None else None
    if stats is None or fed is None:
        return stats
    return replace(stats, consumer_norm=fed.norm.repeat(out_features // fed.in_features))


def _with_statistics(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Batch],
    sequential: Sequential,
    selection: _Selection,
    progress: Progress | None,
) -> None:
    runner = make_runner(model, plan.blocks, batches, selection.clock)
    whole = WholeForward(model, batches, selection.clock)
    units = [*plan.units, plan.outside] if plan.outside else plan.units

    at_once = sequential == "none"

    def observe(index: int) -> InputCollector:
        collector = selection.collector(units[index])
        if index == len(plan.units):
            whole.run_all(collector)
        elif units[index].layers or at_once:
            runner.run(index, collector, advance=at_once)
        return collector

    ahead = range(0 if isinstance(runner, WholeForward) else len(plan.units), len(units)) if at_once else ()
    observed = {index: observe(index) for index in ahead}
    for index, unit in enumerate(units):
        finished: Sequence[nn.Module] = ()
        if sequential == "layers" and index < len(plan.units):
            finished = _prune_in_turn(plan.blocks[index], unit, runner, index, selection)
        else:
            selection.prune(unit, observed.pop(index, None) or observe(index))
        if not at_once and index + 1 < len(plan.units):
            runner.run(index, None, advance=True, finished=finished)
        _tell(progress, index + 1, len(units), unit.name)


def _prune_in_turn(block: Block, unit: Unit, runner: Runner, index: int, selection: _Selection) -> Sequence[nn.Module]:
    """Prune a block's layers input by input, running it for each; the modules that are finished in the end.

    A stack of experts counts as one layer. The first run of a first block of its kind watches all layers and shows
    their order; each of the others only the layers that it is for.
    """
    kind, inside = (type(block.module), unit.names_inside), unit.name_inside
    rest = dict(unit.layers)
    while rest:
        pending = set(map(inside, rest))
        watched = next((turn for turn in selection.turns.get(kind, ()) if turn & pending), pending)
        layers = {name: layer for name, layer in rest.items() if inside(name) in watched}
        collector = selection.collector(replace(unit, layers=layers))
        runner.run(index, collector, advance=False, finished=finished_modules(block, unit.layers, rest))
        if not selection.turns.get(kind):
            selection.turns[kind] = [set(map(inside, _with_stacks(set(group), rest))) for group in collector.groups]
        reached = next((group for group in collector.groups if not layers.keys().isdisjoint(group)), list(layers))
        now = {name: layer for name, layer in layers.items() if name in _with_stacks(set(reached), layers)}
        selection.prune(replace(unit, layers=now), collector)
        rest = {name: layer for name, layer in rest.items() if name not in now}
    return finished_modules(block, unit.layers, rest)


def _with_stacks(names: set[str], layers: Mapping[str, nn.Module]) -> set[str]:
    """Names, and those of all experts that are stored in one tensor with one of them."""
    stacks = {_matrix(name) for name in names if isinstance(layers.get(name), ExpertLinear)}
    return names | {name for name in layers if _matrix(name) in stacks}


def _matrix(name: str) -> str:
    """The last part of a layer's name, which the experts of a stack have in common."""
    return name.rpartition(".")[2]


def _reorderer(
    model: PreTrainedModel, plan: Plan, pattern: Sparsity, batches: Sequence[Batch], clock: Stopwatch
) -> Reorderer:
    assert pattern.m is not None
    with clock.measure("permute"):
        ids = batches[0].ids if batches else trial_ids(model)
        folds = find_folds(model, plan.blocks, ids, pattern.m, wanted=set(plan.layers).__contains__, shared=plan.shares)
    return Reorderer(folds, pattern.m, clock)


def _tell(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)


def _check_model(model: PreTrainedModel) -> None:
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise RecipeError(
            f"prune_model takes a Hugging Face causal decoder, got a {type(model).__name__}; prune_linear prunes a "
            "single layer"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RecipeError(
                f"{name} is on the meta device (offloaded, or never loaded); load the model whole, without "
                "device_map offloading to CPU or disk"
            )


def rehearse(request: Request, like: torch.Tensor | None = None) -> None:
    """Prune a throw-away layer, so that an option of a wrong value is found before anything runs.

    Args:
        request: how to prune.
        like: a weight of the dtype and device to try; None for fp32 on the CPU.
    """
    like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
    dtype = as_kernel_dtype(like[:1]).dtype
    layer = torch.nn.utils.skip_init(nn.Linear, 32, 32, bias=False, device=like.device, dtype=dtype)
    ramp = torch.linspace(-1, 1, 32 * 32, dtype=torch.float32, device=like.device).reshape(32, 32).to(dtype)
    weight = layer.weight.detach().copy_(ramp)
    prune_checked(layer, weight, ramp, request, f"method {request.metric.name!r}")


def _peak_bytes(model: PreTrainedModel) -> int:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
