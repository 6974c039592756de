"""The forms of a calibration set, checked against the model and cut into batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..available_memory import available_memory
from ..byte_sizes import shown_bytes
from ..errors import AceError, ArgumentError
from .batches import Batch, Inputs, embedding_table, longest_sequence, sequences_of_a_forward, tensors_in, token_table

MOST_BATCHES = 10_000
"""Largest number of batches that are read from a source other than a list: a function, a generator, a DataLoader."""

LARGEST_PART_OF_MEMORY = 0.5
"""Largest part of the available memory that the batches of such a source may take."""


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
    if isinstance(calibration, nn.Module):
        raise ArgumentError(f"calibration must be {FORMS}; got a model, a {type(calibration).__name__}")
    with _errors_named(f"calibration, a {type(calibration).__name__}, cannot be called without arguments"):
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
    found: list[Inputs] = []
    for batch in _within_limits(made):
        found.append(_named_inputs(batch, f"calibration[{len(found)}]", names, type(model).__name__))
    return found


def _within_limits(source: Iterable[Any]) -> Iterator[Any]:
    """The batches of a source, which the caller keeps. A list or tuple has them in memory already and has no limit.

    Raises:
        ArgumentError: if a source cannot be read, gives more batches than its length says, or too many to keep.
    """
    if isinstance(source, (list, tuple)):
        yield from source
        return
    length = _length(source)
    most_bytes, taken, count = available_memory() * LARGEST_PART_OF_MEMORY, 0, 0
    too_many = "calibration has {}, which are all kept in memory: give a list of fewer, such as {}"
    fewer = "list(itertools.islice(batches, 16))"
    if length is not None and length > MOST_BATCHES:
        raise ArgumentError(too_many.format(f"{length:,} batches, more than {MOST_BATCHES:,}", fewer))
    with _errors_named(f"calibration, a {type(source).__name__}, cannot be iterated over"):
        batches = iter(source)
    while True:
        with _errors_named(f"calibration[{count}] cannot be read"):
            try:
                batch = next(batches)
            except StopIteration:
                return
        if count == length:
            raise ArgumentError(
                f"calibration gives more batches than its length, {length:,}: correct its __len__, or give a list of "
                "its batches"
            )
        yield batch  # The caller refuses a wrong batch before the next one is read.
        count, taken = count + 1, taken + sum(tensor.nbytes for tensor in tensors_in(batch))
        if taken > most_bytes or count > MOST_BATCHES:
            by_bytes = f"{count:,} or more batches of {shown_bytes(taken)} in all"
            raise ArgumentError(
                too_many.format(by_bytes if taken > most_bytes else f"more than {MOST_BATCHES:,} batches", fewer)
            )


def _length(source: Iterable[Any]) -> int | None:
    """The length of a source; None if it has none."""
    with _errors_named("calibration's length cannot be read; correct its __len__, or give a list of its batches"):
        try:
            return len(source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None


@contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """A context in which an error of the caller's own code becomes one of this package that begins with ``what``."""
    try:
        yield
    except (AceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ArgumentError(f"{what}: {type(error).__name__}: {error}") from error


def _named_inputs(batch: Any, place: str, names: Sequence[str], model: str) -> Inputs:
    """The tensors of a batch by argument name.

    Args:
        batch: a dict, or a tuple of the forward's first arguments.
        place: what errors call the batch.
        names: the forward's arguments.
        model: class of the model, for errors.
    """
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, torch.Tensor) for value in batch):
        if len(batch) > len(names):
            raise ArgumentError(
                f"{place} has {len(batch)} tensors, but {model} takes {len(names)} arguments ({', '.join(names)}): "
                "give those, or a dict"
            )
        batch = dict(zip(names, batch, strict=False))
    if isinstance(batch, torch.Tensor):
        raise ArgumentError(
            f"{place} is a tensor; each batch is a dict or a tuple: wrap it: (tensor,), or give token ids "
            "[n_sequences, length] without a list"
        )
    if not isinstance(batch, Mapping):
        given = f"a {type(batch).__name__}" + " of other things than tensors" * isinstance(batch, (tuple, list))
        raise ArgumentError(f"{place} is {given}; calibration must be {FORMS}")
    if not batch:
        raise ArgumentError(f"{place} is an empty dict: give the inputs of the model's forward")
    for name, value in batch.items():
        if not isinstance(name, str):
            raise ArgumentError(
                f"{place} has the key {name!r}: its keys must be names of the forward's arguments ({', '.join(names)})"
            )
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            given = "an empty tensor" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ArgumentError(
                f"{place}[{name!r}] is {given}; each input must be a tensor with data (a processor makes them with "
                "return_tensors='pt')"
            )
    return dict(batch)


def _batches_of_inputs(model: nn.Module, batches: Sequence[Inputs]) -> list[Batch]:
    """Batches of any inputs, on the device of the model, floating inputs in its dtype."""
    if not batches:
        raise ArgumentError("calibration has no batches: give at least one, a dict or a tuple of tensors")
    parameters = list(model.parameters())
    device = parameters[0].device
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    found = []
    for number, inputs in enumerate(batches):
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
