"""Pruning of a model's blocks written anew, to compare with, and the masks of two models."""

from dataclasses import dataclass

import torch
from torch import nn

from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.linears import linear_weight


@dataclass(frozen=True)
class Sequences:
    ids: torch.Tensor
    mask: torch.Tensor | None = None


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for b in find_blocks(model) for name, layer in linears_of(b.module, b.name)}


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: linear_weight(layer) != 0 for name, layer in block_linears(model).items()}


def same_masks(one: nn.Module, other: nn.Module) -> bool:
    theirs = masks(other)
    return all(torch.equal(mask, theirs[name]) for name, mask in masks(one).items())


def published_score(method: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Wanda's and RIA's formulas, in fp64."""
    weight, tokens = weight.double().abs(), tokens.double().reshape(-1, weight.shape[1])
    norm = tokens.norm(dim=0)
    if method == "wanda":
        return weight * norm
    return (weight / weight.sum(0, keepdim=True) + weight / weight.sum(1, keepdim=True)) * norm.sqrt()


def prune_naively(model: nn.Module, ids: torch.Tensor, method: str, sparsity: str | float, sequential: str) -> None:
    """Pruning block by block or at once, by full forwards of the model, sharing nothing with the package."""
    everything = [(f"{i}.{n}", m) for i, block in enumerate(model.model.layers) for n, m in block.named_modules()]
    linears = [(name, layer) for name, layer in everything if isinstance(layer, nn.Linear)]
    blocks = [[layer for name, layer in linears if name.startswith(f"{i}.")] for i in range(len(model.model.layers))]
    for layers in [[layer for block in blocks for layer in block]] if sequential == "none" else blocks:
        seen = {}
        hooks = [m.register_forward_hook(lambda m, args, _out, s=seen: s.update({m: args[0]})) for m in layers]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            score = published_score(method, layer.weight.detach(), seen[layer])
            group = score.reshape(-1, 4) if sparsity == "2:4" else score
            order = torch.sort(group, dim=-1, stable=True).indices
            pruned = torch.zeros_like(group, dtype=torch.bool)
            pruned.scatter_(-1, order[:, : group.shape[1] // 2], True)
            layer.weight.data[pruned.reshape(score.shape)] = 0
