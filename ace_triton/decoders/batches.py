"""A calibration set, checked against the model and cut into batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS_OF_A_FORWARD = 2048
"""Number of tokens in a batch, if no batch size is given."""

TRIAL_SEQUENCES, TRIAL_LENGTH = 2, 8
"""Number of sequences, and tokens per sequence, in a trial forward of the model."""


class CalibrationSet(Protocol):
    """Token ids, int64 [n_sequences, length], and a mask.

    The mask is bool of the same shape, True for real tokens, or None if all tokens are real.
    """

    @property
    def ids(self) -> torch.Tensor: ...

    @property
    def mask(self) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Batch:
    """Some sequences of the calibration set, on the device of the model's embedding.

    Attributes:
        inputs: the model's inputs by argument name, without the attention mask, each [n_sequences, length, ...].
        valid: bool [n_sequences, length], False for padding; None if there is no padding.
    """

    inputs: Mapping[str, torch.Tensor]
    valid: torch.Tensor | None

    @classmethod
    def of_ids(cls, ids: torch.Tensor, valid: torch.Tensor | None = None) -> Batch:
        """A batch of token ids, int64 [n_sequences, length]."""
        return cls({"input_ids": ids}, valid)

    @property
    def ids(self) -> torch.Tensor:
        """Token ids, int64 [n_sequences, length]; KeyError if the model reads other inputs instead."""
        return self.inputs["input_ids"]

    @property
    def shape(self) -> tuple[int, int]:
        """n_sequences and length."""
        n_sequences, length = next(iter(self.inputs.values())).shape[:2]
        return n_sequences, length

    def beginning(self, n_sequences: int, length: int) -> Batch:
        """The first tokens of the first sequences, padding included, as a batch without a mask."""
        return Batch({name: tensor[:n_sequences, :length] for name, tensor in self.inputs.items()}, None)


def batches_of(
    model: PreTrainedModel, calibration: torch.Tensor | CalibrationSet | None, batch_size: int | None
) -> list[Batch]:
    """Split a calibration set into batches on the device of the model's embedding.

    Args:
        model: the model that the batches will run through.
        calibration: as for :func:`~ace_triton.prune_blocks.prune_model`.
        batch_size: sequences per batch; None for as many as make about TOKENS_OF_A_FORWARD tokens.

    Raises:
        ArgumentError: if the ids, the mask or the batch size are invalid for this model.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ArgumentError(f"batch_size must be a positive int, got {batch_size!r}")
    ids, mask = _ids_and_mask(calibration)
    table = _embedding(model)
    vocabulary, device = table.shape[0], table.device
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ArgumentError(
            f"calibration ids run from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary runs from 0 to "
            f"{vocabulary - 1}: tokenize with the model's own tokenizer"
        )
    longest = longest_sequence(model)
    if longest is not None and longest < ids.shape[1]:
        raise ArgumentError(
            f"calibration sequences have {ids.shape[1]} tokens, but the model takes at most {longest}: use shorter ones"
        )
    batch_size = batch_size or max(1, TOKENS_OF_A_FORWARD // ids.shape[1])
    parts = zip(ids.split(batch_size), [None] * len(ids) if mask is None else mask.split(batch_size), strict=False)
    return [Batch.of_ids(i.to(device, torch.int64), None if m is None else m.to(device)) for i, m in parts]


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Maximum number of positions of a model; None if its configuration does not say."""
    return positions_of(model.config)


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
    return _embedding(model).shape[0]


def trial_ids(model: PreTrainedModel) -> torch.Tensor:
    """The first ids of the vocabulary, int64 [1, TRIAL_LENGTH], on the device of the model's embedding."""
    return torch.arange(TRIAL_LENGTH, device=_embedding(model).device)[None]


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    return next(model.get_input_embeddings().parameters())


def _ids_and_mask(calibration: torch.Tensor | CalibrationSet | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = calibration if isinstance(calibration, torch.Tensor) else getattr(calibration, "ids", None)
    mask = None if isinstance(calibration, torch.Tensor) else getattr(calibration, "mask", None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else repr(type(calibration).__name__)
        raise ArgumentError(
            f"calibration must be token ids, int64 [n_sequences, length], or an object with such ids; got {given}"
        )
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
