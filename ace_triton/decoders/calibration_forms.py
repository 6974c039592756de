"""The forms of a calibration set, checked against the model and cut into batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from ..errors import ArgumentError
from .batches import Batch, Inputs, embedding_table, longest_sequence, sequences_of_a_forward, tensors_in, token_table

MOST_BATCHES = 10_000
"""Largest number of batches that are read from a source without a length: a generator, or a stream of data."""

LARGEST_PART_OF_MEMORY = 0.5
"""Largest part of the machine's memory that the batches of such a source may take."""


class CalibrationSet(Protocol):
    """Token ids, int64 [n_sequences, length], and a mask.

    The mask is bool of the same shape, True for real tokens, or None if all tokens are real.
    """

    @property
    def ids(self) -> torch.Tensor: ...

    @property
    def mask(self) -> torch.Tensor | None: ...


AnyBatches = Iterable[Inputs | Sequence[torch.Tensor]]
"""Batches of a forward's inputs: dicts, or tuples of its first arguments; also a DataLoader of them."""

Calibration = torch.Tensor | CalibrationSet | AnyBatches | Callable[[], AnyBatches]
"""Token ids, token ids with a mask, or batches of any inputs of the model's forward, or a function that makes them."""

FORMS = (
    "token ids, int64 [n_sequences, length]; an object with such ids; or batches in a list, a DataLoader, or a "
    "function that returns them, each a dict of tensors or a tuple of the forward's first arguments"
)
"""The forms of a calibration set, for errors."""


def batches_of(
    model: nn.Module, calibration: Calibration | None, batch_size: int | None, tokens: int | None = None
) -> list[Batch]:
    """Split a calibration set into batches on the model's device.

    Args:
        model: the model that the batches will run through.
        calibration: as for :func:`~ace_triton.prune_blocks.prune_model`.
        batch_size: sequences per batch; None for as many as make about ``tokens`` tokens.
        tokens: tokens of a batch if ``batch_size`` is None; None for :func:`sequences_of_a_forward`.

    Raises:
        ArgumentError: if the inputs, the mask or the batch size are invalid for this model.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ArgumentError(f"batch_size must be a positive int, got {batch_size!r}")
    if not isinstance(calibration, torch.Tensor) and not hasattr(calibration, "ids"):
        calibration = _listed(model, calibration)
    if isinstance(calibration, (list, tuple)) and all(isinstance(inputs, Mapping) for inputs in calibration):
        if batch_size is not None:
            raise ArgumentError(
                "batch_size is only for token ids; batches run one after the other, so give smaller ones"
            )
        return _batches_of_inputs(model, calibration)
    ids, mask = _ids_and_mask(calibration)
    table = token_table(model)
    vocabulary, device = table.shape[0], table.device
    _check_ids("calibration ids", ids, vocabulary)
    longest = longest_sequence(model)
    if longest is not None and longest < ids.shape[1]:
        raise ArgumentError(
            f"calibration sequences have {ids.shape[1]} tokens, but the model takes at most {longest}: use shorter ones"
        )
    if batch_size is None and tokens is not None:
        batch_size = max(1, tokens // ids.shape[1])
    batch_size = batch_size or sequences_of_a_forward(ids.shape[1], on_gpu=device.type == "cuda")
    parts = zip(ids.split(batch_size), [None] * len(ids) if mask is None else mask.split(batch_size), strict=False)
    return [Batch.of_ids(i.to(device, torch.int64), None if m is None else m.to(device)) for i, m in parts]


def _listed(model: nn.Module, calibration: Any) -> Any:
    """Batches as a list of dicts, if they are an iterable of dicts and tuples, or a function that makes one."""
    made = calibration() if callable(calibration) else calibration
    if isinstance(made, Mapping):
        raise ArgumentError(
            f"calibration is one batch, a {type(made).__name__} with {', '.join(map(str, made)) or 'nothing'}: put it "
            "in a list, [batch]"
        )
    if isinstance(made, (torch.Tensor, str, bytes)) or hasattr(made, "ids") or not isinstance(made, Iterable):
        return made
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = _all_batches(made)
    for index, batch in enumerate(found):
        if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, torch.Tensor) for value in batch):
            if len(batch) > len(names):
                raise ArgumentError(
                    f"calibration[{index}] has {len(batch)} tensors, but {type(model).__name__} takes {len(names)} "
                    f"arguments ({', '.join(names)}): give those, or a dict"
                )
            found[index] = dict(zip(names, batch, strict=False))
        elif isinstance(batch, torch.Tensor):
            raise ArgumentError(
                f"calibration[{index}] is a tensor; each batch is a dict or a tuple: wrap it: (tensor,), or give token "
                "ids [n_sequences, length] without a list"
            )
        elif not isinstance(batch, Mapping):
            given = f"a {type(batch).__name__}" + " of other things than tensors" * isinstance(batch, (tuple, list))
            raise ArgumentError(f"calibration[{index}] is {given}; calibration must be {FORMS}")
    return found


def _all_batches(source: Iterable[Any]) -> list[Any]:
    """The batches of a source as a list.

    Raises:
        ArgumentError: if a source does not end where its length says, or has no length and gives too much.
    """
    try:
        length = len(source)  # type: ignore[arg-type]
    except TypeError:
        length = None
    most, taken = psutil.virtual_memory().total * LARGEST_PART_OF_MEMORY, 0
    found: list[Any] = []
    for batch in source:
        if length is None:
            taken += sum(tensor.nbytes for tensor in tensors_in(batch))
        if len(found) == (MOST_BATCHES if length is None else length) or taken > most:
            raise ArgumentError(
                f"calibration has more than {len(found):,} batches, which are all kept in memory, and "
                f"{'does not say how many' if length is None else f'its length is {length:,}'}: give a list of fewer, "
                "such as list(itertools.islice(batches, 16))"
            )
        found.append(batch)
    return found


def _batches_of_inputs(model: nn.Module, batches: Sequence[Inputs]) -> list[Batch]:
    """Batches of any inputs, on the device of the model, floating inputs in its dtype."""
    if not batches:
        raise ArgumentError("calibration has no batches: give at least one, a dict or a tuple of tensors")
    parameters = list(model.parameters())
    device = parameters[0].device
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    found = []
    for number, inputs in enumerate(batches):
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                given = "an empty tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
                raise ArgumentError(
                    f"calibration[{number}][{name!r}] is {given}; each input must be a tensor with data (a processor "
                    "makes them with return_tensors='pt')"
                )
        if not inputs:
            raise ArgumentError(f"calibration[{number}] is an empty dict: give the inputs of the model's forward")
        moved = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        # Torch computes no gradients with tensors made in inference mode.
        batch = Batch({k: v.clone() if v.is_inference() else v for k, v in moved.items()}, number=number)
        for name, mask in batch.masks.items():
            if not mask.any(1).all():
                row = int((~mask.any(1)).nonzero()[0])
                raise ArgumentError(f"calibration[{number}][{name!r}]: sequence {row} is all padding: remove it")
        if "input_ids" in batch.inputs and batch.ids.is_floating_point():
            raise ArgumentError(f"calibration[{number}]['input_ids'] is {batch.ids.dtype}: token ids must be integers")
        if "input_ids" in batch.inputs and (table := embedding_table(model)) is not None:
            _check_ids(f"calibration[{number}]['input_ids']", batch.ids, table.shape[0])
        found.append(batch)
    return found


def _check_ids(what: str, ids: torch.Tensor, vocabulary: int) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ArgumentError(
            f"{what} run from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary runs from 0 to "
            f"{vocabulary - 1}: tokenize with the model's own tokenizer"
        )


def _ids_and_mask(calibration: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = calibration if isinstance(calibration, torch.Tensor) else getattr(calibration, "ids", None)
    mask = None if isinstance(calibration, torch.Tensor) else getattr(calibration, "mask", None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else repr(type(calibration).__name__)
        raise ArgumentError(f"calibration must be {FORMS}; got {given}")
    if ids.numel() == 0:
        raise ArgumentError(
            f"calibration of shape {tuple(ids.shape)} is empty: give at least one sequence with one token"
        )
    if mask is None:
        return ids, None
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ArgumentError(f"calibration.mask must be bool of shape {tuple(ids.shape)}, True for real tokens")
    if not mask.any(1).all():
        raise ArgumentError(f"calibration sequence {int((~mask.any(1)).nonzero()[0])} is all padding: remove it")
    return ids, None if mask.all() else mask
