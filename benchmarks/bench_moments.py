"""Operations that read tokens, compared with a plain read and with the published hooks."""

from __future__ import annotations

import pytest
import torch

from ace_triton import ActivationStats
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.moments import moments
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.weighted_squares import weighted_squares
from benchmarks.claims import published
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import Disagreement
from benchmarks.harness.comparison import Comparison, Provider

TESTS = (
    "tests/kernels/test_moments.py",
    "tests/kernels/test_token_norms.py",
    "tests/kernels/test_weighted_squares.py",
    "tests/kernels/test_coupling.py",
)
SHAPES = [
    pytest.param((128, 16, 576), marks=pytest.mark.quick),
    (512, 16, 4096),
    pytest.param((64, 128, 4096), marks=pytest.mark.quick),
    (4, 2048, 4096),
    (2, 2048, 11008),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)), scope="module")
def tokens(request: pytest.FixtureRequest, device: torch.device, tiny: bool) -> torch.Tensor:
    """bfloat16 [n_sequences, length, in_features]."""
    torch.manual_seed(0)
    return torch.randn((4, 8, 48) if tiny else request.param, device=device).bfloat16()


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    if not torch.allclose(ours.double(), theirs.double(), rtol=1e-3):
        raise Disagreement(f"{what} differ from plain torch by more than 0.1 %")


def test_statistics(compare: Compare, tokens: torch.Tensor) -> None:
    """Ours also computes means, variances and the squares of every sequence."""

    def theirs() -> torch.Tensor:
        norms = published.InputNorms(torch.zeros(tokens.shape[2], device=tokens.device))
        norms.add(tokens)
        return norms.mean_square

    def check() -> None:
        close(ActivationStats.from_tokens(tokens).norm.square(), theirs(), "input norms")

    compare(
        Comparison(
            "moments",
            tokens.shape,
            tokens.dtype,
            lambda: moments(tokens),
            (Provider("published hook", theirs), Provider("plain read", lambda: all_finite(tokens))),
            tokens.nbytes,
            check,
        )
    )


def test_token_norms(compare: Compare, tokens: torch.Tensor) -> None:
    flat = tokens.flatten(0, 1)

    def theirs() -> torch.Tensor:
        return flat.float().square().sum(1)

    compare(
        Comparison(
            "token_norms",
            tokens.shape,
            tokens.dtype,
            lambda: token_norms(flat),
            (Provider("torch", theirs), Provider("plain read", lambda: all_finite(tokens))),
            tokens.nbytes,
            lambda: close(token_norms(flat), theirs(), "token norms"),
        )
    )


@pytest.mark.parametrize("n_layers", [1, 3])
def test_weighted_squares(compare: Compare, tokens: torch.Tensor, n_layers: int) -> None:
    flat = tokens.flatten(0, 1)
    weights = torch.rand(n_layers, len(flat), device=tokens.device) + 0.1

    def theirs() -> torch.Tensor:
        return weights @ flat.float().square()

    compare(
        Comparison(
            f"weighted_squares, {n_layers} layer{'s' * (n_layers > 1)}",
            tokens.shape,
            tokens.dtype,
            lambda: weighted_squares(flat, weights),
            (Provider("torch", theirs), Provider("plain read", lambda: all_finite(tokens))),
            tokens.nbytes,
            lambda: close(weighted_squares(flat, weights), theirs(), "weighted squares"),
        )
    )


def test_coupling(compare: Compare, tokens: torch.Tensor) -> None:
    """CosP's matrix for a layer with 512 outputs. It is bound by arithmetic, so bytes are not counted."""
    flat = tokens.flatten(0, 1)[:2048]
    outputs = torch.randn(len(flat), 512, device=tokens.device).bfloat16()
    weights = 1 / (outputs.float().square().sum(1) * len(flat))

    def theirs() -> torch.Tensor:
        return published.cosine_loss(flat, outputs)

    compare(
        Comparison(
            "coupling, 512 outputs",
            tokens.shape,
            tokens.dtype,
            lambda: coupling(flat, outputs, weights),
            (Provider("published GEMM", theirs),),
            0,
            lambda: close(coupling(flat, outputs, weights), theirs(), "coupling matrices"),
        )
    )
