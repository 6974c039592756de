"""Heat maps of input norms by layer, and of VarP near its pole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter

from .drawing import HEAT, canvas, drawing
from .norms import BIN_EDGES, NEAR_POLE
from .records import InputNorms, ModelNorms

MOST_KINDS = 8
"""At most this many kinds of input are drawn: the first ones."""


def kinds(norms: ModelNorms) -> list[str]:
    """The kinds of input in a block, each named after the layers that read it."""
    return list(dict.fromkeys(kind_of(entry) for entry in norms.inputs))[:MOST_KINDS]


def kind_of(entry: InputNorms) -> str:
    """ "q_proj, k_proj, v_proj"."""
    return ", ".join(name.rpartition(".")[2] for name in entry.layers)


def norm_map(norms: ModelNorms, kind: str, number: int) -> Markup:
    """The distribution of the norms of one kind of input over its channels, by block."""
    entries = [entry for entry in norms.inputs if kind_of(entry) == kind]
    shares = np.full((len(BIN_EDGES) - 1, max(e.block for e in entries) + 1), np.nan)
    for entry in entries:
        share = np.array(entry.histogram) / entry.channels
        shares[:, entry.block] = np.where(share > 0, share, np.nan)
    with canvas(4.6, 3.2) as (figure, axes):
        used = np.flatnonzero(np.isfinite(shares).any(1))
        image = axes.imshow(
            shares,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            norm="log",
            cmap=HEAT,
            extent=(-0.5, shares.shape[1] - 0.5, BIN_EDGES[0], BIN_EDGES[-1]),
        )
        axes.set_ylim(BIN_EDGES[used[0]] - 0.2, BIN_EDGES[used[-1] + 1] + 0.2)
        axes.grid(visible=False)
        _powers_of_ten(axes)
        axes.set_xlabel("block")
        axes.set_ylabel("norm of a channel")
        axes.set_title(kind)
        bar = figure.colorbar(image, ax=axes, label="share of channels", pad=0.02, format=FuncFormatter(_percent))
        bar.outline.set_visible(False)
        top = max(entries, key=lambda entry: entry.largest / entry.median)
        description = (
            f"Distribution of input norms of {kind} by block. Widest in block {top.block}: the largest channel has "
            f"{top.largest / top.median:,.0f} times the median norm."
        )
        return drawing(figure, f"norms{number}", f"Input norms of {kind}", description)


def pole_map(norms: ModelNorms, normalizer: str) -> Markup:
    """VarP's largest factor, by kind of input and block, for one normalizer."""
    rows = kinds(norms)
    blocks = max(entry.block for entry in norms.inputs) + 1
    largest, channels = np.full((len(rows), blocks), np.nan), np.zeros((len(rows), blocks), dtype=int)
    for entry in norms.inputs:
        pole = next(pole for pole in entry.poles if pole.norm == normalizer)
        if kind_of(entry) in rows:
            largest[rows.index(kind_of(entry)), entry.block] = pole.largest
            channels[rows.index(kind_of(entry)), entry.block] = pole.channels
    with canvas(4.6, 1.1 + 0.38 * len(rows)) as (figure, axes):
        image = axes.imshow(largest, aspect="auto", interpolation="nearest", norm="log", cmap=HEAT, vmin=1, vmax=100)
        axes.set_yticks(range(len(rows)), [_brief(kind) for kind in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        for row, block in zip(*np.nonzero(channels), strict=True):
            axes.plot(block, row, marker="o", markersize=4, color="black", markeredgecolor="white", markeredgewidth=0.7)
        axes.set_xlabel("block")
        axes.set_title(normalizer)
        bar = figure.colorbar(image, ax=axes, label="largest f", pad=0.02, ticks=[1, 10, 100], format="%d")
        bar.outline.set_visible(False)
        near = int((channels > 0).sum())
        description = (
            f"VarP's largest factor by layer with the normalizer {normalizer}: {near} of {np.isfinite(largest).sum()} "
            f"inputs have a channel with a factor of {NEAR_POLE:g} or more."
        )
        return drawing(figure, f"pole-{normalizer}", f"VarP near its pole, {normalizer}", description)


def _brief(kind: str) -> str:
    names: Sequence[str] = [name.removesuffix("_proj") for name in kind.split(", ")]
    return ", ".join(names)


def _percent(share: float, _: int) -> str:
    return f"{100 * share:g}%"


def _powers_of_ten(axes: Any) -> None:
    low, high = axes.get_ylim()
    ticks = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    axes.set_yticks(list(ticks), [f"{10.0**tick:g}" for tick in ticks])
