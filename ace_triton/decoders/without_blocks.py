"""Says why a model has no blocks that can be pruned."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..linears import linear_weight


def why_no_blocks(model: nn.Module) -> str:
    """Why a model has no blocks with linear layers, as a sentence: it has no blocks, or other layers in them."""
    name = type(model).__name__
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    inside = dict.fromkeys(module for members in lists if len(members) > 1 for module in members.modules())
    sizes: Counter[str] = Counter()
    for module in inside:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if linear_weight(module) is None:
            sizes[type(module).__name__] += sum(tensor.numel() for tensor in own if tensor.dim() > 1)
    kinds = [kind for kind, size in sizes.most_common(2) if size]
    if not kinds:
        return (
            f"{name} has no blocks (an nn.ModuleList or nn.Sequential of modules with linear layers): prune its linear "
            "layers one by one with prune_linear"
        )
    return (
        f"the blocks of {name} have no linear layers, and only linear layers are pruned; their weights are in "
        f"{' and '.join(kinds)}"
    )
