"""Recovery: a few minutes of training of the kept weights toward the dense model's predictions.

The loss is in :class:`~ace_triton.recovery.distillation.Distillation`. AdamW updates fp32 copies of the kept weights,
and the same pass rounds them to bfloat16, the dtype of forwards (:mod:`~ace_triton.kernels.adamw`). Weights of 0 stay
exactly 0.

The learning rate is in units of each weight's root mean square, as Adafactor's relative step sizes (Shazeer and Stern,
arXiv 1804.04235, section 8). AdamW changes a weight by about the learning rate, whatever the size of the gradient, and
the size of weights differs between models and layers. docs/recovery.md compares settings.

A second epoch overfits. A budget of minutes should read each token once, so the teacher runs in every step and its
outputs are not cached.

Each optimizer step updates all trained weights, however few tokens it reads. If a forward is fast compared with that
update, as on a GPU, more tokens per step may be better.

Several processes share each step (:mod:`~ace_triton.recovery.sharing`).

Memory beside the two models: 15 bytes for each trained weight (4 for the copy, 2 for its gradient, 8 for AdamW, 1 for
the mask), and the activations that the backward pass of a step needs. Forwards in float32 take 2 bytes more for the
gradient, and 4 less for the copy unless forwards round the weights (:mod:`~ace_triton.recovery.rounded_forwards`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..decoders.batches import trial_ids
from ..decoders.blocks import find_blocks
from ..decoders.loaded_weights import weights_as_loaded
from ..errors import RecoveryError
from ..inputs.written_text import WrittenText
from ..processes import Processes
from ..solvers.kept_adamw import LARGEST_GRADIENT, KeptAdamW, Rounding
from ..threads import few_threads, forward_work
from .checks import (
    check_arguments,
    check_finite,
    check_norms,
    check_teacher,
    check_zeros,
    dense_names,
    own_dtype_names,
    pruned_masks,
)
from .distillation import Distillation
from .groups import adapted, tuned_layers
from .rounded_forwards import roundings_of
from .settings import DEFAULT_MINUTES, RecoveryReport, RecoverySettings
from .sharing import check_equal, check_shares, passes_of, share_of, whole_models
from .state import RecoveryState, fingerprint, locked
from .stopping import HeldSignals, saved_steps_noted
from .stored import as_stored
from .text import Batches, batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecoveryProgress = Callable[[float, float, float], None]

EAGER_LENGTH = 256
"""Longest sequence, in tokens, for which eager attention is faster than torch's sdpa on a CPU."""


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    text: torch.Tensor | WrittenText,
    settings: RecoverySettings | None = None,
    *,
    shard: torch.device | str | None = None,
    pruned: bool | None = None,
    state: str | Path | None = None,
    save_every: float = 120.0,
    progress: RecoveryProgress | None = None,
) -> RecoveryReport:
    """Train a pruned model's kept weights, in place; weights of 0 stay 0.

    If several processes are in one group of torch.distributed, all must call this with the same arguments. They share
    the sequences of each step, and all get the trained weights.

    Args:
        model: pruned. The weights of its blocks with at least 5 % zeros are trained, or all matrices of its blocks if
            structured pruning made it smaller than the teacher; embeddings and head are not.
        teacher: the dense model, with the same vocabulary.
        text: the training text. Either token ids, int64 [n_sequences, length], which are read again in a new order if
            they are fewer than the budget needs; or :class:`~ace_triton.inputs.written_text.WrittenText`, which the
            teacher writes on demand.
        settings: None trains for DEFAULT_MINUTES, with the other settings at their defaults.
        shard: device on which each of several processes holds its share of both models' blocks (torch's FSDP2); the
            models must be on the CPU. The weights agree with those of whole models to rounding. Afterwards only the
            first process has the trained weights; in the others they are on the meta device. None for whole models.
        pruned: for a model that is smaller than the teacher, whether its zeros were pruned and stay 0. False trains
            them too, as those that an earlier rounding left. None: they stay if they follow a pattern n:m, or are 44 %
            of a weight or more.
        state: file to resume from after an interruption, written atomically every ``save_every`` seconds and at the
            end. If it exists, the training resumes from it. Remove it after the model is saved. None saves no state.
            The first process reads and writes it, and the number of processes may change. With a state, the first
            SIGINT, SIGTERM or SIGHUP in the main thread of a process waits until the step has ended in all processes
            and is saved; then it takes effect, such as by a KeyboardInterrupt. A second one takes effect at once.
        save_every: seconds between two writes of the state. A write takes 12 bytes for each trained weight, and its
            time counts in the budget of minutes.
        progress: called after each step with the spent budget, the whole budget (steps or seconds) and the loss.

    Raises:
        RecoveryError: the model is not pruned or the teacher is, the ids or vocabularies do not fit, the state belongs
            to another training or is in use, a model cannot be sharded, or a weight or a loss is not finite. A model
            that no step has changed keeps its weights. With several processes
            also: a step has fewer sequences than processes, their models or text differ, or memory ran out.
        ArgumentError: the sequences are longer than a model's positions.
        OSError: the state cannot be written.
    """
    settings = settings or RecoverySettings(minutes=DEFAULT_MINUTES)
    processes = Processes.now()
    masks = pruned_masks(model, teacher, pruned=pruned)
    check_arguments(model, teacher, text, settings)
    check_teacher(model, teacher, masks)
    check_norms(model, teacher, settings, shard=shard is not None)
    check_finite(model, masks)
    batches = batches_of(text, teacher, settings.tokens_per_step, settings.seed, processes)
    check_shares(batches, processes)
    file = state if processes.is_first else None
    with locked(file), saved_steps_noted(file), whole_models(processes, shard=shard is not None):
        alone = state is None and processes.size == 1
        identity = "" if alone else fingerprint(settings, batches.digest(), model, teacher)
        check_equal(identity, processes)
        keeping = _Keeping(file, state is not None, identity, save_every)
        names = _trained_names(model, masks, settings)
        others = sum(model.get_parameter(name).numel() for name in names if name not in masks)
        roundings = roundings_of(model, masks, settings.quantization, shard=shard is not None)
        roundings = {name: roundings[name] for name in names if name in roundings}
        tuned = None
        if settings.groups is not None:
            tuned = tuned_layers(model, masks, settings.groups, shard=shard is not None)
        ready: AbstractContextManager[tuple[PreTrainedModel, PreTrainedModel, KeptAdamW]]
        if tuned is not None:
            ready = _adapted(model, teacher, tuned, settings, processes)
        elif shard is None:
            ready = _whole(model, teacher, names, settings, processes, roundings, dense_names(masks))
        else:
            from .sharded import sharded  # Its imports from torch.distributed take long.

            device, dtype, dense = torch.device(shard), settings.forward_dtype, dense_names(masks)
            ready = sharded(model, teacher, names, dtype, processes, device, roundings, dense)
        with few_threads(forward_work(model, settings.tokens_per_step)), ready as (student, target, optimizer):
            run = _train(
                student, target, optimizer, batches, settings, keeping, processes, progress, in_step=shard is not None
            )
            adapters = None if tuned is None else sum(value.numel() for value in optimizer.values.values())
    if shard is None or processes.is_first:
        check_zeros(model, masks)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return RecoveryReport(
        run.steps,
        run.steps * batches.tokens,
        batches.passes(run.steps),
        run.seconds,
        run.cpu_seconds,
        tuple(run.losses),
        trained=kept + others if adapters is None else adapters,
        zeros=total - kept,
    )


@dataclass(frozen=True)
class _Keeping:
    """Where and how often the state is saved.

    Attributes:
        path: path of the state in the first process; None elsewhere, and if none is saved.
        saves: True in all processes if the first one saves a state.
        identity: fingerprint of the training.
        every: seconds between two writes.
    """

    path: str | Path | None
    saves: bool
    identity: str
    every: float


def _train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: KeptAdamW,
    batches: Batches,
    settings: RecoverySettings,
    keeping: _Keeping,
    processes: Processes,
    progress: RecoveryProgress | None,
    *,
    in_step: bool,
) -> RecoveryState:
    """Train until the budget is spent; ``in_step`` if all processes must run the same number of passes."""
    with _quick_attention((model, teacher), batches.length), HeldSignals(keeping.saves) as held:
        run = processes.broadcast(RecoveryState.begin(keeping.path, keeping.identity, optimizer))
        if run.steps:
            optimizer.take_from_first()
        clock, cpu, cpu_before = time.monotonic() - run.seconds, time.process_time(), run.cpu_seconds
        saved = run.seconds
        objective = Distillation(model, teacher, batches.of(run.steps), settings.forward_dtype, settings.hidden_states)
        most = objective.most(batches.length)
        passes = passes_of(batches.sequences, most, processes) if in_step and most is not None else None
        while (fraction := spent_share(settings, run)) < 1:
            own = share_of(batches.of(run.steps), processes).to(model.device)
            loss = sum(processes.gather(objective.backward(own, batches.tokens, passes=passes)))
            if not math.isfinite(loss):
                remedy = "a smaller learning rate"
                if settings.hidden_states:
                    remedy += f", or a weight of hidden states (--hidden-states) below {settings.hidden_states:g}"
                raise RecoveryError(f"the loss became {loss} in step {run.steps}: try {remedy}")
            optimizer.step(settings.rate(fraction), LARGEST_GRADIENT)
            spent = processes.gather((time.monotonic() - clock, time.process_time() - cpu, held.number))
            run.record(loss, spent[0][0], cpu_before + sum(of_process for _, of_process, _ in spent))
            stop = next((number for _, _, number in spent if number is not None), None)
            due = run.seconds - saved >= keeping.every or spent_share(settings, run) >= 1
            if keeping.saves and (due or stop is not None):
                optimizer.collect()
                if keeping.path is not None:
                    run.save(keeping.path, optimizer)
                saved = run.seconds
            if stop is not None:
                processes.wait()  # Until the state is written: torchrun ends all processes after the first one.
                held.deliver(stop)
            if progress is not None:
                progress(min(spent_share(settings, run), 1) * settings.budget, settings.budget, loss)
    return run


def spent_share(settings: RecoverySettings, run: RecoveryState) -> float:
    """Spent share of the budget; training ends at 1."""
    return (run.steps if settings.minutes is None else run.seconds) / settings.budget


def _trained_names(model: PreTrainedModel, masks: dict[str, torch.Tensor], settings: RecoverySettings) -> list[str]:
    """Names of the parameters to train; one that blocks share has one name."""
    blocks = [block.module.named_parameters(prefix=block.name) for block in find_blocks(model)]
    names = {parameter: name for block in blocks for name, parameter in block}
    return [name for p, name in names.items() if name in masks or (settings.norms and p.dim() == 1)]


@contextmanager
def _whole(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    names: Sequence[str],
    settings: RecoverySettings,
    processes: Processes,
    roundings: Mapping[str, Rounding],
    dense: Collection[str],
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, KeptAdamW]]:
    """Both models, and the optimizer of the parameters to train, which have the dtype of forwards inside the block."""
    moving = {name: model.get_parameter(name) for name in names}
    dtypes = {name: parameter.dtype for name, parameter in moving.items()}
    with weights_as_loaded(model), frozen(model), frozen(teacher):
        with torch.no_grad():
            model(input_ids=trial_ids(model), use_cache=False)  # RWKV rescales its weights here, so before the copy.
        own = own_dtype_names(model, names)
        optimizer = KeptAdamW(moving, settings.forward_dtype, processes, roundings, own_dtype=own, dense=dense)
        try:
            for parameter in moving.values():
                parameter.requires_grad_(True)
            yield model, teacher, optimizer
        finally:
            for name, parameter in moving.items():
                parameter.grad = None
                parameter.requires_grad_(False)
                parameter.data = as_stored(name, optimizer.trained(name), dtypes[name])


@contextmanager
def _adapted(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    settings: RecoverySettings,
    processes: Processes,
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, KeptAdamW]]:
    """Both models, and the optimizer of the adapters of group fine-tuning, which are merged at exit."""
    assert settings.groups is not None
    with (
        weights_as_loaded(model),
        frozen(model),
        frozen(teacher),
        adapted(layers, settings.groups, settings.seed, settings.forward_dtype, processes) as optimizer,
    ):
        yield model, teacher, optimizer


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; restores the previous settings."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _quick_attention(models: tuple[PreTrainedModel, ...], length: int) -> Iterator[None]:
    """Eager attention on a CPU for short sequences, for which it is faster than sdpa."""
    slower = [
        model
        for model in models
        if model.device.type == "cpu"
        and length <= EAGER_LENGTH
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
        and not model.config.sub_configs
    ]
    try:
        for model in slower:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model in slower:
            model.set_attn_implementation("sdpa")
