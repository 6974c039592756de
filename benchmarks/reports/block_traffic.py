"""Counts launches and host waits of pruning a block at 2:4, with its layers together and one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from ace_triton import ActivationStats, Recipe
from ace_triton.checked_terms import UnreadCheck, read_checks
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE
from ace_triton.kernels.finite_check import FiniteCheck
from ace_triton.prune import prune_checked
from ace_triton.prune_blocks import check_later
from ace_triton.prune_together import LayerToPrune, prune_together
from benchmarks.harness.traffic_counter import Counter, Traffic

METHODS = ("magnitude", "wanda", "stade", "ria", "saap", "cosp", "varp", "ace")

SHAPES = {
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "gate": (48, 32),
    "up": (48, 32),
    "down": (32, 48),
}
"""A Llama block's layers, [out_features, in_features], in small: launches do not depend on sizes."""

INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class BlockRow:
    """A method's traffic in a block.

    Attributes:
        method: name of the method.
        checks: the check of the weights before anything is pruned, with their sums if the method needs them.
        together: vectors and selection of all layers, and the reading of their checks.
        alone: the same, layer by layer.
    """

    method: str
    checks: Traffic
    together: Traffic
    alone: Traffic


def block_to_prune() -> list[LayerToPrune]:
    """The layers of a block, with random weights, and statistics of their inputs that layers of one input share.

    The statistics come from the reference, because the interpreter is slow.
    """
    torch.manual_seed(0)
    shared: dict[tuple[str, ...], ActivationStats] = {}
    tokens = {group: torch.randn(2, 4, SHAPES[group[0]][1]) for group in INPUTS}
    found = []
    for name, (rows, cols) in SHAPES.items():
        group = next(group for group in INPUTS if name in group)
        layer = nn.Linear(cols, rows, bias=False, dtype=torch.float32)
        with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "reference"}):
            own = ActivationStats.from_tokens(tokens[group], layer=layer)
        stats = shared.setdefault(group, own).with_outputs(own.outputs)
        found.append(LayerToPrune(name, layer, layer.weight.detach(), stats))
    return found


def row_of_block(method: str) -> BlockRow:
    """Prune a block, together and layer by layer."""
    recipe, counts = Recipe(method), []
    for together in (True, False):
        layers, finite = block_to_prune(), FiniteCheck()
        unread: list[UnreadCheck] = []
        with Counter().counting() as checks:
            check_later([entry.weight for entry in layers], recipe, finite)
        finite.read()
        with Counter().counting() as pruning:
            if together:
                prune_together(layers, recipe, finite, unread)
            else:
                for entry in layers:
                    prune_checked(entry.layer, entry.weight, entry.stats, recipe, entry.name, finite, unread=unread)
            read_checks(unread)
        counts.append(pruning)
    return BlockRow(method, checks, *counts)


def rows_of_blocks() -> list[BlockRow]:
    """Every metric that scores by vectors."""
    return [row_of_block(method) for method in METHODS]


def block_lines(rows: Sequence[BlockRow]) -> Iterator[str]:
    """The Markdown table of :func:`rows_of_blocks`."""
    yield "## prune_model at 2:4, a block of a Llama model"
    yield ""
    yield (
        f"Kernels of a block with {len(SHAPES)} layers and {len(INPUTS)} inputs, on newly collected statistics. "
        "*Checks* come before anything is pruned: they read each weight once, for NaN and infinity and, if the method "
        "needs them, for its sums. *Pruning* is the rest: vectors of the inputs and layers, and the selection. The "
        "layers of a block that are on one GPU are pruned together; each launch finds its layers in a table of a few "
        "kilobytes, which the host copies to the GPU without a wait. (The copies are not counted.) *All launches* of "
        "pruning also has torch operations, such as the joining of flags that the host reads at the end. *Waits* is "
        "that one reading."
    )
    yield ""
    yield "| method | checks | pruning | all launches | waits | layer by layer: pruning | all launches | waits |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        one, other = row.together, row.alone
        yield (
            f"| {row.method} | {row.checks.kernels} | {one.kernels} | {one.launches} | {one.waits} | {other.kernels} | "
            f"{other.launches} | {other.waits} |"
        )
    yield ""
