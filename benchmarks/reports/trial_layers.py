"""Output errors of single layers in a dense model, on text that they were not pruned by: a trial in seconds."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from ace_triton.decoders.batches import Batch
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.prune import prune_linear
from ace_triton.statistics.activation import ActivationStats
from ace_triton.study.workbench import Workbench

from . import trial_metric
from .trial_rows import Row

HELD_OUT = 16
"""Sequences of the evaluation text on which errors are measured."""

DEPTHS = (0.15, 0.4)
"""The blocks whose layers are pruned, as shares of the model's depth."""


class _LastBlock(Exception):
    """The last block that is needed has run."""


class LayerBench:
    """Layers of two blocks of a dense model, their statistics, and held-out inputs.

    Args:
        bench: the model and its texts.
        seed: random seed of the calibration sample.
        length: tokens of a calibration sequence.
    """

    def __init__(self, bench: Workbench, seed: int, length: int) -> None:
        calibration = bench.calibration(length, seed)
        held_out = bench.ids[: HELD_OUT * length].view(-1, length)
        blocks = find_blocks(bench.model, Batch({"input_ids": calibration[:1]}))
        chosen = [blocks[int(depth * len(blocks))] for depth in DEPTHS]
        layers = [entry for block in chosen for entry in linears_of(block.module, block.name)]
        tokens = _inputs(bench.model, layers, chosen[-1].module, torch.cat([calibration, held_out]))
        self._layers = []
        known: dict[int, ActivationStats] = {}
        for name, layer in layers:
            seen, unseen = tokens[name][: calibration.numel()], tokens[name][calibration.numel() :]
            stats = known.setdefault(tokens[name].data_ptr(), ActivationStats.from_tokens(seen, gram=True))
            self._layers.append((layer, stats, unseen))

    @torch.no_grad()
    def measure(self, row: Row) -> tuple[float, float]:
        """Geometric mean over the layers of their squared output error over the squared outputs, and CPU seconds."""
        # Copies have no cached factors, so that each row takes its own time.
        fresh = {id(stats): stats.to("cpu") for _, stats, _ in self._layers}
        errors, start, recipe = [], time.process_time(), replace(row.recipe, permute=False)
        for layer, stats, unseen in self._layers:
            pruned = copy.deepcopy(layer)
            biases = trial_metric.Biases(pruned, all_layers=row.bias == "every layer") if row.bias else None
            trial_metric.biases[:] = [] if biases is None else [biases]
            prune_linear(pruned, fresh[id(stats)], recipe)
            trial_metric.biases.clear()
            own = 0.0 if layer.bias is None else layer.bias
            errors.append(float((pruned(unseen) - layer(unseen)).square().sum() / (layer(unseen) - own).square().sum()))
        return math.exp(statistics.fmean(map(math.log, errors))), time.process_time() - start


@torch.no_grad()
def _inputs(
    model: nn.Module, layers: list[tuple[str, nn.Module]], last: nn.Module, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What each layer reads, fp32 [n_tokens, in_features], by its name; layers that share an input share the tensor."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in layers}

    def stop(*_: object) -> None:
        raise _LastBlock

    hooks = [
        layer.register_forward_pre_hook(lambda _layer, args, name=name: seen[name].append(args[0].detach()))
        for name, layer in layers
    ]
    hooks.append(last.register_forward_hook(stop))
    try:
        for part in ids.split(16):
            try:
                model(part, use_cache=False)
            except _LastBlock:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    joined: dict[int, torch.Tensor] = {}
    found = {}
    for name, parts in seen.items():
        key = parts[0].data_ptr()
        if key not in joined:
            joined[key] = torch.cat([part.flatten(0, -2) for part in parts])
        found[name] = joined[key]
    return found
