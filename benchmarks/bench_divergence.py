"""The loss of recovery and its gradient, compared with torch."""

from __future__ import annotations

import pytest
import torch

from ace_triton.kernels.divergence import divergence
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider

TESTS = ("tests/kernels/test_divergence.py",)
SHAPES = [pytest.param((170, 49152), marks=pytest.mark.quick), (512, 131072)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_divergence(compare: Compare, shape: tuple[int, int], device: torch.device, tiny: bool) -> None:
    torch.manual_seed(0)
    logits, wanted = (4 * torch.randn(2, *((3, 100) if tiny else shape), device=device)).bfloat16()
    gradient = torch.empty_like(logits)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        log_q, log_p = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), log_q.exp().sub_(p).to(logits.dtype)

    def check() -> None:
        for ours, torchs in zip(divergence(logits, wanted, into=gradient), theirs(), strict=True):
            if not torch.allclose(ours.float(), torchs.float(), rtol=1e-2, atol=1e-6):
                raise Disagreement("losses or gradients differ from torch's by more than 1 %")

    compare(
        Comparison(
            "divergence",
            tuple(logits.shape),
            logits.dtype,
            lambda: divergence(logits, wanted, into=gradient),
            (Provider("torch", theirs),),
            3 * logits.nbytes,
            check,
        )
    )
