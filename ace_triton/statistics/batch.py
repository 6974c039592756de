"""Adds a batch to the moments of an input and to the output statistics of the layers that read it.

On a GPU this is one operation, which reads the tokens once and does not wait
(:func:`~ace_triton.kernels.token_statistics.token_statistics`). Elsewhere each statistic reads them by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import StatsError
from ..kernels.backend import backend_of_device
from ..kernels.coupling import coupling
from ..kernels.token_statistics import NUMBERS, no_layer_sums, token_statistics
from ..kernels.weighted_squares import MOST_LAYERS
from .channel_moments import ChannelMoments
from .deferred import DeviceCounts, is_on_cpu
from .outputs import NOT_FINITE, OutputStats, check_outputs, update_outputs


def reads_tokens_once(tokens: torch.Tensor) -> bool:
    """True if :func:`add_batch` reads these tokens once for all layers, so that it is best called once."""
    return backend_of_device(tokens.device) == "triton" and tokens.numel() > 0


def add_batch(
    moments: ChannelMoments,
    stats: Sequence[OutputStats],
    tokens: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    valid: torch.Tensor | None = None,
) -> None:
    """Add a batch of tokens, and the outputs for it.

    Args:
        moments: the moments of the tokens.
        stats: one for each layer.
        tokens: [n_tokens, in_features] as one sequence, or [n_sequences, length, in_features].
        outputs: for each layer, its outputs [..., out_features] for these tokens.
        valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out (padding).

    Raises:
        StatsError: as :func:`~ace_triton.statistics.outputs.update_outputs`; ``moments`` may then have the batch.
    """
    if not stats or not reads_tokens_once(tokens):
        moments.update(tokens, valid)
        update_outputs(stats, tokens, outputs, valid)
        return
    flat = []
    for stat, output in zip(stats, outputs, strict=True):
        check_outputs(stat, tokens, output)
        flat.append(output.reshape(-1, output.shape[-1]))
    together, rows = stats[:MOST_LAYERS], flat[:MOST_LAYERS]
    if len({row.dtype for row in rows}) > 1:
        rows = [row.float() for row in rows]
    weighted = any(stat.reduce is not None for stat in together)
    before = moments.before(tokens)
    sums = _running_sums(together, tokens)
    found = token_statistics(tokens, valid, before, rows, sums, token_weights=weighted)
    if is_on_cpu(tokens) and not bool(found.layers[:, 2].all()):
        raise StatsError(NOT_FINITE)
    moments.set_running(found, None if valid is not None else tokens.shape[:-1].numel())
    for place, (stat, output) in enumerate(zip(together, flat, strict=False)):
        if stat.reduce is not None:
            assert found.token_weights is not None
            inputs = tokens.reshape(-1, tokens.shape[-1])
            stat.matrix = coupling(inputs, output, found.token_weights[place], stat.reduce, into=stat.matrix)
        stat.on_device = DeviceCounts.of_sums(found.layers, place, tokens.shape[-1])
        stat.weighted_square = stat.on_device.square
        if is_on_cpu(tokens):
            stat.read_deferred()
    update_outputs(stats[MOST_LAYERS:], tokens, outputs[MOST_LAYERS:], valid)


def _running_sums(stats: Sequence[OutputStats], tokens: torch.Tensor) -> torch.Tensor:
    """The running sums of all layers. If the batch before had the same layers, its result is passed on as it is."""
    counts = [stat.on_device for stat in stats]
    known = None if counts[0] is None else counts[0].sums
    if known is not None and len(known) == len(stats):
        rows = zip(stats, counts, range(len(stats)), strict=True)
        if all(
            count is not None and count.sums is known and count.row == row and count.square is stat.weighted_square
            for stat, count, row in rows
        ):
            return known
    in_features, device = tokens.shape[-1], tokens.device
    sums = no_layer_sums(len(stats), in_features, device)
    for row, stat in zip(sums, stats, strict=True):
        if stat.weighted_square is None:
            continue
        count = stat.on_device or DeviceCounts.of(stat.count, stat.unit, device)
        for place, number in enumerate((count.counted, count.unit, count.finite)):
            row[place] = number
        row[NUMBERS : NUMBERS + in_features] = stat.weighted_square
    return sums
