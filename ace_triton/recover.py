"""Recovery: a few minutes of training in which only kept weights move, toward the dense model's predictions.

The loss is :class:`~ace_triton.distillation.Distillation`'s. AdamW steps on fp32 copies of the kept weights, in a pass
that rounds them to bfloat16, in which forwards run (:mod:`~ace_triton.kernels.adamw`). Weights of 0 stay exactly 0.

The learning rate counts in units of each weight's root mean square, as Adafactor's relative step sizes do (Shazeer and
Stern, arXiv 1804.04235, section 8): AdamW moves a weight by about its rate whatever the gradient, and one model's
weights are ten times as large as another's.

The defaults are those with the least divergence from the dense model on text held out (docs/recovery.md). Left out,
since they gained no more there than other pieces of the same text do: blocks' outputs in the loss (SquareHead, Kurtic
et al., arXiv 2310.06927), logits halved (a temperature of 2), tokens replaced at random, AdamW in the eigenbasis of
each layer's inputs (after SOAP, Vyas et al., arXiv 2409.11321), the mean of the weights over the last steps.

What is read again is learnt by heart: SmolLM2-135M's loss falls from 0.56 to 0.34 in a second pass over 320,000 tokens,
and hardly on other text.

Each step passes over all trained weights whatever it reads, in 0.13 of its 1.28 CPU seconds at 256 tokens. Where a
forward is quick beside that, on a GPU, more tokens a step may pay.

The dense model runs on the way, a quarter of a step's arithmetic: a budget of minutes should see each token once, so
that there is nothing to keep of it.

Memory, in bytes: 15 a trained weight beside the model's own (4 for the copy, 2 its gradient, 8 of AdamW, 1 the mask),
the dense model, and what a step's forward keeps for its backward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .blocks import find_blocks
from .distillation import Distillation
from .kept_adamw import KeptAdamW
from .recovery_state import RecoveryState
from .recovery_text import Batches, GivenBatches, WrittenBatches, WrittenText
from .threads import few_threads, forward_work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RecoveryProgress = Callable[[float, float, float], None]

LEAST_ZEROS = 0.05
"""A weight with a smaller share of zeros was not pruned, and stays as it is."""

EAGER_LENGTH = 256
"""Tokens of a sequence up to which attention by plain products is quicker on a CPU than torch's own: a step takes a
tenth less at 256, and as long at 512."""

FIRST_RATE = 0.1
"""Share of the peak learning rate that the first step takes."""

LARGEST_GRADIENT = 1.0
"""Norm that gradients are cut to."""


@dataclass(frozen=True)
class RecoverySettings:
    """How to recover.

    Attributes:
        steps: of the optimiser; None where ``minutes`` is given.
        minutes: to train for; None where ``steps`` is given. The step that passes them is the last.
        tokens_per_step: rounded to whole sequences.
        learning_rate: at its peak, in units of each weight's root mean square; it rises there linearly over the first
            ``warmup`` of the budget, and falls to 0 in a straight line from there.
        warmup: share of the budget.
        norms: train the blocks' one-dimensional weights (norms, biases) too.
        forward_dtype: of forwards: bfloat16, or float32 for models in float32.
        seed: of the order of sequences, or of what the teacher writes.

    Raises:
        ValueError: not exactly one of steps and minutes, or a number out of range.
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
            raise ValueError(f"give steps or minutes, one of them; got steps={self.steps}, minutes={self.minutes}")
        budget = self.steps if self.minutes is None else self.minutes
        if not (budget is not None and budget > 0 and self.tokens_per_step > 0 and self.learning_rate > 0):
            raise ValueError(f"steps, minutes, tokens_per_step and learning_rate must be above 0; got {self}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {self.warmup}")
        if self.forward_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"forward_dtype must be torch.bfloat16 or torch.float32, got {self.forward_dtype}")

    def rate(self, fraction: float) -> float:
        """Learning rate where ``fraction`` of the budget is spent."""
        if fraction < self.warmup:
            return self.learning_rate * max(FIRST_RATE, fraction / self.warmup)
        return self.learning_rate * (1 - fraction) / (1 - self.warmup)


@dataclass(frozen=True)
class RecoveryReport:
    """What :func:`recover` did.

    Attributes:
        steps, tokens, seconds: taken, from the first start on.
        passes: over the text; what is read again, above 1, teaches little. 1 where the teacher wrote it.
        cpu_seconds: of the process, all threads together, over the same span.
        losses: mean loss of each step, in nats a token.
        trained, zeros: weights that moved, and that stayed 0.
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
    settings: RecoverySettings,
    *,
    state: str | Path | None = None,
    save_every: float = 120.0,
    progress: RecoveryProgress | None = None,
) -> RecoveryReport:
    """Train a pruned model's kept weights, in place; what is 0 stays 0.

    Args:
        model: pruned; weights of its blocks of which at least 5 % are 0 are trained. Embeddings and head are not.
        teacher: the dense model, with the same vocabulary.
        text: int64 [n_sequences, length], to train on, read again in another order where the budget outlasts it; or
            :class:`~ace_triton.recovery_text.WrittenText`.
        settings: how.
        state: file that the training can go on from after a kill, written whole every ``save_every`` seconds and at the
            end; one that is there is gone on from. Remove it when the model is saved. None to keep none.
        save_every: seconds; writing 12 bytes a trained weight counts in the budget of minutes.
        progress: called with budget spent, budget in all (steps, or seconds) and loss after each step.

    Raises:
        ValueError: a model without zeros, ids that do not fit, another vocabulary, a state of another training, or a
            loss that is not finite.
    """
    masks = pruned_masks(model)
    _check(model, teacher, text, settings)
    batches = _batches(text, teacher, settings)
    with (
        _trainable(model, masks, settings) as optimizer,
        _frozen(teacher),
        _quick_attention((model, teacher), batches.length),
        few_threads(forward_work(model, settings.tokens_per_step)),
    ):
        run = RecoveryState.begin(state, settings, batches.digest(), optimizer)
        clock, cpu = time.monotonic() - run.seconds, time.process_time() - run.cpu_seconds
        saved = run.seconds
        objective = Distillation(model, teacher, batches.of(run.steps), settings.forward_dtype)
        while (fraction := _spent(settings, run)) < 1:
            loss = objective.backward(batches.of(run.steps).to(model.device))
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} in step {run.steps}: try a smaller learning rate")
            optimizer.step(settings.rate(fraction), LARGEST_GRADIENT)
            run.record(loss, time.monotonic() - clock, time.process_time() - cpu)
            if state is not None and (run.seconds - saved >= save_every or _spent(settings, run) >= 1):
                run.save(state, optimizer)
                saved = run.seconds
            if progress is not None:
                budget = settings.steps if settings.minutes is None else 60 * settings.minutes
                assert budget is not None
                progress(min(_spent(settings, run), 1) * budget, budget, loss)
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


def pruned_masks(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of each pruned weight of a model's blocks, True where it was kept; ValueError where none was pruned."""
    masks = {}
    for block in find_blocks(model):
        for name, parameter in block.module.named_parameters(prefix=block.name):
            if parameter.dim() >= 2 and float((parameter == 0).float().mean()) >= LEAST_ZEROS:
                masks[name] = (parameter != 0).detach()
    if not masks:
        raise ValueError(
            f"no weight of this {type(model).__name__} has {LEAST_ZEROS:.0%} of zeros: recovery is for pruned models"
        )
    return masks


def _check(
    model: PreTrainedModel, teacher: PreTrainedModel, text: torch.Tensor | WrittenText, settings: RecoverySettings
) -> None:
    if isinstance(text, WrittenText):
        if text.length < 1:
            raise ValueError(f"sequences must have a token at least, got a length of {text.length}")
        least = most = text.start
    elif text.dim() != 2 or text.dtype != torch.int64 or text.numel() == 0:
        raise ValueError(f"ids must be int64 [n_sequences, length], not empty; got {text.dtype} {tuple(text.shape)}")
    else:
        least, most = int(text.min()), int(text.max())
    sizes = [next(m.get_input_embeddings().parameters()).shape[0] for m in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models' vocabularies have {sizes[0]} and {sizes[1]} tokens: give the model as it was")
    if least < 0 or most >= sizes[0]:
        raise ValueError(f"ids run from {least} to {most}, the vocabulary from 0 to {sizes[0] - 1}")
    dtypes = {parameter.dtype for decoder in (model, teacher) for parameter in decoder.parameters()}
    if settings.forward_dtype == torch.float32 and dtypes != {torch.float32}:
        raise ValueError(
            f"forwards in float32 need both models in float32, not {', '.join(sorted(map(str, dtypes)))}: load them "
            "so, or leave forward_dtype at torch.bfloat16"
        )
    if teacher is model:
        raise ValueError("the teacher is the pruned model itself: load the dense one beside it")


def _batches(text: torch.Tensor | WrittenText, teacher: PreTrainedModel, settings: RecoverySettings) -> Batches:
    if isinstance(text, WrittenText):
        return WrittenBatches(text, teacher, settings.tokens_per_step, settings.seed)
    return GivenBatches(text, settings.tokens_per_step, settings.seed)


def _spent(settings: RecoverySettings, run: RecoveryState) -> float:
    """Share of the budget; 1 and above ends the training."""
    if settings.minutes is not None:
        return run.seconds / (60 * settings.minutes)
    assert settings.steps is not None
    return run.steps / settings.steps


@contextmanager
def _trainable(
    model: PreTrainedModel, masks: dict[str, torch.Tensor], settings: RecoverySettings
) -> Iterator[KeptAdamW]:
    """The optimiser of the parameters that move, which are in the dtype of forwards inside."""
    blocks = [block.module.named_parameters(prefix=block.name) for block in find_blocks(model)]
    names = {parameter: name for block in blocks for name, parameter in block}  # one of each that blocks share
    moving = {n: p for p, n in names.items() if n in masks or (settings.norms and p.dim() == 1)}
    dtypes = {name: parameter.dtype for name, parameter in moving.items()}
    with _frozen(model):
        optimizer = KeptAdamW(moving, settings.forward_dtype)
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
    """Evaluation mode and no gradients inside; what was set before is set again at the end."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _quick_attention(models: tuple[PreTrainedModel, ...], length: int) -> Iterator[None]:
    """Inside, the kind of attention that is quickest for sequences of that length."""
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
            raise RuntimeError(f"{name}: a pruned weight moved, which is a bug of ace_triton; please report it")
