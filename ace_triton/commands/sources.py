"""Checks of a model that need no weights, made before anything is loaded."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..decoders.batches import check_positions, positions_of
from ..errors import ArgumentError, CheckpointError
from ..formats.registry import format_of
from ..inputs.checkpoint import read_report
from ..inputs.model_source import SMOLLM2, ModelSource, smollm2_file, weight_file_bytes
from ..inputs.model_task import CAUSAL, ModelTask, find_task, other_kind, task_of
from ..packed.fused import GROUPS, fuse_products, none_to_fuse
from ..structures.uneven import check_equal_widths
from .console import print_line, print_note

TAKEN = "prune, pack and 'evaluate --dense' take it"
"""What to do with a model that a command for causal language models refuses."""


def check_source(source: str | Path, *, any_format: bool = False, hub: bool = True) -> None:
    """Raise CheckpointError if ``source`` names no model.

    Args:
        source: a source of :func:`ace_triton.inputs.checkpoint.load`.
        any_format: accept a folder in another format too.
        hub: accept a hub name.
    """
    name = format_of(source).name
    if name != "dense" and any_format:
        return
    ModelSource.find(str(source) if hub else Path(source))
    if name != "dense":
        raise CheckpointError(
            f"{source}: is in the format {name!r}, and this command reads dense checkpoints: name the one that it was "
            "made from"
        )


def found_task(model: str | Path, task: str | None = None, *, trust_remote_code: bool = False) -> ModelTask:
    """What a model in any format is loaded for; a causal language model if its files do not say, so that loading says
    what is wrong with them.

    Raises:
        CheckpointError: if a task is named, and no AutoModel class loads the model so.
    """
    if format_of(model).name == "dense":
        try:
            return task_of(model, task, trust_remote_code=trust_remote_code)
        except CheckpointError:
            if task is not None:
                raise
            return CAUSAL
    config = _config(model, trust_remote_code)
    return CAUSAL if config is None else find_task(str(model), config, task, trusted=trust_remote_code)


def _config(model: str | Path, trust_remote_code: bool) -> Any:
    """The configuration of a model; None if it cannot be loaded."""
    from transformers import AutoConfig

    if str(model) == SMOLLM2 or Path(model).suffix == ".gguf":
        return None
    try:
        return AutoConfig.from_pretrained(
            str(model), trust_remote_code=trust_remote_code, local_files_only=Path(model).exists()
        )
    except (OSError, ValueError):
        return None


def kind_beside_causal(source: str | Path, *, trust_remote_code: bool = False) -> str | None:
    """What a model is, as "a BertModel (feature-extraction)", if it surely is no causal language model; else None."""
    config = _config(source, trust_remote_code)
    own_code = trust_remote_code and "auto_map" in (config.to_dict() if config is not None else {})
    return None if config is None else other_kind(config, trusted=own_code)


def check_causal(source: str | Path, command: str, advice: str, *, trust_remote_code: bool = False) -> None:
    """Raise ArgumentError if a model surely is no causal language model, in the words of the command that needs one.

    Args:
        source: a model in any format.
        command: name of the command, with the option that needs such a model.
        advice: what to do instead.
        trust_remote_code: run Python code that comes with the checkpoint.
    """
    other = kind_beside_causal(source, trust_remote_code=trust_remote_code)
    if other is not None:
        raise ArgumentError(f"{source}: is {other}, and {command} takes causal language models only: {advice}")


def check_can_shrink(source: str | Path, *, trust_remote_code: bool = False) -> None:
    """Raise ArgumentError if a model is pruned, or its feed-forward widths differ from block to block."""
    if (pattern := (read_report(source) or {}).get("sparsity")) is not None:
        raise ArgumentError(
            f"{source} is pruned to {pattern}, which does not outlive the removal of channels: shrink the dense model, "
            "then prune the result"
        )
    if (config := _config(source, trust_remote_code)) is not None:
        check_equal_widths(config, str(source))


def print_if_unrecorded(facts: Mapping[str, Any], out: Path) -> None:
    """Print that a written model's report does not say where the dense model is, if so."""
    if facts.get("source_path", "") is None:
        print_line(f"{out} does not record where its dense model is: name it in recover --teacher and evaluate --dense")


def check_length(source: str | Path, length: int, option: str) -> None:
    """Raise ArgumentError if sequences are longer than the model's context, if its files give that."""
    check_positions(context_length(source), length, option)


def fuse(model: Any, source: str | Path) -> None:
    """Fuse the products of a packed model and print how many; ArgumentError if it has none to fuse."""
    groups, names = fuse_products(model), [", ".join(group) for group in GROUPS]
    if not groups:
        raise ArgumentError(
            f"{source}: {none_to_fuse('--fuse')}: leave it out, or pack the model first (ace-triton pack)"
        )
    print_note(f"fused {groups} group{'s' * (groups > 1)} of products ({' and '.join(names)})")


def loaded_bytes(source: str | Path, dtype: torch.dtype | str = "auto") -> float:
    """Bytes of a model's weights once they are loaded.

    Args:
        source: the model.
        dtype: dtype that the weights are loaded in; "auto" for that of the files.
    """
    stored = _stored_dtype(source)
    wider = 1.0 if stored is None or isinstance(dtype, str) else dtype.itemsize / stored.itemsize
    return wider * weight_file_bytes(source)


def _stored_dtype(source: str | Path) -> torch.dtype | None:
    """The dtype of a model's files from its config; None if that is unknown or not on this machine."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except Exception:  # Loading the model reads the same files and reports what is wrong with them.
        return None
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def context_length(source: str | Path) -> int | None:
    """The model's number of positions from its config; None if that is unknown or not on this machine."""
    path = smollm2_file() if str(source) == SMOLLM2 else Path(source)
    try:
        found = _gguf_context_length(path) if path.suffix == ".gguf" else _config_context_length(str(source))
    except Exception:  # Loading the model reads the same files and reports what is wrong with them.
        return None
    return found if isinstance(found, int) and found > 0 else None


def _config_context_length(source: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return positions_of(config)


_GGUF_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _gguf_context_length(path: Path) -> Any:
    """The context length in a GGUF file. Reads its entries in order; every writer puts the vocabulary later."""
    with path.open("rb") as file:
        magic, _, _, entries = struct.unpack("<4sIQQ", file.read(24))
        for _ in range(entries if magic == b"GGUF" else 0):
            key, kind = _gguf_string(file), _gguf_number(file, "<I")
            value = _gguf_value(file, kind)
            if key.endswith(b".context_length"):
                return value
    return None


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _gguf_string(file)
    if kind == _GGUF_ARRAY:
        item, count = _gguf_number(file, "<I"), _gguf_number(file, "<Q")
        return [_gguf_value(file, item) for _ in range(count)]
    return _gguf_number(file, _GGUF_NUMBERS[kind])


def _gguf_string(file: BinaryIO) -> bytes:
    return file.read(_gguf_number(file, "<Q"))


def _gguf_number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
