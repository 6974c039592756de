"""Recovery of models that are no causal language models: encoders, vision, speech, and several towers."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..agreement import Pooling
from ..decoders.batches import Batch
from ..decoders.blocks import find_blocks
from ..decoders.calibration_forms import batches_of
from ..decoders.loaded_weights import weights_as_loaded
from ..errors import ArgumentError, RecoveryError
from ..processes import Processes
from ..solvers.kept_adamw import LARGEST_GRADIENT, KeptAdamW
from .checks import (
    check_dtypes,
    check_finite,
    check_norms,
    check_teacher,
    check_zeros,
    dense_names,
    own_dtype_names,
    pruned_masks,
)
from .output_distillation import OutputDistillation
from .rounded_forwards import RoundedWeight, roundings_of
from .settings import DEFAULT_MINUTES, RecoveryReport, RecoverySettings
from .state import RecoveryState, fingerprint, locked
from .stopping import HeldSignals, saved_steps_noted
from .stored import as_stored
from .train import RecoveryProgress, frozen, spent_share


def recover_model(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    settings: RecoverySettings | None = None,
    *,
    pooling: Pooling = "mean",
    pruned: bool | None = None,
    state: str | Path | None = None,
    save_every: float = 120.0,
    progress: RecoveryProgress | None = None,
) -> RecoveryReport:
    """Train the kept weights of any pruned model toward its dense model, in place; weights of 0 stay 0.

    The loss compares what the blocks return, and the predictions, or the embeddings of a model without logits
    (:mod:`~ace_triton.recovery.output_distillation`). For causal language models on text use
    :func:`~ace_triton.recover`, which computes their logits in chunks.

    Args:
        model: pruned. The weights of its blocks with at least 5 % zeros are trained.
        teacher: the dense model.
        batches: inputs of the model's forward, as for :func:`~ace_triton.prune_model`: one dict for each optimizer
            step. If they are fewer than the budget needs, they are read again in a new order.
        settings: None trains for DEFAULT_MINUTES. ``tokens_per_step`` has no effect, and ``groups`` is for causal
            language models.
        pooling: how hidden states become one embedding: "mean", "cls" or "last".
        pruned: as for :func:`~ace_triton.recover`.
        state: file to resume from after an interruption, as for :func:`~ace_triton.recover`: written atomically every
            ``save_every`` seconds, at a signal, and at the end. Remove it after the model is saved. None saves none.
        save_every: seconds between two writes of the state.
        progress: called after each step with the spent budget, the whole budget (steps or seconds) and the loss.

    Returns:
        The report. ``tokens`` counts text tokens without padding, and the losses are sums of relative errors.

    Raises:
        RecoveryError: the model is not pruned or the teacher is, the models' outputs do not fit each other, the state
            belongs to another training or is in use, several processes run, or a weight or a loss is not finite.
        ArgumentError: the batches are empty or do not fit the model.
        OSError: the state cannot be written.
    """
    settings = settings or RecoverySettings(minutes=DEFAULT_MINUTES)
    if settings.groups is not None:
        raise RecoveryError("group fine-tuning is for causal language models: leave groups (--tune groups) out")
    if pooling not in get_args(Pooling):
        raise ArgumentError(f"pooling {pooling!r}: use {', '.join(get_args(Pooling))}")
    if Processes.now().size > 1:
        raise RecoveryError("recover_model runs in one process: run it without torchrun")
    masks = pruned_masks(model, teacher, pruned=pruned)
    check_teacher(model, teacher, masks)
    check_dtypes(model, teacher, settings)
    check_norms(model, teacher, settings)
    check_finite(model, masks)
    roundings = roundings_of(model, masks, settings.quantization)
    steps = batches_of(model, batches, None)
    with locked(state), saved_steps_noted(state):
        identity = "" if state is None else fingerprint(settings, _digest(steps, pooling), model, teacher)
        with weights_as_loaded(model), frozen(model), frozen(teacher):
            objective = OutputDistillation(model, teacher, steps[0], pooling, settings.forward_dtype)
            with _trained(model, masks, settings, roundings) as optimizer:
                run = RecoveryState.begin(state, identity, optimizer)
                _train(objective, optimizer, _Order(steps, settings.seed), settings, run, (state, save_every), progress)
    check_zeros(model, masks)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    order = _Order(steps, settings.seed)
    return RecoveryReport(
        run.steps,
        sum(_tokens(order.of(step)) for step in range(run.steps)),
        run.steps / len(steps),
        run.seconds,
        run.cpu_seconds,
        tuple(run.losses),
        trained=kept,
        zeros=total - kept,
    )


class _Order:
    """Each batch once per epoch, in a new random order."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self._batches, self._seed = batches, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def of(self, step: int) -> Batch:
        """The batch of a step; every call gives the same."""
        epoch, place = divmod(step, len(self._batches))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = torch.randperm(len(self._batches), generator=generator, device="cpu")
            self._epoch = epoch
        return self._batches[int(self._order[place])]


def _train(
    objective: OutputDistillation,
    optimizer: KeptAdamW,
    order: _Order,
    settings: RecoverySettings,
    run: RecoveryState,
    keeping: tuple[str | Path | None, float],
    progress: RecoveryProgress | None,
) -> None:
    """Train until the budget is spent, and record it in ``run``."""
    path, every = keeping
    clock, cpu, saved = time.monotonic() - run.seconds, time.process_time() - run.cpu_seconds, run.seconds
    with HeldSignals(path is not None) as held:
        while (fraction := spent_share(settings, run)) < 1:
            loss = objective.backward(order.of(run.steps))
            if not math.isfinite(loss):
                raise RecoveryError(f"the loss became {loss} in step {run.steps}: try a smaller learning rate")
            optimizer.step(settings.rate(fraction), LARGEST_GRADIENT)
            run.record(loss, time.monotonic() - clock, time.process_time() - cpu)
            stop = held.number
            due = run.seconds - saved >= every or spent_share(settings, run) >= 1
            if path is not None and (due or stop is not None):
                run.save(path, optimizer)
                saved = run.seconds
            if stop is not None:
                held.deliver(stop)
            if progress is not None:
                progress(min(spent_share(settings, run), 1) * settings.budget, settings.budget, loss)


@contextmanager
def _trained(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor],
    settings: RecoverySettings,
    roundings: Mapping[str, RoundedWeight],
) -> Iterator[KeptAdamW]:
    """The optimizer of the parameters to train, which have the dtype of forwards inside the context."""
    blocks = [block.module.named_parameters(prefix=block.name) for block in find_blocks(model)]
    names = {parameter: name for block in blocks for name, parameter in block}
    moving = {name: p for p, name in names.items() if name in masks or (settings.norms and p.dim() == 1)}
    dtypes = {name: parameter.dtype for name, parameter in moving.items()}
    used = {name: rounding for name, rounding in roundings.items() if name in moving}
    own = own_dtype_names(model, moving)
    optimizer = KeptAdamW(moving, settings.forward_dtype, roundings=used, own_dtype=own, dense=dense_names(masks))
    try:
        for parameter in moving.values():
            parameter.requires_grad_(True)
        yield optimizer
    finally:
        for name, parameter in moving.items():
            parameter.grad = None
            parameter.requires_grad_(False)
            parameter.data = as_stored(name, optimizer.trained(name), dtypes[name])


def _digest(batches: Sequence[Batch], pooling: str) -> bytes:
    """Bytes that identify the inputs and how they are compared."""
    digest = hashlib.sha256(pooling.encode())
    for batch in batches:
        for name, tensor in batch.arguments.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _tokens(batch: Batch) -> int:
    """Number of text tokens in a batch, without padding; 0 without text."""
    ids: Any = batch.inputs.get("input_ids")
    if ids is None:
        return 0
    mask = batch.masks.get("attention_mask")
    return int(ids.numel() if mask is None or mask.shape != ids.shape else mask.sum())
