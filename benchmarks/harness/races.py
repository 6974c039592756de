"""Run the kernels whose warps share memory under NVIDIA's race detector.

python -m benchmarks.harness.races

Needs ``compute-sanitizer``, which comes with the CUDA toolkit; without it nothing is checked, and it says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Annotated

import torch
import typer

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.nm_linear_mma import fragments_of, nm_linear_mma
from ace_triton.kernels.pack_nm import pack_scored
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm_group import select_nm_group
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.weight_sums import weight_sums
from ace_triton.kernels.weight_sums_group import group_relative_importance

TOOL = ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1")


def run_kernels(device: torch.device) -> None:
    """Each once, at a small size."""
    weight = torch.randn(128, 512, device=device).bfloat16()
    tokens = torch.randn(40, 512, device=device).bfloat16()
    packed = pack_scored(weight, ScoreTerms(), 2, 4)
    for rows in (1, 16, 40):
        nm_linear(tokens[:rows], packed)
        nm_linear_mma(tokens[:rows], packed, fragments_of(packed))
    moments(tokens.reshape(2, 20, 512))
    moments(tokens, torch.arange(40, device=device) > 3)
    weight_sums(weight)
    group_relative_importance([weight, weight[:64]])
    select_nm_group([weight.clone(), weight[:64].clone()], [ScoreTerms(), ScoreTerms()], 2, 4)
    coupling(tokens, tokens[:, :128], torch.ones(40, device=device))
    select_rows(weight.clone(), ScoreTerms(), 100)
    select_rows(weight.clone(), ScoreTerms(), 100, scope="layer")
    values, first, second = torch.randn(3, 128, 512, device=device)
    adamw(values, GradientMoments(first, second), weight, Step(0.1, 1), rounded=weight.clone())
    round_groups(values, 8, 128, torch.bfloat16, weight)


def main(
    run: Annotated[bool, typer.Option("--run", help="Run the kernels themselves, on a GPU if there is one.")] = False,
) -> None:
    """Run this module once more, inside the detector."""
    if run:
        run_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if shutil.which(TOOL[0]) is None or not torch.cuda.is_available():
        print(f"nothing was checked: {TOOL[0]} or a GPU is missing")
        return
    raise typer.Exit(subprocess.run([*TOOL, sys.executable, "-m", "benchmarks.harness.races", "--run"]).returncode)


if __name__ == "__main__":
    typer.run(main)
