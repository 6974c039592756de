"""The registry of formats, and saving and loading through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..inputs.checkpoint import refusals
from ..inputs.model_task import TEXT_GENERATION
from ..inputs.output_folder import replacing, write_report
from ..inputs.report_file import MANIFEST_FILE, REPORT_FILE
from ..packed.inspect import TensorSparsity
from .dense import Dense
from .format import Format
from .packed import Packed

_REGISTRY: dict[str, Format] = {format.name: format for format in (Dense(), Packed())}


def register_format(format: Format) -> None:
    """Add a format. It is asked whether it recognizes a folder before those that were registered earlier.

    Raises:
        CheckpointError: if there is a format of this name.
    """
    if format.name in _REGISTRY:
        raise CheckpointError(f"there is a format {format.name!r} already: choose a name other than {_names()}")
    _REGISTRY[format.name] = format


def format_named(name: str) -> Format:
    """The format with this name; CheckpointError with all known names if there is none."""
    if name not in _REGISTRY:
        raise CheckpointError(f"unknown format {name!r}: use one of {_names()}")
    return _REGISTRY[name]


def format_of(source: str | Path) -> Format:
    """The format of a folder, a file or a hub name; the dense format if no other one recognizes it."""
    return next(format for format in reversed(_REGISTRY.values()) if format.recognizes(source))


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    task: str | None = TEXT_GENERATION,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer in any format.

    Args:
        source: a folder in any registered format, or a source that :func:`ace_triton.inputs.checkpoint.load` accepts.
        dtype: dtype of the weights; "auto" keeps that of the checkpoint.
        device: device of the weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        task: what to load a dense checkpoint for, as in :func:`ace_triton.inputs.checkpoint.load`. Folders in other
            formats load as the class that they were saved from.

    Returns:
        The model, in eval mode, and the tokenizer, or :class:`~ace_triton.inputs.companions.Companions`.

    Raises:
        CheckpointError: if the model cannot be loaded.
    """
    found = format_of(source)
    if isinstance(found, Dense):
        return found.load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, task=task)
    return found.load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def save_model(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    format: str = "dense",
    *,
    report: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in a format, atomically.

    Args:
        model: a causal language model of transformers with its weights in memory.
        tokenizer: its tokenizer, or None.
        out: folder to write. It is created together with its parents.
        format: name of a registered format.
        report: the pruning report, written as ``ace_triton.json``.
        overwrite: replace an existing ``out``, if :func:`~ace_triton.inputs.checkpoint.check_out` allows it.

    Raises:
        CheckpointError: if the format is unknown or cannot hold the model; or if ``out`` exists and may not be
            replaced, or cannot be written.
    """
    chosen = format_named(format)
    refusal = chosen.check(model)
    if refusal is not None:
        raise CheckpointError(refusal)
    with replacing(out, overwrite=overwrite) as folder, refusals(out):
        chosen.write(model, tokenizer, folder, report)
        if not any((folder / name).exists() for name in (REPORT_FILE, MANIFEST_FILE)):
            write_report(folder, report or {})


def inspect_checkpoint(folder: str | Path) -> list[TensorSparsity]:
    """Inspect all matrices, and stacks of matrices, of a folder in any format.

    Returns:
        One entry per matrix or stack, sorted by name.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    return format_of(folder).inspect(folder)


def _names() -> str:
    return ", ".join(_REGISTRY)
