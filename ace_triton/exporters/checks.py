"""Checks of exported files: every weight, every n:m group, and the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..decoders.batches import longest_sequence
from ..errors import CheckpointError
from ..inputs.beginnings import token_ids
from ..inputs.report_file import listing
from ..inputs.text import read_documents
from ..linears import linear_weight
from ..packed.pattern import find_pattern

PROMPT_LENGTHS = (6, 40)
"""Tokens of the shortest and of the longest prompt."""


@dataclass(frozen=True)
class ExportedMatrix:
    """The weight of one linear layer as it was read back.

    Attributes:
        name: name of the layer.
        pattern: n:m along the inputs of the product, "dense" or "unstructured".
        zeros: share of exact zeros.
    """

    name: str
    pattern: str
    zeros: float


@dataclass(frozen=True)
class Layer:
    """What the file must hold for one linear layer.

    Attributes:
        weight: [out_features, in_features], rounded to the type of the file unless the file quantizes; float32.
        exact: True if the file must hold these numbers; False if only its zeros are compared.
        nm: the pattern n:m of its groups along the inputs; None if it has none.
        label: the pattern as text.
    """

    weight: np.ndarray
    exact: bool
    nm: tuple[int, int] | None
    label: str


def layers_of(model: Any, dtype: torch.dtype | None) -> dict[str, Layer]:
    """All linear layers of a dense model by name, with their weights rounded to ``dtype``; None if it is quantized."""
    layers = {}
    for name, module in model.named_modules():
        weight = linear_weight(module)
        if weight is not None:
            found = find_pattern(weight)
            nm = found.nm if found.across is None else None
            rounded = (weight if dtype is None else weight.to(dtype)).float()
            layers[name] = Layer(rounded.contiguous().numpy().copy(), dtype is not None, nm, str(found))
    return layers


def check_matrices(
    layers: dict[str, Layer], found: Iterable[tuple[str, np.ndarray]], engine: str
) -> list[ExportedMatrix]:
    """Compare the weights that were read back with those of the model.

    Raises:
        CheckpointError: if the weight of a layer is missing or differs, a zero was lost, or a group has too many
            non-zero weights.
    """
    matrices: dict[str, ExportedMatrix] = {}
    for name, weight in found:
        layer = layers.get(name)
        if layer is None:
            continue
        if weight.shape != layer.weight.shape:
            raise _differs(engine, name, f"is {weight.shape}, not {layer.weight.shape}")
        if layer.exact and not np.array_equal(weight, layer.weight):
            raise _differs(engine, name, "has other numbers")
        if not layer.exact and np.any(weight[layer.weight == 0]):
            raise _differs(engine, name, "lost zeros")
        if layer.nm is not None:
            most = _fullest_group(weight, layer.nm[1])
            if most > layer.nm[0]:
                raise _differs(engine, name, f"has {most} non-zero weights in a group, its pattern is {layer.label}")
        matrices[name] = ExportedMatrix(name, layer.label, float(np.mean(weight == 0)))
    if missing := sorted(layers.keys() - matrices.keys()):
        raise CheckpointError(
            f"the {engine} file lacks the weights of {listing(missing)}: this exporter does not support the model"
        )
    return [matrices[name] for name in layers]


def prompts_for(model: Any, tokenizer: Any, count: int) -> list[torch.Tensor]:
    """Sequences of token ids, int64, of different lengths from Python's manual."""
    ids = token_ids(tokenizer, "\n\n".join(read_documents("pydoc:evaluation", most=2 * count)))
    shortest, longest = PROMPT_LENGTHS
    longest = min(longest, longest_sequence(model) or longest, max(shortest, len(ids) // count))
    prompts = []
    for index in range(count):
        length = shortest + (longest - shortest) * index // max(1, count - 1)
        start = index * longest % max(1, len(ids) - length)
        prompts.append(torch.tensor(ids[start : start + length], dtype=torch.int64, device="cpu"))
    return prompts


def largest_difference(
    expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor], engine: str, allowed: float | None
) -> float:
    """The largest absolute difference of a logit.

    Raises:
        CheckpointError: if the difference is not finite, or more than ``allowed``.
    """
    largest = max(float((one - other.float()).abs().max()) for one, other in zip(expected, given, strict=True))
    if not np.isfinite(largest):
        raise CheckpointError(f"the {engine} file computes NaN or infinite logits: export it with weights of float32")
    if allowed is not None and largest > allowed:
        raise CheckpointError(
            f"logits of the {engine} file differ from the model by {largest:.2g}, more than {allowed:g}: this exporter "
            "does not support the model"
        )
    return largest


def _fullest_group(weight: np.ndarray, m: int) -> int:
    """The largest number of non-zero weights in a group of m consecutive inputs of [out_features, in_features]."""
    groups = (weight != 0).reshape(weight.shape[0], -1, m)
    return int(groups.sum(axis=-1).max())


def _differs(engine: str, name: str, how: str) -> CheckpointError:
    return CheckpointError(f"the {engine} file differs from the model: the weight of {name} {how}; nothing was written")
