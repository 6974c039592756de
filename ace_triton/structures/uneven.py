"""Feed-forward widths that differ from block to block: how they are chosen, and models whose layers have them.

Every channel's importance is standardized within its block, to mean 0 and standard deviation 1. Runs of channels, as
many as a width is a multiple of, then go in one order over all blocks, the run with the least sum first. All blocks
together lose as many parameters as with equal widths.

The configuration of such a model has the shapes of its layers in the field :data:`SHAPES`. Transformers keeps it, but
does not read it: :func:`ace_triton.load_model` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..decoders.blocks import find_towers, linears_of
from ..decoders.layer_roles import in_attention
from ..errors import ArgumentError
from .coupled_layers import Coupled

SHAPES = "ace_triton_shapes"
"""Field of the text configuration: shapes of the weights that differ from what the other fields say, by name."""


def check_equal_widths(config: Any, name: str) -> None:
    """ArgumentError if a model's layers have other shapes than its configuration's widths say.

    Args:
        config: the model's configuration.
        name: the model in the message.
    """
    if shapes_in(config):
        raise ArgumentError(
            f"{name}: its feed-forward widths differ from block to block (field {SHAPES} of its configuration), so it "
            "cannot be shrunk again: shrink the dense model that it was made from, with a larger ratio"
        )


def uneven_widths(importance: Sequence[torch.Tensor], removed: int, multiple: int) -> list[int]:
    """The number of channels to remove from each block.

    Args:
        importance: one vector for each block, the importance of its channels, all of the same length [n_channels].
        removed: the mean number to remove; what it leaves is a multiple of ``multiple``.
        multiple: the width that is left in each block is a multiple of this; at least one multiple stays.
    """
    count = len(importance[0])
    first = count % multiple  # Goes from each block, so that multiples are left.
    runs = []
    for block, values in enumerate(importance):
        ascending = values.double().sort().values
        deviation = ascending.std(correction=0)
        standard = (ascending - ascending.mean()) / deviation.clamp_min(torch.finfo(torch.float64).tiny)
        sums = standard[first:].unflatten(0, (-1, multiple)).sum(1)[:-1]
        runs += [(float(value), block) for value in sums]
    found = [first] * len(importance)
    for _, block in sorted(runs)[: (removed - first) // multiple * len(importance)]:
        found[block] += multiple
    return found


def shapes_field(
    entries: Sequence[Coupled], layers: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> dict[str, list[int]]:
    """The field of the configuration for narrower layers.

    Args:
        entries: the structures.
        layers: linear layers by name.
        tensors: those of the smaller model, by name.
    """
    parts = [part for entry in entries for part in entry.parts(layers) if part.key == "weight"]
    return {
        part.name: list(tensors[part.name].shape) for part in parts if tensors[part.name].shape != part.tensor.shape
    }


def shapes_in(config: Any) -> dict[str, list[int]]:
    """The field of a configuration, by name of the weight; empty if all feed-forwards have the same width.

    Raises:
        ArgumentError: if it is not an object of pairs of positive integers.
    """
    field = getattr(config.get_text_config(), SHAPES, None) or {}
    if not isinstance(field, dict):
        raise ArgumentError(f"{SHAPES} must be an object with a shape for each name, got a {type(field).__name__}")
    for name, shape in field.items():
        if not isinstance(shape, (list, tuple)) or [type(size) for size in shape] != [int, int] or min(shape) < 1:
            raise ArgumentError(f"{SHAPES}: {name}: a shape is two positive integers, got {shape!r}")
    return {name: list(shape) for name, shape in field.items()}


def sized(kind: Any) -> Any:
    """A subclass of a model's class whose models have layers of the shapes in their configuration."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        resize(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def resize(model: Any) -> None:
    """Give linear layers weights, and biases, of the shapes in the model's configuration, without values.

    Raises:
        ArgumentError: if these are not shapes of feed-forwards of smaller widths.
    """
    shapes = shapes_in(model.config)
    _check(model, shapes)
    for name, shape in shapes.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        weight, is_linear = layer.get_parameter("weight"), isinstance(layer, nn.Linear)
        layer._parameters["weight"] = nn.Parameter(weight.new_empty(tuple(shape)), weight.requires_grad)
        outputs, inputs = shape if is_linear else reversed(shape)
        for attribute, size in zip(
            ("out_features", "in_features") if is_linear else ("nf", "nx"), (outputs, inputs), strict=True
        ):
            setattr(layer, attribute, size)
        if (bias := layer._parameters.get("bias")) is not None:
            layer._parameters["bias"] = nn.Parameter(bias.new_empty(outputs), bias.requires_grad)


def _check(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ArgumentError unless the shapes are of feed-forwards that have one smaller width for all their layers."""
    layers = {
        f"{name}.weight": layer
        for tower in (find_towers(model) if shapes else ())
        for block in tower.blocks
        for name, layer in linears_of(block.module, block.name)
        if not in_attention(block, name)
    }
    shares: dict[str, set[Fraction]] = {}
    reads: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in layers:
            raise ArgumentError(
                f"{SHAPES}: {name!r} is no weight of a linear layer in a feed-forward of {type(model).__name__}"
            )
        own = tuple(layers[name].get_parameter("weight").shape)
        changed = [dim for dim in (0, 1) if shape[dim] != own[dim]]
        if len(changed) > 1 or any(shape[dim] > own[dim] for dim in changed):
            raise ArgumentError(
                f"{SHAPES}: {name} cannot be {list(shape)}: with equal widths it is {list(own)}, and only the width of "
                "its feed-forward may be smaller"
            )
        home = name.removesuffix(".weight").rpartition(".")[0]
        for dim in changed:
            shares.setdefault(home, set()).add(Fraction(shape[dim], own[dim]))
            reads[home] = reads.get(home, 0) + (dim == int(isinstance(layers[name], nn.Linear)))
    for home, found in shares.items():
        if len(found) > 1 or reads[home] != 1:
            raise ArgumentError(f"{SHAPES}: the layers of {home} do not have one width")
