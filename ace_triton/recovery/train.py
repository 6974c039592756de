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
the mask), and the activations that the backward pass of a step needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..decoders.batches import check_positions, longest_sequence, trial_ids
from ..decoders.blocks import Block, find_blocks
from ..decoders.loaded_weights import weights_as_loaded
from ..errors import RecoveryError
from ..inputs.written_text import WrittenText
from ..processes import Processes
from ..solvers.kept_adamw import LEAST_ZEROS, KeptAdamW
from ..threads import few_threads, forward_work
from .distillation import Distillation
from .sharing import check_equal, check_shares, share_of, whole_models
from .state import RecoveryState, fingerprint, locked
from .text import Batches, batches_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecoveryProgress = Callable[[float, float, float], None]

DEFAULT_MINUTES = 5.0
"""Budget if no settings are given."""

EAGER_LENGTH = 256
"""Longest sequence, in tokens, for which eager attention is faster than torch's sdpa on a CPU."""

FIRST_RATE = 0.1
"""Learning rate of the first step, as a share of the peak."""

LARGEST_GRADIENT = 1.0
"""Norm that gradients are clipped to."""


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery.

    Attributes:
        steps: number of optimizer steps; None if ``minutes`` is given.
        minutes: time to train; None if ``steps`` is given. Training stops after the step that exceeds it.
        tokens_per_step: number of tokens in an optimizer step, rounded to whole sequences; with several processes, of
            all of them together.
        learning_rate: peak learning rate, in units of each weight's root mean square. The rate rises linearly to the
            peak during ``warmup``, then falls linearly to 0.
        warmup: share of the budget.
        norms: also train the blocks' one-dimensional weights (norms, biases).
        forward_dtype: dtype of forwards: bfloat16, or float32 if both models are in float32.
        seed: random seed of the order of sequences, or of the text that the teacher writes.

    Raises:
        RecoveryError: not exactly one of steps and minutes is given, or a number is out of range.
    """

    steps: int | None = None
    minutes: float | None = None
    tokens_per_step: int = 256
    learning_rate: float = 1.7e-3
    warmup: float = 0.04
    norms: bool = False
    forward_dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise RecoveryError(f"give steps or minutes, one of them; got steps={self.steps}, minutes={self.minutes}")
        budget = self.steps if self.minutes is None else self.minutes
        if not all(0 < n < math.inf for n in (budget or 0, self.tokens_per_step, self.learning_rate)):
            raise RecoveryError(
                f"steps, minutes, tokens_per_step and learning_rate must be above 0 and finite; got {self}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise RecoveryError(f"seed must fit into 64 bits, got {self.seed}")
        if not 0 <= self.warmup < 1:
            raise RecoveryError(f"warmup must lie in [0, 1), got {self.warmup}")
        if self.forward_dtype not in (torch.bfloat16, torch.float32):
            raise RecoveryError(f"forward_dtype must be torch.bfloat16 or torch.float32, got {self.forward_dtype}")

    def rate(self, fraction: float) -> float:
        """The learning rate when ``fraction`` of the budget is spent."""
        if fraction < self.warmup:
            return self.learning_rate * max(FIRST_RATE, fraction / self.warmup)
        return self.learning_rate * (1 - fraction) / (1 - self.warmup)


@dataclass(frozen=True)
class RecoveryReport:
    """What :func:`recover` did.

    Attributes:
        steps, tokens, seconds: totals since the first start, resumed runs included.
        passes: number of epochs; above 1, training overfits. 1 if the teacher wrote the text.
        cpu_seconds: CPU time of all processes over the same span, all threads together.
        losses: mean loss of each step, in nats per token.
        trained, zeros: number of weights that were trained, and that stayed 0.
    """

    steps: int
    tokens: int
    passes: float
    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]
    trained: int
    zeros: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "losses": list(self.losses)}


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    text: torch.Tensor | WrittenText,
    settings: RecoverySettings | None = None,
    *,
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
        state: file to resume from after a kill, written atomically every ``save_every`` seconds and at the end. If it
            exists, the training resumes from it. Remove it after the model is saved. None saves no state. The first
            process reads and writes it, and the number of processes may change.
        save_every: seconds between two writes of the state. A write takes 12 bytes for each trained weight, and its
            time counts in the budget of minutes.
        progress: called after each step with the spent budget, the whole budget (steps or seconds) and the loss.

    Raises:
        RecoveryError: the model is not pruned or the teacher is, the ids or vocabularies do not fit, the state belongs
            to another training or is in use, or a loss is not finite. With several processes also: a step has fewer
            sequences than processes, their models or text differ, or memory ran out.
        ArgumentError: the sequences are longer than a model's positions.
        OSError: the state cannot be written.
    """
    settings = settings or RecoverySettings(minutes=DEFAULT_MINUTES)
    processes = Processes.now()
    masks = pruned_masks(model, teacher)
    _check(model, teacher, text, settings)
    _check_teacher(model, teacher, masks)
    batches = batches_of(text, teacher, settings.tokens_per_step, settings.seed, processes)
    check_shares(batches, processes)
    file = state if processes.is_first else None
    with locked(file), whole_models(processes):
        alone = state is None and processes.size == 1
        identity = "" if alone else fingerprint(settings, batches.digest(), model, teacher)
        check_equal(identity, processes)
        keeping = _Keeping(file, identity, save_every)
        run = _train(model, teacher, masks, batches, settings, keeping, processes, progress)
    _check_zeros(model, masks)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return RecoveryReport(
        run.steps,
        run.steps * batches.tokens,
        batches.passes(run.steps),
        run.seconds,
        run.cpu_seconds,
        tuple(run.losses),
        trained=kept,
        zeros=total - kept,
    )


@dataclass(frozen=True)
class _Keeping:
    """Where and how often the state is saved.

    Attributes:
        path: path of the state; None saves none.
        identity: fingerprint of the training.
        every: seconds between two writes.
    """

    path: str | Path | None
    identity: str
    every: float


def _train(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    masks: dict[str, torch.Tensor],
    batches: Batches,
    settings: RecoverySettings,
    keeping: _Keeping,
    processes: Processes,
    progress: RecoveryProgress | None,
) -> RecoveryState:
    with (
        few_threads(forward_work(model, settings.tokens_per_step)),
        weights_as_loaded(model),
        _trainable(model, masks, settings, processes) as optimizer,
        _frozen(teacher),
        _quick_attention((model, teacher), batches.length),
    ):
        run = processes.broadcast(RecoveryState.begin(keeping.path, keeping.identity, optimizer))
        if run.steps:
            optimizer.take_from_first()
        clock, cpu, cpu_before = time.monotonic() - run.seconds, time.process_time(), run.cpu_seconds
        saved = run.seconds
        objective = Distillation(model, teacher, batches.of(run.steps), settings.forward_dtype)
        while (fraction := _spent(settings, run)) < 1:
            own = share_of(batches.of(run.steps), processes)
            loss = sum(processes.gather(objective.backward(own.to(model.device), batches.tokens)))
            if not math.isfinite(loss):
                raise RecoveryError(f"the loss became {loss} in step {run.steps}: try a smaller learning rate")
            optimizer.step(settings.rate(fraction), LARGEST_GRADIENT)
            spent = processes.gather((time.monotonic() - clock, time.process_time() - cpu))
            run.record(loss, spent[0][0], cpu_before + sum(of_process for _, of_process in spent))
            if keeping.path is not None and (run.seconds - saved >= keeping.every or _spent(settings, run) >= 1):
                run.save(keeping.path, optimizer)
                saved = run.seconds
            if progress is not None:
                budget = settings.steps if settings.minutes is None else 60 * settings.minutes
                assert budget is not None
                progress(min(_spent(settings, run), 1) * budget, budget, loss)
    return run


def pruned_masks(model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> dict[str, torch.Tensor]:
    """Masks of all pruned weights in a model's blocks, True for kept weights; RecoveryError if none is pruned.

    If the teacher's blocks have more parameters, the model was made smaller by structured pruning. Then all matrices of
    its blocks have a mask.
    """
    masks, blocks = {}, find_blocks(model)
    smaller = teacher is not None and _size(blocks) < _size(find_blocks(teacher))
    for block in blocks:
        for name, parameter in block.module.named_parameters(prefix=block.name):
            pruned = parameter.dim() >= 2 and float((parameter == 0).float().mean()) >= LEAST_ZEROS
            if pruned or (smaller and parameter.dim() >= 2):
                masks[name] = (parameter != 0).detach() if pruned else torch.ones_like(parameter, dtype=torch.bool)
    if not masks:
        raise RecoveryError(
            f"no weight of this {type(model).__name__} has {LEAST_ZEROS:.0%} zeros or more: prune the model first"
        )
    return masks


def _size(blocks: Sequence[Block]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.module.parameters())


def _check(
    model: PreTrainedModel, teacher: PreTrainedModel, text: torch.Tensor | WrittenText, settings: RecoverySettings
) -> None:
    if isinstance(text, WrittenText):
        kept = len(text.prompt) if text.keep_start else 0
        if not text.prompt or text.length <= kept:
            raise RecoveryError(
                f"written text needs a start token and at least one token after it, got a length of {text.length} "
                f"with start {text.prompt}"
            )
        least, most = min(text.prompt), max(text.prompt)
        length = text.length
    elif text.dim() != 2 or text.dtype != torch.int64 or text.numel() == 0:
        raise RecoveryError(f"ids must be int64 [n_sequences, length], not empty; got {text.dtype} {tuple(text.shape)}")
    else:
        least, most = int(text.min()), int(text.max())
        length = text.shape[1]
    for decoder in (model, teacher):
        check_positions(longest_sequence(decoder), length, "a length of")
    sizes = [next(m.get_input_embeddings().parameters()).shape[0] for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise RecoveryError(
            f"the pruned model's vocabulary has {sizes[0]} tokens, the teacher's {sizes[1]}: give the dense model that "
            "it was pruned from as the teacher"
        )
    if least < 0 or most >= sizes[0]:
        raise RecoveryError(f"ids run from {least} to {most}, the vocabulary from 0 to {sizes[0] - 1}")
    dtypes = {parameter.dtype for decoder in (model, teacher) for parameter in decoder.parameters()}
    if settings.forward_dtype == torch.float32 and dtypes != {torch.float32}:
        raise RecoveryError(
            f"forwards in float32 need both models in float32, not {', '.join(sorted(map(str, dtypes)))}: load them "
            "so, or leave forward_dtype at torch.bfloat16"
        )


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, masks: dict[str, torch.Tensor]) -> None:
    """RecoveryError if the teacher is pruned: a model learns nothing from itself, and little from a pruned one."""
    weights = dict(teacher.named_parameters())
    zeros = {name: mask for name, mask in masks.items() if not mask.all()}
    shared = [(weights[n], mask) for n, mask in zeros.items() if n in weights and weights[n].shape == mask.shape]
    if teacher is model or (shared and not any(bool(weight[~mask.to(weight.device)].any()) for weight, mask in shared)):
        raise RecoveryError(
            "the teacher is the pruned model itself, or has the same zeros: give the dense model that it was pruned "
            "from"
        )
    matrices = [p for block in find_blocks(teacher) for p in block.module.parameters() if p.dim() >= 2]
    total = sum(matrix.numel() for matrix in matrices)
    share = 1 - sum(int(matrix.count_nonzero()) for matrix in matrices) / max(1, total)
    if share >= LEAST_ZEROS:
        raise RecoveryError(
            f"the teacher is pruned too ({share:.0%} of its blocks' weights are 0): give the dense model that the "
            "pruned one was made from"
        )


def _spent(settings: RecoverySettings, run: RecoveryState) -> float:
    """Spent share of the budget; training ends at 1."""
    if settings.minutes is not None:
        return run.seconds / (60 * settings.minutes)
    assert settings.steps is not None
    return run.steps / settings.steps


@contextmanager
def _trainable(
    model: PreTrainedModel, masks: dict[str, torch.Tensor], settings: RecoverySettings, processes: Processes
) -> Iterator[KeptAdamW]:
    """The optimizer of the parameters to train, which have the dtype of forwards inside the block."""
    blocks = [block.module.named_parameters(prefix=block.name) for block in find_blocks(model)]
    names = {parameter: name for block in blocks for name, parameter in block}  # blocks may share a parameter
    moving = {n: p for p, n in names.items() if n in masks or (settings.norms and p.dim() == 1)}
    dtypes = {name: parameter.dtype for name, parameter in moving.items()}
    with _frozen(model):
        with torch.no_grad():
            model(input_ids=trial_ids(model), use_cache=False)  # RWKV rescales its weights here, so before the copy.
        optimizer = KeptAdamW(moving, settings.forward_dtype, processes)
        try:
            for parameter in moving.values():
                parameter.requires_grad_(True)
            yield optimizer
        finally:
            for name, parameter in moving.items():
                parameter.grad = None
                parameter.requires_grad_(False)
                parameter.data = optimizer.values[name].to(dtypes[name])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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


def _check_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        if bool(model.get_parameter(name).masked_select(~mask).any()):
            raise RuntimeError(f"{name}: a pruned weight is no longer 0")
