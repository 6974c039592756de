"""A step of recovery's optimizer, compared with torch's plus a mask, gradient clipping and a cast."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ("tests/kernels/test_adamw.py",)
SHAPES = [pytest.param((1536, 576), marks=pytest.mark.quick), (4096, 11008)]
RATE, BETAS = 1e-4, (0.9, 0.95)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_adamw(compare: Compare, shape: tuple[int, int], device: torch.device, tiny: bool) -> None:
    torch.manual_seed(0)
    start, gradient, zeros = torch.randn(3, *((3, 100) if tiny else shape), device=device)
    mask, gradient, factor = zeros > 0, gradient.bfloat16(), torch.tensor(0.3, device=device)
    ours, rounded = start * mask, gradient.clone()
    moments = GradientMoments.like(ours)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    taken = 0

    def step() -> torch.Tensor:
        nonlocal taken
        taken += 1
        adamw(ours, moments, gradient, Step(RATE, taken, BETAS), factor=factor, rounded=rounded)
        return rounded

    def step_of_torch() -> torch.Tensor:
        theirs.grad = gradient.float().mul_(mask).mul_(factor)
        optimizer.step()
        return theirs.detach().to(gradient.dtype)

    def check() -> None:
        if not torch.allclose(step().float(), step_of_torch().float(), rtol=1e-2, atol=1e-6):
            raise Disagreement("the first steps differ by more than the rounding to bf16")

    moved = 6 * ours.nbytes + 2 * gradient.nbytes
    compare(
        Comparison("adamw", tuple(ours.shape), gradient.dtype, step, (Provider("torch", step_of_torch),), moved, check)
    )
