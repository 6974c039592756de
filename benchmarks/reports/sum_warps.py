"""How many warps a sum wants on this GPU: moments and weight_sums, timed with more and with fewer.

python -m benchmarks.reports.sum_warps [--dry-run]

The launchers take ``launch_sums.SUM_WARPS`` on each multiprocessor, which machine code alone argues for.
"""

from __future__ import annotations

from typing import Annotated
from unittest import mock

import torch
import typer

from ace_triton.kernels import launch_sums
from ace_triton.kernels.moments import moments
from ace_triton.kernels.weight_sums import weight_sums

from ..harness.timer import Stopwatch

WARPS = (8, 16, 24, 32)
SHAPES = ((4096, 4096), (4096, 11008), (8, 2048, 4096), (1, 2048, 4096))
CALLS = 20


def microseconds(tensor: torch.Tensor, warps: int, stopwatch: Stopwatch) -> float:
    """Of the fastest of CALLS, after one that compiles."""
    operation = weight_sums if tensor.dim() == 2 else moments
    with mock.patch.object(launch_sums, "SUM_WARPS", warps):
        operation(tensor)
        return min(stopwatch.time(lambda: operation(tensor)) for _ in range(CALLS)) * 1e6


def main(dry_run: Annotated[bool, typer.Option("--dry-run", help="On a CPU, with small inputs.")] = False) -> None:
    """Print a line for each shape: microseconds by warps on each multiprocessor."""
    device = torch.device("cpu" if dry_run else "cuda")
    stopwatch = Stopwatch(device)
    print("shape, bf16", *(f"{warps} warps" for warps in WARPS), sep="\t")
    for shape in SHAPES:
        sizes = [size // 64 + 1 for size in shape] if dry_run else shape
        tensor = torch.randn(sizes, device=device).bfloat16()
        times = [microseconds(tensor, warps, stopwatch) for warps in WARPS]
        print(" x ".join(map(str, sizes)), *(f"{one:.1f}" for one in times), sep="\t")


if __name__ == "__main__":
    typer.run(main)
