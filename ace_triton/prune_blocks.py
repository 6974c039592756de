"""Prune the blocks of a model, one after the other."""

from __future__ import annotations

import hashlib
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .block_fit import BATCH_TOKENS
from .decoders.batches import TOKENS_OF_A_FORWARD, Batch, run_model, tensors_in, trial_batch
from .decoders.blocks import Tower, find_towers, possible_stacks
from .decoders.calibration_forms import Calibration, batches_of
from .decoders.calibration_mode import calibration_mode, several_dtypes_named
from .decoders.experts import find_layouts
from .decoders.kept_tensors import offload_to
from .decoders.lanes import Lanes
from .decoders.loaded_weights import weights_as_loaded
from .decoders.plan import NameFilter, Plan
from .decoders.weight_store import WeightStore
from .dispatched.store import opened
from .errors import ArgumentError, RecipeError
from .kernels.backend import backend_of_device
from .kernels.finite_check import FiniteCheck
from .kernels.finite_group import find_each_not_finite
from .kernels.weight_sums_group import keep_group_relative_importance
from .linears import KERNEL_DTYPES, as_kernel_dtype, linear_weight
from .model_report import ModelReport, TowerReport
from .presets import NOT_GIVEN, NotGiven, recipe_of
from .processes import Processes
from .prune import prune_checked
from .recipe import Recipe, Sequential
from .selection import Selection, modules_of
from .solvers.quantize import Quantization
from .solvers.update import Update
from .sparsity import Sparsity
from .threads import few_threads
from .timing import Stopwatch
from .tower_pass import Progress, prune_with_statistics, prune_without_statistics
from .weight_checks import check_finite, check_weight


def prune_model(
    model: nn.Module,
    calibration: Calibration | None,
    method: str | Recipe = "ace",
    sparsity: str | float | Sparsity | NotGiven = NOT_GIVEN,
    *,
    sequential: Sequential | NotGiven = NOT_GIVEN,
    permute: bool | NotGiven = NOT_GIVEN,
    rotate: bool | NotGiven = NOT_GIVEN,
    update: str | Mapping[str, Any] | Update | NotGiven | None = NOT_GIVEN,
    budgets: str | NotGiven | None = NOT_GIVEN,
    quantize: int | Mapping[str, Any] | Quantization | NotGiven | None = NOT_GIVEN,
    batch_size: int | None = None,
    include: str | Sequence[str] | NotGiven | None = NOT_GIVEN,
    exclude: str | Sequence[str] | NotGiven | None = NOT_GIVEN,
    offload_folder: str | Path | None = None,
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
        model: any module with an ``nn.ModuleList`` of blocks, on any device and in any floating dtype; forwards run in
            that dtype. accelerate may have spread the model (``device_map``, ``cpu_offload``, ``disk_offload``): each
            pruned weight stays where accelerate put it, and one on disk is written to the offload folder.
        calibration: token ids, int64 [n_sequences, length]; or an object with such ``ids`` and a ``mask`` (bool, True
            for real tokens; None if there is no padding); or batches, each a dict of tensors with what the model's
            forward takes (``input_ids``, ``pixel_values``, ``decoder_input_ids``, ``input_features``), or a tuple of
            its first arguments: a list, a DataLoader, or a function that returns one. All batches are kept in memory; a
            source without a length may give at most 10,000, and fill half of the machine's memory.
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
        rotate: before anything else, multiply the values of each key-value head by an orthogonal matrix that lowers the
            importance of the weights that the pattern prunes (:mod:`ace_triton.reordering.rotation`), and the output
            projection by its inverse. The model computes the same, up to rounding. Each block runs once more. Values
            that cannot be rotated are listed in the report. Default: False.
        update: "rescale" scales each row of a pruned layer so that its outputs have the energy of the dense row's
            outputs on the layer's present inputs, which come from the pruned blocks before it. "lstsq" moves every kept
            weight to where the layer best reproduces its dense outputs. An
            :class:`~ace_triton.solvers.update.Update` sets options. Default: no update.
        budgets: "outliers" lets blocks whose scores have more outliers keep more, with the same total: up to 0.16 more
            of a fraction, or one more of every m for n:m (:mod:`ace_triton.budgets`). Takes one more forward of a
            batch. Default: the same share in every block.
        quantize: 8 or 4 bits for the kept weights, or a :class:`~ace_triton.solvers.quantize.Quantization`, which also
            sets the group and the rule. A layer is quantized after its update, so later blocks see quantized weights.
            Weights keep their dtype; :func:`~ace_triton.packed.pack_model.pack_model` with the same bits and group
            stores them without further loss. Default: no quantization.
        batch_size: sequences of token ids in one forward; None for as many as make about 2,048 tokens, or
            16,384 on a GPU.
        include: shell patterns; only layers whose dotted name matches one are pruned. This is the only way to prune
            linear layers outside the blocks ("lm_head"). Default: all layers of the blocks.
        exclude: shell patterns of layers to leave dense. Default: none.
        offload_folder: keep the hidden states of the calibration set in files of this folder, which exists, and only
            those of one batch in memory. The files are removed at the end, also after an error. Default: in memory.
        progress: called after each block with the number of finished blocks, of all blocks, and the block's name.
        options: the metric's own.

    Raises:
        CheckpointError: if ``offload_folder`` does not exist; nothing was changed. Or if its disk, or that of
            accelerate's offload folder, is full: the blocks before are already pruned.
        RecipeError: if the method, an option or another part of the recipe is invalid, something is given beside a
            Recipe, the model is a single layer, or its weights were never loaded or cannot be written; nothing was
            changed.
        PatternError: if the sparsity is invalid; nothing was changed.
        ValueError: if the calibration set does not fit the model, a name pattern matches no layer, no values can be
            rotated although ``rotate`` asks for it, or the model's own
            forward changes its weights beyond repair; nothing was changed.
        PruneError: if a weight cannot be pruned (NaN or infinity, quantized); nothing was changed. Or if statistics
            have NaN or infinity (an overflow in fp16): that layer is not changed, but the blocks before it may be
            pruned. Other layers of its block may be pruned too, unless a GPU prunes them together (n:m, scores
            without a coupling, no update).
    """
    recipe = recipe_of(
        method,
        options,
        sparsity=sparsity,
        sequential=sequential,
        permute=permute,
        rotate=rotate,
        update=update,
        budgets=budgets,
        quantize=quantize,
        include=include,
        exclude=exclude,
    )
    _check_model(model)
    with opened(model, offload_to(offload_folder)) as store:
        return prune_stored(model, calibration, recipe, store, batch_size=batch_size, progress=progress)


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
        store: keeps the weights; units that it has finished before are not pruned again. ``progress`` is first called
            with their number.

    Raises:
        AceError: as :func:`prune_model`; what the store has finished stays finished.
    """
    clock = Stopwatch(next(model.parameters()).device)
    with ExitStack() as running:
        running.enter_context(several_dtypes_named(model))
        running.enter_context(calibration_mode(model))
        running.enter_context(weights_as_loaded(model, restorable=store.keeps_changes_private))
        batches = batches_of(model, calibration, batch_size, _tokens_of_a_batch(recipe)) if recipe.calibrated else []
        towers = find_towers(model, batches[0] if batches else None)
        plan = plan_of(model, recipe, [tower for tower in towers if tower.is_reached], batches)
        with clock.measure("select"):
            weights, finite = _checked_weights(plan, store, recipe)
            rehearse(recipe, next(iter(weights.values())))
        processes = Processes.now()
        _check_processes(processes, recipe, batches)
        _check_batches(recipe, batches)
        lanes = Lanes(len(batches), processes)
        store.once("units", lambda: [unit.name for unit in plan.units])
        done = [unit.name for unit in plan.units if store.finished(unit.name) is not None]
        if progress is not None and done:
            progress(len(done), len(plan.units), done[-1])
        selection = Selection(recipe, clock, plan, store, weights, finite, lanes)
        running.enter_context(few_threads(TOKENS_OF_A_FORWARD * max(w.numel() for w in weights.values())))
        selection.prepare(model, batches)
        if recipe.needs.tokens:
            runs = prune_with_statistics(model, plan, batches, selection, progress)
        else:
            runs = prune_without_statistics(plan, selection, progress)
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
        tuple(selection.fits),
        None if selection.rotator is None else selection.rotator.report(),
        cpu_seconds=clock.cpu_seconds(),
    )


def plan_of(model: nn.Module, recipe: Recipe, towers: Sequence[Tower], batches: Sequence[Batch]) -> Plan:
    """Which layers a recipe prunes in the towers of a model.

    Args:
        model: the model; it runs a few tokens if it may have experts in stacks.
        recipe: how to prune.
        towers: the towers that run.
        batches: the calibration set; empty for token ids of the vocabulary.
    """
    blocks = [block for tower in towers for block in tower.blocks]
    stacks = [stack for block in blocks for stack in possible_stacks(block.module, block.name)]
    layouts = find_layouts(lambda: run_model(model, trial_batch(model, batches)), stacks) if stacks else {}
    known_stacks = [(stack, layouts[stack.name]) for stack in stacks if stack.name in layouts]
    experts = [name for stack, layout in known_stacks for name in stack.linears(transposed=False, rows=layout.rows)]
    names = NameFilter.of(model, recipe.include, recipe.exclude, experts)
    return Plan(model, recipe.metric, recipe.needs, recipe.sparsity, names, towers, stacks, layouts)


def _tokens_of_a_batch(recipe: Recipe) -> int | None:
    """Tokens of a forward, few if each is an optimizer step; None for the default."""
    return BATCH_TOKENS if recipe.update is not None and recipe.update.block_epochs else None


def _check_batches(recipe: Recipe, batches: Sequence[Batch]) -> None:
    """ArgumentError if a block could not be trained on some of the batches and measured on others."""
    if recipe.update is not None and recipe.update.block_epochs and len(batches) < 2:
        raise ArgumentError(
            f"block_epochs holds a batch out, so it needs two or more, of about {BATCH_TOKENS} tokens each: give more "
            "calibration sequences, or a smaller batch size"
        )


def _check_processes(processes: Processes, recipe: Recipe, batches: Sequence[Batch]) -> None:
    """ArgumentError unless the processes can share the recipe, and have the same recipe and calibration set."""
    if processes.size == 1:
        return
    if recipe.update is not None and recipe.update.block_epochs:
        raise ArgumentError("block_epochs trains in one process: start the run without torchrun, or leave it out")
    digest = hashlib.sha256(repr(recipe).encode())
    for batch in batches:
        for tensor in tensors_in([batch.inputs, batch.valid]):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if not processes.agree(digest.hexdigest()):
        raise ArgumentError(
            "the processes of this run have different calibration sets or recipes: give all of them the same text, "
            "model files and options"
        )


def _checked_weights(plan: Plan, store: WeightStore, recipe: Recipe) -> tuple[dict[str, torch.Tensor], FiniteCheck]:
    """The weights of all layers, checked for NaN and infinity, and the check that knows them."""
    weights, finite = {}, FiniteCheck()
    unread: dict[str, torch.Tensor] = {}
    for unit in plan.units:
        later: dict[torch.device, list[torch.Tensor]] = {}
        for name, layer in unit.layers.items():
            weight = weights[name] = check_weight(layer, name)
            if store.finished(unit.name) is None:
                if backend_of_device(weight.device) == "triton" and weight.dtype in KERNEL_DTYPES:
                    later.setdefault(weight.device, []).append(weight)
                    unread[name] = weight
                else:
                    check_finite(weight, name, finite)
        for same in later.values():
            check_later(same, recipe, finite)
        for module in modules_of(plan, unit):
            store.release(module)
    finite.read()
    for name, weight in unread.items():
        if not finite.passed(weight):
            check_finite(weight, name, FiniteCheck())
    return weights, finite


def check_later(weights: Sequence[torch.Tensor], recipe: Recipe, finite: FiniteCheck) -> None:
    """Launch the checks of a unit's weights on one device; waits for nothing.

    If the metric needs them, the weights' sums are computed in the same read.
    """
    scores_only = recipe.metric.solve is None and recipe.update is None
    summed = [w for w in weights if recipe.needs.relative_importance and scores_only and not w.is_inference()]
    keep_group_relative_importance(summed, finite)
    known = {id(weight) for weight in summed}
    others = [weight for weight in weights if id(weight) not in known]
    for weight, flag in zip(others, find_each_not_finite(others), strict=True):
        finite.record(weight, flags=flag)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or linear_weight(model) is not None:
        raise RecipeError(
            f"prune_model takes a model with blocks, got a {type(model).__name__}; prune_linear prunes a single layer"
        )


def rehearse(recipe: Recipe, like: torch.Tensor | None = None) -> None:
    """Prune a temporary small layer, so that an invalid option is found before anything runs.

    Args:
        recipe: how to prune.
        like: a weight whose dtype and device are used; None for fp32 on the CPU.
    """
    like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
    dtype = as_kernel_dtype(like[:1]).dtype
    layer = nn.Linear(32, 32, bias=False, device="meta", dtype=dtype)  # Draws no random numbers.
    ramp = torch.linspace(-1, 1, 32 * 32, dtype=torch.float32, device=like.device).reshape(32, 32).to(dtype)
    layer.weight = nn.Parameter(ramp.clone())
    weight = layer.weight.detach()
    prune_checked(layer, weight, ramp, recipe, f"method {recipe.method!r}", FiniteCheck().record(weight))


def _peak_bytes(model: nn.Module) -> int:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
