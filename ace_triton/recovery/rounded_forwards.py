"""Forwards with rounded weights: recovery of a model that is stored in 8 or 4 bits.

Each forward reads the weights rounded to the nearest value of their group (:mod:`ace_triton.kernels.few_bits`):

    w_ij = absmax_ig round(Q v_ij / absmax_ig) / Q,   absmax_ig = max over j in g of |v_ij|,

where v are the fp32 copies that the optimizer trains. The gradient of w counts as the gradient of v, also if v is
rounded to 0. A pruned weight has v = 0 and stays 0. Weights that are rounded already start as they are: rounding them
again changes nothing.

The weights are rounded at the start and after each optimizer step, not in each forward. So a rounded parameter
takes the memory of one in the dtype of forwards, beside the fp32 copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..decoders.blocks import find_blocks, linears_of, stacks_of
from ..errors import RecoveryError
from ..kernels.few_bits import DTYPES
from ..kernels.round_groups import round_groups
from ..packed.expert_stack import stores_transposed
from ..solvers.quantize import Quantization


@dataclass(frozen=True)
class RoundedWeight:
    """How one weight is rounded.

    Attributes:
        by: bits and group.
        dtype: dtype of the model, in which the scales are kept.
        transposed: True if the weight is [..., in_features, out_features].
    """

    by: Quantization
    dtype: torch.dtype
    transposed: bool

    @torch.no_grad()
    def __call__(self, values: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """The rounded values, contiguous, in ``into`` or in a new tensor in fp32 of the same shape.

        Args:
            values: fp32.
            into: of the same shape, in any dtype.
        """
        values = values.contiguous()
        into = torch.empty_like(values) if into is None else into
        if not values.numel():
            return into
        if self.transposed or into.dtype not in DTYPES or not into.is_contiguous():
            given = values.mT.contiguous() if self.transposed else values
            rounded = self._rounded(given, torch.empty_like(given))
            return into.copy_(rounded.mT if self.transposed else rounded)
        return self._rounded(values, into)

    def _rounded(self, values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """The same for values [..., in_features]."""
        cols = values.shape[-1]
        round_groups(values.view(-1, cols), self.by.bits, self.by.group, self.dtype, into.view(-1, cols))
        return into


def roundings_of(
    model: nn.Module, masks: Mapping[str, torch.Tensor], by: Quantization | None, *, shard: bool = False
) -> dict[str, RoundedWeight]:
    """How the trained weights are rounded, by name: linear layers and experts. Empty without a quantization.

    Args:
        model: the model to train.
        masks: masks of its trained matrices, True for kept weights.
        by: bits and group; None to round nothing.
        shard: True if each process holds a range of rows of every weight.

    Raises:
        RecoveryError: if a pruned weight is neither a linear layer nor a stack of experts, or the range of rows of a
            process cuts groups.
    """
    if by is None:
        return {}
    stored = _transposed(model)
    found = {}
    for name, mask in masks.items():
        if name not in stored:
            if bool(mask.all()):
                continue  # Of a smaller model: packing leaves such a weight in its type, too.
            raise RecoveryError(
                f"{name} is pruned, and only linear layers and stacks of experts can be stored in {by.bits} bits: "
                "leave quantize (--bits) out"
            )
        if shard and stored[name] and mask.dim() == 2:
            raise RecoveryError(
                f"{name} is stored as [in_features, out_features], and its groups for {by.bits} bits cannot be spread "
                "over processes: recover without --shard, or leave quantize (--bits) out"
            )
        found[name] = RoundedWeight(by, model.get_parameter(name).dtype, stored[name])
    return found


def _transposed(model: nn.Module) -> dict[str, bool]:
    """For each weight of a linear layer and each stack of experts in the blocks, by name: whether inputs come first."""
    found = {}
    for block in find_blocks(model):
        for name, layer in linears_of(block.module, block.name):
            found[f"{name}.weight"] = not isinstance(layer, nn.Linear)
        for stack in stacks_of(block.module, block.name):
            transposed = stores_transposed(model.get_submodule(stack.name.rpartition(".")[0]))
            if transposed is not None:
                found[stack.name] = transposed
    return found
