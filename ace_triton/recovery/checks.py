"""Checks of the models and the text before a recovery, and of the zeros after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..decoders.batches import check_positions, longest_sequence
from ..decoders.blocks import Block, find_blocks
from ..errors import RecoveryError
from ..inputs.written_text import WrittenText
from ..kernels.few_bits import LARGEST, STEP
from ..packed.pack_layer import LEAST_UNSTRUCTURED
from ..packed.pattern import WIDEST_ROUNDED, find_pattern
from ..solvers.kept_adamw import LEAST_ZEROS
from .settings import RecoverySettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL_IF_NOT_ROUNDED = 1.01
"""Largest n / m, as a multiple of the share of non-zero weights, of pruned weights that were not rounded."""


def pruned_masks(
    model: nn.Module, teacher: nn.Module | None = None, *, pruned: bool | None = None
) -> dict[str, torch.Tensor]:
    """Masks of all pruned weights in a model's blocks, True for kept weights; RecoveryError if none is pruned.

    If the teacher's blocks have more parameters, the model was made smaller by structured pruning. Then all matrices of
    its blocks have a mask.

    Args:
        model: the model.
        teacher: the dense model; None if the model has its shapes.
        pruned: whether zeros of a smaller model were pruned. Rounding to few bits leaves zeros too. None finds out:
            they were if they follow a pattern n:m, or are 44 % of a weight or more.
    """
    masks, blocks = {}, find_blocks(model)
    smaller = teacher is not None and _size(blocks) < _size(find_blocks(teacher))
    for block in blocks:
        for name, parameter in block.module.named_parameters(prefix=block.name):
            if parameter.dim() < 2:
                continue
            zeros = float((parameter == 0).float().mean())
            with_zeros = zeros >= LEAST_ZEROS
            if with_zeros and smaller:
                with_zeros = _follows_mask(parameter, zeros) if pruned is None else pruned
            if with_zeros or smaller:
                masks[name] = (parameter != 0).detach() if with_zeros else torch.ones_like(parameter, dtype=torch.bool)
    if not masks:
        raise RecoveryError(
            f"no weight of this {type(model).__name__} has {LEAST_ZEROS:.0%} zeros or more: prune the model first"
        )
    return masks


def _follows_mask(weight: torch.Tensor, zeros: float) -> bool:
    """True if a weight's zeros cannot come from rounding alone."""
    nm = find_pattern(weight, rounded=True).nm
    if zeros >= LEAST_UNSTRUCTURED or nm is None:
        return zeros >= LEAST_UNSTRUCTURED
    return nm[0] / nm[1] <= max(WIDEST_ROUNDED, (1 - zeros) * FULL_IF_NOT_ROUNDED)


def dense_names(masks: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Names of the weights without pruned entries: their zeros are trained too."""
    return frozenset(name for name, mask in masks.items() if bool(mask.all()))


def zeros_of_rounding(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> int:
    """Number of kept weights of n:m layers that are 0."""
    found = 0
    for name, mask in masks.items():
        nm = None if bool(mask.all()) else find_pattern(model.get_parameter(name).detach(), rounded=True).nm
        if nm is not None:
            found += mask.numel() // nm[1] * nm[0] - int(mask.sum())
    return found


def check_finite(model: nn.Module, names: Collection[str]) -> None:
    """Raise RecoveryError if a parameter to train holds NaN or infinity."""
    for name in names:
        if not bool(model.get_parameter(name).detach().isfinite().all()):
            raise RecoveryError(
                f"{name} holds NaN or infinity, and cannot be trained: load or prune the model again; nothing was "
                "changed"
            )


_NORMS = (nn.LayerNorm, nn.GroupNorm)
"""Norms of torch, whose weight and bias must have the dtype of their inputs or fp32."""


def own_dtype_names(model: nn.Module, names: Collection[str]) -> frozenset[str]:
    """Names of the parameters that keep their dtype in forwards of another: those of torch's norms."""
    norms = {
        f"{name}.{kind}" for name, m in model.named_modules() if isinstance(m, _NORMS) for kind in ("weight", "bias")
    }
    return frozenset(norms.intersection(names))


def check_norms(model: nn.Module, teacher: nn.Module, settings: RecoverySettings, *, shard: bool = False) -> None:
    """Raise RecoveryError if a norm of torch in a block cannot run in the dtype of forwards."""
    if settings.forward_dtype == torch.float32:
        return
    for block in [*find_blocks(model), *find_blocks(teacher)]:
        for name, norm in block.module.named_modules(prefix=block.name):
            weight = norm.weight if isinstance(norm, _NORMS) else None
            if weight is None:
                continue
            dtype = weight.dtype
            if dtype == torch.float16 and weight.device.type == "cpu":
                raise RecoveryError(
                    f"{name} is a {type(norm).__name__} in torch.float16, which forwards in bfloat16 cannot run on a "
                    "CPU: load both models in float32 and set forward_dtype=torch.float32 (--dtype float32), or load "
                    "both in bfloat16"
                )
            if shard and settings.norms and dtype == torch.float32:
                raise RecoveryError(
                    f"{name} is a {type(norm).__name__} in torch.float32, which spread weights cannot train in "
                    "forwards of bfloat16: set forward_dtype=torch.float32 (--dtype float32), or leave norms (--norms) "
                    "or shard (--shard) out"
                )


def _size(blocks: Sequence[Block]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.module.parameters())


def check_arguments(
    model: PreTrainedModel, teacher: PreTrainedModel, text: torch.Tensor | WrittenText, settings: RecoverySettings
) -> None:
    """Raise RecoveryError or ArgumentError if the models, the text and the settings do not fit each other."""
    if isinstance(text, WrittenText):
        kept = len(text.prompt) if text.keep_start else 0
        if not text.prompt or text.length <= kept:
            raise RecoveryError(
                f"written text needs a start token and at least one token after it, got a length of {text.length} "
                f"with start {text.prompt}"
            )
        least, most = min(text.prompt), max(text.prompt)
        length = text.length
    elif not isinstance(text, torch.Tensor):
        raise RecoveryError(
            f"text must be token ids, int64 [n_sequences, length], or a WrittenText; got a {type(text).__name__}: give "
            "its ids"
        )
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
    check_dtypes(model, teacher, settings)


def check_dtypes(model: nn.Module, teacher: nn.Module, settings: RecoverySettings) -> None:
    """Raise RecoveryError if forwards in float32 are asked for, and a weight has another dtype."""
    dtypes = {parameter.dtype for each in (model, teacher) for parameter in each.parameters()}
    if settings.forward_dtype == torch.float32 and dtypes != {torch.float32}:
        raise RecoveryError(
            f"forwards in float32 need both models in float32, not {', '.join(sorted(map(str, dtypes)))}: load them "
            "so, or leave forward_dtype at torch.bfloat16"
        )


def check_teacher(model: nn.Module, teacher: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """RecoveryError if the teacher is pruned: a model learns nothing from itself, and little from a pruned one.

    Zeros that rounding to few bits left do not count as pruned.
    """
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
    share = sum(map(_pruned_zeros, matrices)) / max(1, total)
    if share >= LEAST_ZEROS:
        raise RecoveryError(
            f"the teacher is pruned too ({share:.0%} of its blocks' weights are 0): give the dense model that the "
            "pruned one was made from"
        )


def _pruned_zeros(weight: torch.Tensor) -> int:
    """Number of zeros of a matrix, or of a stack of matrices; 0 if they can come from rounding to few bits."""
    count = weight.numel() - int(weight.count_nonzero())
    zeros = count / max(1, weight.numel())
    return 0 if zeros < LEAST_UNSTRUCTURED and _is_rounded(weight) and not _follows_mask(weight, zeros) else count


def _is_rounded(weight: torch.Tensor) -> bool:
    """True if the first inputs of each output, which share a scale, have no more values than 4 bits do."""
    return any(
        rows.shape[1] >= STEP and int(_distinct(rows[:, :STEP]).max()) <= 2 * LARGEST[4] + 1
        for rows in (weight.detach().flatten(0, -2), weight.detach().mT.flatten(0, -2))
    )


def _distinct(rows: torch.Tensor) -> torch.Tensor:
    """The number of different values in each row."""
    return 1 + rows.sort(1).values.diff(dim=1).ne(0).sum(1)


def check_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """RuntimeError if a pruned weight is no longer 0."""
    for name, mask in masks.items():
        if bool(model.get_parameter(name).masked_select(~mask).any()):
            raise RuntimeError(f"{name}: a pruned weight is no longer 0")
