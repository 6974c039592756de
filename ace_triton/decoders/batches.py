"""Batches of a calibration set: the inputs and the padding masks of a forward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from .forward_errors import forward_errors_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS_OF_A_FORWARD = 2048
"""Number of tokens in a batch on a CPU, if no batch size is given."""

TOKENS_ON_A_GPU = 16384
"""The same on a GPU, where launches take more time than the kernels of a small batch."""

TRIAL_SEQUENCES, TRIAL_LENGTH = 2, 8
"""Number of sequences, and tokens per sequence, in a trial forward of the model."""

IMAGE_LIST_DIMENSIONS = 5
"""Dimensions of a list of images for each sequence: [n_sequences, n_images, channels, height, width]."""

TEXT_MASK = "attention_mask"
"""Name of the padding mask of token ids. Names of other padding masks end like this too."""


Inputs = Mapping[str, torch.Tensor]
"""What a model's forward takes, by argument name."""

MaskedInput = tuple[torch.Tensor, torch.Tensor | None]
"""A tensor [n_sequences, length, width] and its padding mask, bool [n_sequences, length]; None without padding."""


@dataclass(frozen=True)
class Batch:
    """Some sequences of the calibration set, on the model's device.

    Attributes:
        inputs: the model's inputs by argument name, each [n_sequences, ...].
        valid: bool [n_sequences, length], False for padding; it becomes the model's ``attention_mask``. None if there
            is no padding, or if ``inputs`` contains the masks.
        number: place in the calibration set, for errors; None if the caller gave token ids.
    """

    inputs: Inputs
    valid: torch.Tensor | None = None
    number: int | None = None

    @classmethod
    def of_ids(cls, ids: torch.Tensor, valid: torch.Tensor | None = None) -> Batch:
        """A batch of token ids, int64 [n_sequences, length]."""
        return cls({"input_ids": ids}, valid)

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, int64 [n_sequences, length]; KeyError if the model reads other inputs instead."""
        return self.inputs["input_ids"]

    @property
    def of_text(self) -> bool:
        """True if the batch has token ids alone, with or without a mask."""
        return self.inputs.keys() <= {"input_ids"}

    @property
    def shape(self) -> tuple[int, int]:
        """n_sequences and length of the first input."""
        n_sequences, length, *_ = (*next(iter(self.inputs.values())).shape, 1, 1)
        return n_sequences, length

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward."""
        mask = {} if self.valid is None else {TEXT_MASK: self.valid.long()}
        return {**self.inputs, **mask}

    @cached_property
    def masks(self) -> dict[str, torch.Tensor]:
        """The padding masks by argument name, bool [n_sequences, length], True for real tokens.

        Masks are inputs of two dimensions whose name ends in "attention_mask" and that contain only 0 and 1. A mask of
        whole images [n_sequences, n_images], beside images of five dimensions, is none: it hides no tokens.
        """
        images = {tensor.shape[:2] for tensor in self.inputs.values() if tensor.dim() >= IMAGE_LIST_DIMENSIONS}
        given = {
            name: mask
            for name, mask in self.inputs.items()
            if name.endswith(TEXT_MASK) and mask.dim() == 2 and mask.shape not in images
        }
        found = {name: mask.bool() for name, mask in given.items() if bool(((mask == 0) | (mask == 1)).all())}
        return found if self.valid is None else {TEXT_MASK: self.valid, **found}

    def beginning(self, n_sequences: int, length: int) -> Batch:
        """The first tokens of the first sequences as a batch in which padding counts as real tokens.

        Sequences keep their length unless all inputs are integers with one entry per token: features of images or
        audio may have as many entries as the text has tokens, by chance. The batch keeps all its sequences unless all
        inputs have one entry per sequence.
        """
        inputs = {name: torch.ones_like(t) if name in self.masks else t for name, t in self.inputs.items()}
        tensors = inputs.values()
        if len({tensor.shape[:1] for tensor in tensors}) == 1 and all(tensor.dim() for tensor in tensors):
            of_tokens = [t for name, t in inputs.items() if name not in self.masks and t.dim() == 2]
            per_token = bool(of_tokens) and not any(tensor.is_floating_point() for tensor in tensors)
            per_token &= len({tensor.shape[:2] for tensor in tensors}) == 1
            inputs = {name: t[:n_sequences, :length] if per_token else t[:n_sequences] for name, t in inputs.items()}
        return Batch(inputs, number=self.number)

    def with_input(self, name: str, tensor: torch.Tensor) -> Batch:
        """The batch with one input replaced."""
        return Batch({**self.inputs, name: tensor}, self.valid, self.number)


@dataclass(frozen=True)
class Masks:
    """The padding masks that apply to what the blocks of one tower read.

    Attributes:
        own: argument name of the mask of the tower's own tokens; None if there is no such mask (images).
        others: masks of the towers before it, whose outputs it may read (cross-attention), the latest first.
        is_first: True if no tower runs before it.
    """

    own: str | None = TEXT_MASK
    others: tuple[str, ...] = ()
    is_first: bool = True

    def of_hidden(self, batch: Batch, hidden: torch.Tensor | None) -> tuple[tuple[int, int], torch.Tensor | None]:
        """The shape (n_sequences, length) and the padding mask of hidden states; None if there is no padding.

        The shape is that of the batch if it has token ids alone, or if the hidden states have one row per token of the
        batch or are None. Hidden states [length, width] are one sequence; [streams, n_sequences, length, width] have
        the shape of the mask.
        """
        shape = batch.shape
        valid = batch.masks.get(self.own) if self.own is not None else None
        if not batch.of_text and hidden is not None and hidden.numel() != shape[0] * shape[1] * hidden.shape[-1]:
            shape = (hidden.shape[0], hidden.shape[1]) if hidden.dim() > 2 else (1, hidden.shape[0])
            if valid is not None and hidden.shape[-3:-1] == valid.shape:
                shape = (valid.shape[0], valid.shape[1])
        return shape, valid if valid is not None and valid.shape == shape else None

    def of_others(self, batch: Batch, arguments: Iterable[Any], shape: tuple[int, int]) -> list[MaskedInput]:
        """Those arguments of a block that are outputs of other towers, each with its padding mask.

        Args:
            batch: the batch that runs.
            arguments: the arguments of the block.
            shape: n_sequences and length of the tower's own hidden states.
        """
        found: list[MaskedInput] = []
        for tensor in () if self.is_first else arguments:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == 3:
                fitting = (batch.masks[name] for name in self.others if name in batch.masks)
                valid = next((mask for mask in fitting if mask.shape == tensor.shape[:2]), None)
                if valid is not None or tensor.shape[:2] != shape:
                    found.append((tensor, valid))
        return found

    def warn_if_unused(self, batches: Sequence[Batch], hidden: torch.Tensor | None, stacklevel: int) -> None:
        """Warn if the tower's own mask hides padding but does not have one entry per token of its hidden states.

        Args:
            batches: the calibration set.
            hidden: hidden states that the first block reads in the first batch; None if unknown.
            stacklevel: as for :func:`warnings.warn`.
        """
        found = [batch.masks[self.own] for batch in batches if self.own in batch.masks] if self.own is not None else []
        if any(not mask.all() for mask in found) and self.of_hidden(batches[0], hidden)[1] is None:
            warnings.warn(
                f"{self.own} has shape {tuple(found[0].shape)}, which is not one entry per token of the blocks that "
                "read it, so padding counts as tokens there; give sequences of one length to avoid that",
                stacklevel=stacklevel + 1,
            )


TEXT_ALONE = Masks()
"""The mask of a model with one tower that reads token ids."""


def trial_batch(model: nn.Module, batches: Sequence[Batch]) -> Batch:
    """The first inputs of a calibration set, or the first token ids of the vocabulary if it is empty."""
    if not batches:
        return Batch.of_ids(trial_ids(model))
    return batches[0].beginning(TRIAL_SEQUENCES, TRIAL_LENGTH)


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The output of the model's forward on a batch, without a key-value cache.

    Raises:
        ArgumentError: if the forward fails on a batch that the caller gave.
    """
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with forward_errors_named(model, batch.number, batch.arguments, longest_sequence(model)):
        return model(**batch.arguments, **uncached)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, entry.name) for entry in fields(value)])


def sequences_of_a_forward(length: int, *, on_gpu: bool) -> int:
    """Number of sequences of ``length`` tokens in a batch, if no batch size is given."""
    return max(1, (TOKENS_ON_A_GPU if on_gpu else TOKENS_OF_A_FORWARD) // length)


def longest_sequence(model: nn.Module) -> int | None:
    """Maximum number of positions of a model; None if its configuration does not say."""
    config = getattr(model, "config", None)
    return None if config is None else positions_of(config)


def positions_of(config: PretrainedConfig) -> int | None:
    """Maximum number of positions according to a model's configuration; None if it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def check_positions(longest: int | None, length: int, option: str = "--length") -> None:
    """Raise ArgumentError if sequences are longer than the model's number of positions (None: unknown, not checked)."""
    if longest is not None and length > longest:
        raise ArgumentError(f"{option} {length} is more than the model's {longest} positions: use a smaller number")


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of rows of a model's embedding."""
    return token_table(model).shape[0]


def trial_ids(model: nn.Module) -> torch.Tensor:
    """The first ids of the vocabulary, int64 [1, TRIAL_LENGTH], on the device of the model's embedding.

    Raises:
        ArgumentError: if the model has no embedding of tokens.
    """
    return torch.arange(TRIAL_LENGTH, device=token_table(model).device)[None]


def token_table(model: nn.Module) -> torch.Tensor:
    """The weight of the model's embedding of tokens [vocabulary, width].

    Raises:
        ArgumentError: if the model has no such embedding.
    """
    table = embedding_table(model)
    if table is None:
        raise ArgumentError(
            f"{type(model).__name__} has no embedding of token ids; give the inputs of its forward as batches, such as "
            "[{'pixel_values': images}], [(images,)] or a DataLoader"
        )
    return table


def embedding_table(model: nn.Module) -> torch.Tensor | None:
    """The weight of the model's embedding of tokens [vocabulary, width]; None if it has none."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, nn.Module):
        return None
    table = next(embedding.parameters(), getattr(embedding, "weight", None))  # A quantized table is no parameter.
    return table if table is not None and table.dim() == 2 else None
