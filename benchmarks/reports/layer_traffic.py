"""Bytes and launches of pruning one layer by each method, for the report on traffic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from ace_triton import ActivationStats, prune_linear
from ace_triton.kernels import launch_sums
from ace_triton.methods.registry import metric
from benchmarks.harness.traffic_counter import Counter, Traffic

# Sums write partial sums, and how many depends on the size of the whole. So sums are counted over the share that a few
# programs have of a layer or of a batch of tokens, with the block sizes that the launchers choose for the whole.
LAYER, LAYER_SHARE = (4096, 11008), (752, 2048)

LAYER_METHODS = ("magnitude", "wanda", "stade", "ria", "saap", "cosp", "varp", "ace", "ace-paper", "dass")


@contextmanager
def planned_for(plan: str, whole: tuple[int, ...]) -> Iterator[None]:
    """Inside, launches use the block sizes that the function ``plan`` of ``launch_sums`` gives for tensors of shape
    ``whole``."""
    planned = getattr(launch_sums, plan)

    def of_whole(tensor: torch.Tensor) -> object:
        return planned(torch.empty(whole, dtype=tensor.dtype, device="meta"))

    with mock.patch.object(launch_sums, plan, of_whole):
        yield


@dataclass(frozen=True)
class LayerRow:
    """Total traffic of :func:`~ace_triton.prune_linear` on a layer.

    Attributes:
        method: name of the method.
        first: for the first layer of an input, including the vectors that layers of one input share.
        further: for another layer of the same input.
        elements: number of weights.
        least: bytes that any implementation must move.
    """

    method: str
    first: Traffic
    further: Traffic
    elements: int
    least: int

    @property
    def ratio(self) -> float:
        """Distinct bytes of a further layer over the fewest possible."""
        return (self.further.read + self.further.written) / self.least


def rows_of_layers(dtype: torch.dtype = torch.bfloat16) -> list[LayerRow]:
    """Every metric at 2:4, on newly collected statistics."""
    torch.manual_seed(0)
    rows, cols = LAYER_SHARE
    tokens = torch.randn(16, 8, cols).to(dtype)
    found = []
    for method in LAYER_METHODS:
        layers = [nn.Linear(cols, rows, bias=False, dtype=dtype) for _ in range(2)]
        first, other = (ActivationStats.from_tokens(tokens, layer=layer, reduce="abs") for layer in layers)
        first.consumer_norm = torch.rand(rows) if method == "dass" else None
        further = first.with_outputs(other.outputs)
        counts = []
        with planned_for("weight_sums", LAYER):
            for layer, stats in zip(layers, (first, further), strict=True):
                with Counter().counting() as traffic:
                    prune_linear(layer, stats, method)
                counts.append(traffic)
        coupling = 4 if metric(method).needs(metric(method).options).reduce else 0
        least = (2 * dtype.itemsize + coupling) * rows * cols
        found.append(LayerRow(method, counts[0], counts[1], rows * cols, least))
    return found


def layer_lines(rows: list[LayerRow]) -> Iterator[str]:
    """The Markdown table of :func:`rows_of_layers`."""
    yield "## prune_linear at 2:4, in total"
    yield ""
    yield (
        f"Newly collected statistics; a weight of {LAYER_SHARE[0]} x {LAYER_SHARE[1]} with the block sizes chosen for "
        f"{LAYER[0]} x {LAYER[1]}. A metric that sums the weight finds NaN and infinity in its sums. For the others, "
        "one more launch reads the weight first, so that a weight with NaN stays unchanged. (prune_model checks all "
        "weights before it changes any, and sums them in the same read; it needs one launch less here.) ace-paper and "
        "dass check their coupling matrix and row vector in the same launch; prune_model also has a launch for these. "
        "The selection reads the flag of the check on the GPU, so the host waits only after it; prune_model waits "
        "twice per block. In brackets: the first layer of an input, with the vectors that layers of one input share "
        "(q, k and v; gate and up)."
    )
    yield ""
    yield "| method | launches | bytes per weight | issued | over the fewest |"
    yield "|---|---:|---:|---:|---:|"
    for row in rows:
        moved, issued = (row.further.read + row.further.written) / row.elements, row.further.issued / row.elements
        launches = f"{row.further.launches} ({row.first.launches})"
        yield f"| {row.method} | {launches} | {moved:.2f} | {issued:.2f} | {row.ratio:.2f} |"
    yield ""
