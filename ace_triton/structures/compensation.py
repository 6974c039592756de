"""Kept weights make up for removed structures: least squares on the layers that read them, or a bias.

W is the weight of a layer, G the Gram matrix of its inputs, K its kept inputs and R the removed ones. The weights that
best reproduce the outputs of the whole layer are

    W'_K = W_K + W_R G_RK (G_KK + D)^-1,

with the damping D of :class:`~ace_triton.solvers.update.Update`, which keeps W'_K near W_K if there are few tokens, and
is raised if the matrix has no Cholesky factor. If the layer has a bias, G is centered and the bias takes the mean of
what is lost.

Blocks are solved one after the other, each on the outputs of the solved blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Tower
from ..decoders.calibration_mode import calibration_mode
from ..decoders.collect import InputCollector
from ..decoders.replay import make_runner
from ..errors import ArgumentError
from ..linears import linear_weight
from ..methods.registry import Needs
from ..solvers.raised_damping import add_to_diagonal, with_damping
from ..statistics.activation import ActivationStats
from ..timing import Stopwatch
from .coupled import Coupled, Structures
from .settings import ShrinkSettings
from .smaller import column_mask


@dataclass(frozen=True)
class Repair:
    """New values of a layer that reads removed structures.

    Attributes:
        weight: fp32 [out_features, kept inputs].
        bias: change of its bias, fp32 [out_features]; None if it has no bias.
        lost, left: squared error of its outputs before and after, as shares of their energy.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    lost: float
    left: float


def fitted(
    weight: torch.Tensor, mask: torch.Tensor, stats: ActivationStats, settings: ShrinkSettings, *, has_bias: bool
) -> Repair:
    """The least-squares weights for some kept inputs.

    Args:
        weight: the dense weight, fp32 [out_features, in_features].
        mask: True for kept inputs, bool [in_features].
        stats: statistics of the inputs, with a Gram matrix.
        settings: with damping and prior.
        has_bias: True if the layer has, or gets, a bias.
    """
    assert stats.gram is not None
    assert stats.gram.matrix is not None
    assert stats.mean is not None
    gram, mean, count = stats.gram.matrix, stats.mean.float(), max(stats.count, 1)
    energy = (weight @ gram * weight).sum()
    if has_bias:
        gram = torch.addr(gram, mean, mean, alpha=-count)
    diagonal = gram.diagonal()
    damping = settings.damping * diagonal.mean() + settings.prior / count * diagonal
    kept, removed = gram[mask][:, mask], weight[:, ~mask]
    loss = removed @ gram[~mask][:, mask]
    before = (removed @ gram[~mask][:, ~mask] * removed).sum()
    change = torch.zeros_like(loss)
    if bool((kept.diagonal() + damping[mask]).min() > 0):
        factor = with_damping(add_to_diagonal(kept, damping[mask]), torch.linalg.cholesky)
        change = torch.cholesky_solve(loss.t(), factor).t()
    after = before - 2 * (change * loss).sum() + (change @ kept * change).sum()
    bias = removed @ mean[~mask] - change @ mean[mask] if has_bias else None
    return Repair(weight[:, mask] + change, bias, _share(before, energy), _share(after, energy))


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return max(0.0, float(part / whole)) if float(whole) > 0 else 0.0


def mean_in_bias(weight: torch.Tensor, mask: torch.Tensor, stats: ActivationStats) -> Repair:
    """FLAP's repair: the mean of the removed inputs goes through their weights into the bias."""
    assert stats.mean is not None
    removed, mean = weight[:, ~mask], stats.mean.float()[~mask]
    square = stats.norm.square() / max(stats.count, 1)
    energy = (weight.square() * square).sum()
    lost = (removed.square() * square[~mask]).sum()
    left = (removed.square() * (square[~mask] - mean.square())).sum()
    return Repair(weight[:, mask], removed @ mean, _share(lost, energy), _share(left, energy))


def repairs(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    structures: Structures,
    kept: Mapping[str, torch.Tensor],
    settings: ShrinkSettings,
    with_bias: frozenset[str],
    progress: Callable[[int, int, str], None] | None = None,
    most: int | None = None,
) -> dict[str, Repair]:
    """The least-squares repairs of all layers that read removed structures, by name.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        batches: the calibration set.
        structures: the structures, by name of the consumer.
        kept: those that are kept, by the same names.
        settings: with damping and prior.
        with_bias: names of the consumers that have, or get, a bias.
        progress: called with the number of finished blocks, of all blocks, and the block's name.
        most: number of blocks to solve, the first ones; None for all.

    Raises:
        ArgumentError: if no token reaches a layer.
    """
    clock = Stopwatch(next(model.parameters()).device)
    entries = structures.columns
    found: dict[str, Repair] = {}
    with calibration_mode(model), _restored(structures.layers[name] for name in kept):
        runner = make_runner(model, tower.blocks, batches, clock, tower.masks)
        for index, block in enumerate(tower.blocks[:most]):
            for name in [name for name in entries if name in kept and name.startswith(f"{block.name}.")]:
                layer = structures.layers[name]
                collector = InputCollector({name: layer}, Needs(gram=True), clock)
                runner.run(index, collector, advance=False)
                stats = collector.statistics(name)
                if stats is None:
                    raise ArgumentError(f"no token of the calibration text reached {name}: give more text")
                mask = column_mask(entries[name], layer, kept[name])
                weight = linear_weight(layer)
                assert weight is not None
                found[name] = fitted(weight.float(), mask, stats, settings, has_bias=name in with_bias)
                _install(layer, entries[name], mask, found[name])
            runner.run(index, None, advance=True)
            if progress is not None:
                progress(index + 1, len(tower.blocks), block.name)
    return found


def _install(layer: nn.Module, entry: Coupled, mask: torch.Tensor, repair: Repair) -> None:
    """Let a layer of the dense model compute what the repaired layer will: its other columns become 0."""
    parameter = layer.get_parameter("weight")
    whole = torch.zeros(repair.weight.shape[0], len(mask), dtype=torch.float32, device=parameter.device)
    whole[:, mask] = repair.weight
    parameter.data = (whole if isinstance(layer, nn.Linear) else whole.t().contiguous()).to(parameter.dtype)
    if repair.bias is not None:
        own = layer._parameters.get("bias")
        moved = repair.bias if own is None else own.detach().float() + repair.bias
        layer._parameters["bias"] = nn.Parameter(moved.to(parameter.dtype), requires_grad=False)


@contextmanager
def _restored(layers: Iterator[nn.Module]) -> Iterator[None]:
    """A context at whose end the weights and biases of layers are those of its start."""
    before = [(layer, layer.get_parameter("weight").data, layer._parameters.get("bias")) for layer in layers]
    try:
        yield
    finally:
        for layer, weight, bias in before:
            layer.get_parameter("weight").data = weight
            layer._parameters["bias"] = bias


def write_repairs(
    tensors: dict[str, torch.Tensor], repaired: Mapping[str, Repair], structures: Structures, with_bias: frozenset[str]
) -> dict[str, torch.Tensor]:
    """The tensors of the smaller model with repaired weights, and biases where the layers have one."""
    result = dict(tensors)
    for name, repair in repaired.items():
        old = tensors[f"{name}.weight"]
        weight = repair.weight if isinstance(structures.layers[name], nn.Linear) else repair.weight.t()
        result[f"{name}.weight"] = weight.to(old.dtype).contiguous()
        if repair.bias is not None and name in with_bias:
            bias = tensors[f"{name}.bias"]
            result[f"{name}.bias"] = (bias.float() + repair.bias).to(bias.dtype)
    return result
