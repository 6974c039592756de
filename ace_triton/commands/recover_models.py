"""Checks of the dense model that a recovery learns from, before anything is loaded and after."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..inputs import checkpoint
from ..packed.inspect import surely_not_pruned
from ..provenance import history_of, source_of
from ..recovery.checks import pruned_masks, zeros_of_rounding
from ..solvers.kept_adamw import LEAST_ZEROS
from ..solvers.quantize import GROUP, Quantization
from .options import parse_bits
from .pack import quantization_of
from .sources import check_source


def quantization_from(bits: int | None, group: int | None, pruning: dict[str, Any]) -> Quantization | None:
    """How forwards round the weights, from ``--bits`` and ``--group``; None without them.

    Without ``--group``, weights that ``pruning`` says are rounded to these bits keep their groups.

    Raises:
        ArgumentError: if a value is invalid, or a group is given without bits.
    """
    if bits is None:
        if group is not None:
            raise ArgumentError("--group is for rounded weights: add --bits 8 or --bits 4, or leave it out")
        return None
    before = quantization_of(pruning)
    if group is None:
        group = before[1] if before is not None and before[0] == bits else GROUP
    parse_bits(bits, group)
    return Quantization(bits, group, "absmax")


def rounded_to(quantize: Quantization | None) -> str:
    """The words of a step in the history about rounded weights, such as ", 4 bits by absmax"."""
    return "" if quantize is None else f", {quantize}"


def was_pruned(pruning: dict[str, Any]) -> bool | None:
    """Whether a report says that zeros of a smaller model were pruned, for :func:`~ace_triton.recover`.

    Only an earlier recovery leaves zeros of rounding, so before the first one all zeros stay. None without a report.
    """
    if not pruning:
        return None
    return not (_only_shrunk(pruning) and "recover" in _commands(pruning))


def _only_shrunk(pruning: dict[str, Any]) -> bool:
    commands = _commands(pruning)
    return "shrink" in commands and commands <= {"shrink", "recover"}


def _commands(report: dict[str, Any]) -> set[Any]:
    return {step.get("command") for step in history_of(report)}


def zeros_note(model: Any, teacher: Any, pruning: dict[str, Any]) -> str | None:
    """What ``recover`` says before training of kept weights that an earlier rounding set to 0; None without them."""
    if (before := quantization_of(pruning)) is None:
        return None
    found = zeros_of_rounding(model, pruned_masks(model, teacher, pruned=was_pruned(pruning)))
    if not found:
        return None
    return (
        f"{found:,} kept weights were rounded to 0 when DIR was rounded to {before[0]} bits. They count as pruned "
        "now and stay 0; recover the model from before that rounding to train them."
    )


def rounding_note(quantize: Quantization | None, pruning: dict[str, Any]) -> str | None:
    """What ``recover`` says of rounded weights; None if they were not rounded before and are not now."""
    option = "--dense-bits" if _only_shrunk(pruning) else "--bits"
    if quantize is not None:
        return (
            f"The weights are rounded to {quantize.bits} bits; ace-triton pack {option} {quantize.bits} --group "
            f"{quantize.group} keeps each value."
        )
    if (few := quantization_of(pruning)) is None:
        return None
    bits, group = few
    return (
        f"The weights are no longer rounded to {bits} bits; ace-triton pack {option} {bits} --group {group} rounds "
        f"them again, and ace-triton recover --bits {bits} trains them rounded."
    )


def teacher_of(model_dir: Path, named: str | None, pruning: dict[str, Any]) -> str:
    """The dense model's name.

    Raises:
        CheckpointError: before anything is loaded, if the dense model is unknown or not dense, or if ``model_dir`` has
            no record of its dense model and is not pruned.
    """
    source = source_of(pruning, model_dir) if named is None else named
    if not source:
        if not history_of(pruning) and surely_not_pruned(model_dir, LEAST_ZEROS):
            raise checkpoint.CheckpointError(
                f"{model_dir} is not pruned, no weight has {LEAST_ZEROS:.0%} zeros or more: prune it first; if another "
                "program removed channels or blocks of it, name its dense model with --teacher"
            )
        name = pruning.get("source")
        known = f"; only its name is known, {name}" if isinstance(name, str) and name else ""
        unknown = "" if history_of(pruning) else "; if DIR is not pruned yet, prune it first"
        raise checkpoint.CheckpointError(
            f"{model_dir} does not say where its dense model is{known}: name it with --teacher{unknown}"
        )
    check_source(source)
    folder = Path(source)
    if folder.is_dir() and folder.samefile(model_dir):
        why = "that is the pruned model itself" + ("; it replaced the dense one" if named is None else "")
    elif folder.is_dir() and not _is_dense(checkpoint.read_report(folder)):
        why = f"that is a pruned model (it has {checkpoint.REPORT_FILE})"
    else:
        return source
    raise checkpoint.CheckpointError(f"the teacher is {source}, but {why}: name the dense model with --teacher")


def _is_dense(report: dict[str, Any] | None) -> bool:
    """True if a folder's report tells of no step that prunes weights: shrink removes them as a whole."""
    return report is None or _only_shrunk(report)


def check_vocabulary(tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise ArgumentError if a token id means different tokens in the two tokenizers."""
    own = {index: token for token, index in tokenizer.get_vocab().items()}
    other = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    if differing := [index for index in own.keys() & other.keys() if own[index] != other[index]]:
        first = min(differing)
        raise ArgumentError(
            f"the teacher has another vocabulary: token {first} is {own[first]!r} in the pruned model and "
            f"{other[first]!r} in the teacher; name the dense model that it was pruned from with --teacher"
        )


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
