"""Norms of every layer's input channels, and where VarP's 1 / (1 - y) comes near its pole."""

from __future__ import annotations

from typing import get_args

import torch

from ..decoders.batches import Batch, sequences_of_a_forward
from ..decoders.blocks import find_blocks, linears_of
from ..decoders.calibration_mode import calibration_mode
from ..decoders.collect import InputCollector
from ..decoders.replay import WholeForward
from ..kernels.variance_factor import VarianceNorm, variance_factor
from ..methods.registry import Needs, metric
from ..statistics.activation import ActivationStats
from ..timing import Stopwatch
from .records import InputNorms, ModelNorms, Pole

BIN_EDGES = tuple(round(-3 + 0.2 * index, 1) for index in range(36))
"""Bins of the histograms, in log10 of a norm."""

NEAR_POLE = 10.0
"""From this f_j on, a channel counts as near the pole; a constant y of 0.9 gives it."""


def model_norms(model: torch.nn.Module, ids: torch.Tensor) -> ModelNorms:
    """The input norms of all linear layers in a model's blocks.

    Args:
        model: a Hugging Face causal decoder.
        ids: int64 [n_sequences, length].
    """
    blocks = find_blocks(model)  # type: ignore[arg-type]
    layers = {name: layer for block in blocks for name, layer in linears_of(block.module, block.name)}
    clock = Stopwatch(ids.device)
    collector = InputCollector(layers, Needs(), clock)
    device = next(model.parameters()).device
    parts = ids.to(device).split(sequences_of_a_forward(ids.shape[1], on_gpu=device.type == "cuda"))
    with calibration_mode(model):
        WholeForward(model, [Batch.of_ids(part) for part in parts], clock).run_all(collector)
    found = []
    for index, block in enumerate(blocks):
        prefix = f"{block.name}."
        for group in collector.groups:
            stats = collector.statistics(group[0])
            if stats is not None and group[0].startswith(prefix):
                found.append(input_norms(index, tuple(name.removeprefix(prefix) for name in group), stats))
    return ModelNorms(ids.shape[1], tuple(found))


def input_norms(block: int, layers: tuple[str, ...], stats: ActivationStats) -> InputNorms:
    """The record of one input, from its statistics."""
    norm = stats.norm.cpu()
    edges = torch.tensor(BIN_EDGES, dtype=torch.float64, device="cpu")
    last = len(BIN_EDGES) - 2
    bins = (torch.bucketize(norm.double().log10(), edges, right=True) - 1).clamp(0, last)
    return InputNorms(
        block=block,
        layers=layers,
        channels=stats.in_features,
        median=float(norm.median()),
        largest=float(norm.max()),
        histogram=tuple(torch.bincount(bins, minlength=last + 1).tolist()),
        poles=tuple(_pole(stats, normalizer) for normalizer in get_args(VarianceNorm)),
    )


def _pole(stats: ActivationStats, normalizer: VarianceNorm) -> Pole:
    factor = variance_factor(stats.sequence_square, normalizer, power=1, eps=metric("varp").options["eps"])
    return Pole(normalizer, float(factor.max()), int((factor >= NEAR_POLE).sum()))
