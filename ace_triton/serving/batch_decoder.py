"""What decodes several texts at once faster: the compiled step or a forward of transformers."""

from __future__ import annotations

from torch import nn

from ..linears import linear_weight
from ..packed.packed_linear import PackedLinear


def pays_in_step(model: nn.Module) -> bool:
    """True if the compiled step decodes several texts faster than a forward of transformers does.

    Both read the weights once for all texts. A forward of transformers takes longer in Python; a dense weight takes
    longer in the step. So it depends on whether packed layers have most of the weights.
    """
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
