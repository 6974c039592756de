"""Learns rotations of the values of attention heads in which a pattern prunes less of the importance.

The values of a key-value group can be multiplied by any orthogonal R, because attention only adds them up: v's weight
V [width, in_features] becomes R^T V, and the columns O of o that read them become O R. The dense model computes the
same. With G the Gram matrix of a layer's inputs, the importance of a weight is w_ij^2 G_jj (Wanda's score, squared);
o's Gram matrix becomes R^T G R. R lowers the importance of the weights that the pattern prunes:

    loss(R) = sum over o and v of  pruned(R) / pruned(I),    R = exp(A - A^T),    A by Adam

Source: DenoiseRotator (Gu et al., 2025, arXiv:2505.23049) rotates before pruning. It lowers the entropy of the
importance instead, and also rotates the residual stream. :mod:`.rotate` applies the rotations to a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.score_terms import ScoreTerms
from ..prune import choose
from ..sparsity import Sparsity

STEPS, RATE = 40, 0.02
"""Steps of Adam, and its learning rate."""

TINY = torch.finfo(torch.float32).tiny
"""Least divisor of a loss: a side without any importance has the ratio 0."""


@dataclass(frozen=True)
class Rotation:
    """A rotation of the values of each pool.

    Attributes:
        matrix: fp64 [pools, width, width], orthogonal, on the CPU.
        before, after: fraction of the importance that the pattern retains without and with the rotation; the mean over
            the pruned layers.
    """

    matrix: torch.Tensor
    before: float
    after: float


@dataclass(frozen=True)
class Loss:
    """The importance that a pattern prunes in one layer, by rotation.

    Attributes:
        pruned, total: importance of the pruned weights, and of all weights; scalars.
        gradient: of ``pruned`` by the rotation, [pools, width, width].
    """

    pruned: torch.Tensor
    total: torch.Tensor
    gradient: torch.Tensor


class OutputSide:
    """The output projection.

    Args:
        weight: fp32 [out_features, pools, shares, width].
        gram: Gram matrix of its inputs, fp32 [pools, shares, width, width].
        sparsity: the pattern.
    """

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, sparsity: Sparsity) -> None:
        self._rows, self._gram, self._sparsity = weight.transpose(0, 1).flatten(1, 2).contiguous(), gram, sparsity
        self._shape = (weight.shape[1], weight.shape[0], *weight.shape[2:])
        self.device = weight.device

    def loss(self, rotation: torch.Tensor) -> Loss:
        """The loss and its gradient at a rotation [pools, width, width]."""
        product = self._gram @ rotation[:, None]
        energy = (rotation[:, None] * product).sum(2)
        turned = (self._rows @ rotation).view(self._shape)
        importance = turned.square().mul_(energy[:, None])
        mask = _mask(importance.transpose(0, 1).flatten(1), self._sparsity)
        dropped = mask.view(self._shape[1], self._shape[0], *self._shape[2:]).transpose(0, 1).logical_not()
        pruned_weight = turned * dropped
        by_energy = pruned_weight.square().sum(1)
        gradient = 2 * self._rows.transpose(1, 2) @ pruned_weight.mul_(energy[:, None]).flatten(1, 2)
        gradient += 2 * (product * by_energy[:, :, None]).sum(1)
        return Loss((by_energy * energy).sum(), importance.sum(), gradient)


class ValueSide:
    """The value projection.

    Args:
        weight: fp32 [pools, width, in_features].
        squares: sum of squares of its inputs, fp32 [in_features].
        sparsity: the pattern.
    """

    def __init__(self, weight: torch.Tensor, squares: torch.Tensor, sparsity: Sparsity) -> None:
        self._weight, self._squares, self._sparsity = weight.contiguous(), squares, sparsity
        self.device = weight.device

    def loss(self, rotation: torch.Tensor) -> Loss:
        """As in :class:`OutputSide`."""
        turned = rotation.transpose(1, 2) @ self._weight
        importance = turned.square() * self._squares
        mask = _mask(importance.flatten(0, 1), self._sparsity).view(importance.shape)
        weighted = turned.mul_(self._squares).masked_fill_(mask, 0)
        gradient = 2 * self._weight @ weighted.transpose(1, 2)
        return Loss(importance.masked_fill(mask, 0).sum(), importance.sum(), gradient)


def near_one(values: torch.Tensor) -> torch.Tensor:
    """The values times a power of two, so that their squares are in the range of fp32. Only ratios of losses count."""
    _, exponent = torch.frexp(values.abs().amax())
    return torch.ldexp(values, -exponent)


def _mask(importance: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    return choose(importance.contiguous(), ScoreTerms(), sparsity, sparsity.axis or "in", "mask")


def learned_rotation(
    sides: Sequence[OutputSide | ValueSide], pools: int, width: int, *, steps: int = STEPS, rate: float = RATE
) -> Rotation:
    """The rotation with the smallest loss that Adam finds, starting at the identity.

    Args:
        sides: the layers that the loss counts; one or two.
        pools: number of rotations.
        width: number of channels of each.
        steps: number of steps of Adam.
        rate: its learning rate.
    """
    skew = torch.zeros(pools, width, width, dtype=torch.float32, device=sides[0].device, requires_grad=True)
    optimizer = torch.optim.Adam([skew], lr=rate)
    wholes: list[torch.Tensor] = []
    best, least, before, after = torch.matrix_exp(skew.detach()), float("inf"), 0.0, 0.0
    for step in range(steps + 1):
        with torch.enable_grad():
            rotation = torch.matrix_exp(skew - skew.transpose(1, 2))
        losses = [side.loss(rotation.detach()) for side in sides]
        wholes = wholes or [loss.pruned.clamp_min(TINY) for loss in losses]
        total = float(torch.stack([loss.pruned / whole for loss, whole in zip(losses, wholes, strict=True)]).sum())
        retained = 1 - float(torch.stack([loss.pruned / loss.total.clamp_min(TINY) for loss in losses]).mean())
        before = retained if step == 0 else before
        if total < least:
            best, least, after = rotation.detach(), total, retained
        if step < steps:
            optimizer.zero_grad()
            gradients = [loss.gradient / whole for loss, whole in zip(losses, wholes, strict=True)]
            rotation.backward(torch.stack(gradients).sum(0))
            optimizer.step()
    left, _, right = torch.linalg.svd(best.to("cpu", torch.float64))
    return Rotation(left @ right, before, after)
