"""Group fine-tuning, the recovery of SAAP (arXiv 2412.15127): quantized groups of columns with low-rank adapters.

The columns of a weight W [out_features, in_features] are split into groups. Each row of a group is rounded to 2^bits
values with equal steps between its minimum and its maximum. An adapter moves all values of a row of a group together:

    W'[i, j] = W_q[i, j] + (B A)[i, j // group],    A [rank, n_groups], B [out_features, rank].

So the adapter can be merged exactly: it changes the minimum of each row of a group, and the steps stay.

The paper says that the columns are split into groups and quantized by minimum and maximum, and that low-rank adapters
are trained on top and merged afterwards. Its text is not fully available to us. That an adapter is constant in a group,
which makes the merge exact, and how it starts are *reconstructed*, after QA-LoRA (arXiv 2309.14717).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..decoders.blocks import find_blocks, linears_of
from ..decoders.finished import forward_replaced
from ..errors import RecoveryError
from ..processes import Processes
from ..solvers.kept_adamw import KeptAdamW, scale_of
from .settings import GroupTuning
from .stored import as_stored

START = 0.1
"""Root mean square of an adapter's product at its start, in units of the weight's. It is subtracted from the weight."""


def min_max_groups(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A weight with each row of each group rounded to 2^bits values between its minimum and its maximum.

    Args:
        weight: floating point [out_features, in_features].
        bits: bits of a value.
        group: number of columns of a group; it divides in_features.

    Returns:
        fp32 of the same shape.
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    steps = ((groups - low) / step.where(step > 0, torch.ones_like(step))).round_()
    return (low + steps * step).flatten(1)


def tuned_layers(
    model: nn.Module, masks: Mapping[str, torch.Tensor], tuning: GroupTuning, *, shard: bool
) -> dict[str, nn.Linear]:
    """The linear layers that group fine-tuning trains, by name.

    Raises:
        RecoveryError: if the model has zeros to keep or no such layer, a group does not divide a layer's inputs, or the
            weights are spread over processes.
    """
    if shard:
        raise RecoveryError("group fine-tuning needs a whole model in each process: leave shard (--shard) out")
    if pruned := [name for name, mask in masks.items() if not bool(mask.all())]:
        raise RecoveryError(
            f"{pruned[0]} is pruned, and group fine-tuning moves whole groups, so its zeros would not stay: fine-tune "
            "the model that shrink wrote, then prune it; or recover without groups (--tune weights)"
        )
    layers = {
        name: layer
        for block in find_blocks(model)
        for name, layer in linears_of(block.module, block.name)
        if isinstance(layer, nn.Linear) and f"{name}.weight" in masks
    }
    if not layers:
        raise RecoveryError(
            f"{type(model).__name__} has no nn.Linear in its blocks to put adapters on: recover without groups (--tune "
            "weights)"
        )
    for name, layer in layers.items():
        if layer.in_features % tuning.group:
            raise RecoveryError(
                f"a group of {tuning.group} columns does not divide the {layer.in_features} of {name}: give a group "
                "(--tune-group) that divides it"
            )
    return layers


@contextmanager
def adapted(
    layers: Mapping[str, nn.Linear], tuning: GroupTuning, seed: int, dtype: torch.dtype, processes: Processes
) -> Iterator[KeptAdamW]:
    """A context in which the layers are quantized and have adapters; at exit the adapters are merged.

    Args:
        layers: from :func:`tuned_layers`. They have new weights at exit, also after an error, but their own if no
            step was taken.
        tuning: bits, group and rank.
        seed: random seed of the adapters.
        dtype: dtype of forwards.
        processes: processes that train the same adapters.

    Yields:
        The optimizer of the adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    starts: dict[str, torch.Tensor] = {}
    adapters: dict[str, nn.Parameter] = {}
    own = {name: layer.weight.data for name, layer in layers.items()}
    for name, layer in layers.items():
        a, b = _adapter(layer, tuning, generator)
        whole = min_max_groups(layer.weight.detach(), tuning.bits, tuning.group)
        starts[name] = whole - _spread(b @ a, tuning.group)
        adapters |= {f"{name}.a": nn.Parameter(a), f"{name}.b": nn.Parameter(b)}
    optimizer = KeptAdamW(adapters, dtype, processes)
    try:
        with ExitStack() as replaced:
            for name, layer in layers.items():
                layer.weight.data = starts[name].to(dtype)
                forward = _forward(layer, adapters[f"{name}.a"], adapters[f"{name}.b"], tuning.group)
                replaced.enter_context(forward_replaced(layer, forward))
            yield optimizer
    finally:
        for name, layer in layers.items():
            if not optimizer.has_stepped:
                layer.weight.data = own[name]
                continue
            product = optimizer.values[f"{name}.b"] @ optimizer.values[f"{name}.a"]
            merged = starts[name] + _spread(product, tuning.group)
            layer.weight.data = as_stored(name, merged, own[name].dtype)


def _adapter(layer: nn.Linear, tuning: GroupTuning, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A and B, fp32, without zeros, whose product has the root mean square START of the weight's."""
    shapes: Sequence[tuple[int, int]] = (
        (tuning.rank, layer.in_features // tuning.group),
        (layer.out_features, tuning.rank),
    )
    size = (START * scale_of(layer.weight.detach().float()) / tuning.rank**0.5) ** 0.5
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * size for shape in shapes)
    return a.to(layer.weight.device), b.to(layer.weight.device)


def _forward(layer: nn.Linear, a: nn.Parameter, b: nn.Parameter, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        sums = inputs.unflatten(-1, (-1, group)).sum(-1)
        low_rank = nn.functional.linear(nn.functional.linear(sums, a), b)
        return nn.functional.linear(inputs, layer.weight, layer.bias) + low_rank

    return forward


def _spread(by_group: torch.Tensor, group: int) -> torch.Tensor:
    """A value for each column, from one for each group."""
    return by_group.repeat_interleave(group, dim=1)
