"""What decodes several texts at once faster: the compiled step or a forward of transformers."""

from __future__ import annotations

import torch
from torch import nn

from ..linears import linear_weight
from ..packed.packed_linear import PackedLinear
from ..runs_on import multiplies_bfloat16


def pays_in_step(model: nn.Module) -> bool:
    """True if the compiled step decodes several texts faster than a forward of transformers does.

    Both read the weights once for all texts. A forward of transformers takes longer in Python; a dense weight takes
    longer in the step. So the step pays if packed layers have most of the weights. It also pays for weights in bfloat16
    on a CPU without instructions for them, where torch multiplies them slowly.
    """
    first = next(model.parameters(), None)
    if first is not None and first.dtype == torch.bfloat16 and not multiplies_bfloat16(first.device):
        return True
    packed = elements = 0
    for layer in model.modules():
        weight = linear_weight(layer)
        if isinstance(layer, PackedLinear):
            size = layer.in_features * layer.out_features
            packed += size
            elements += size
        elif weight is not None:
            elements += weight.numel()
    return 2 * packed > elements
