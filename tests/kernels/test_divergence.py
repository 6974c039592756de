"""divergence against the fp64 reference, and the reference against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.divergence import divergence, divergence_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 300 if interpreting() else 3000


def make_logits(n_tokens: int, vocabulary: int, dtype: torch.dtype, spread: float = 4.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n_tokens, vocabulary, generator=generator) + seed).to(dtype)


def check(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    """Losses agree to the fp32 rounding of sums with mixed signs, gradients to the rounding of their dtype."""
    loss, gradient = divergence(logits, wanted)
    exact = divergence_reference(logits, wanted)
    assert loss.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(loss, exact.loss, rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(gradient.double(), exact.gradient, rtol=max(rounding, 1e-4), atol=1e-7)


@given(
    tokens=st.integers(0, 8),
    vocabulary=st.integers(1, MOST),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    spread=st.floats(0.0, 30.0),
    seed=st.integers(0, 1000),
)
def test_equals_reference(tokens, vocabulary, dtypes, spread, seed):
    check(
        make_logits(tokens, vocabulary, dtypes[0], spread, seed),
        make_logits(tokens, vocabulary, dtypes[1], spread, seed + 1),
    )


@given(tokens=st.integers(1, 5), vocabulary=st.integers(1, 50), spread=st.floats(0.1, 8.0), seed=st.integers(0, 1000))
def test_the_reference_is_the_definition_and_its_derivative(tokens, vocabulary, spread, seed):
    logits, wanted = (make_logits(tokens, vocabulary, torch.float64, spread, seed + k) for k in (0, 1))
    p, q = wanted.softmax(-1), logits.requires_grad_().softmax(-1)
    loss = (p * (p.log() - q.log())).sum(-1)
    loss.sum().backward()
    found = divergence_reference(logits, wanted)
    torch.testing.assert_close(found.loss, loss.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient, logits.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_block(dtype):
    check(make_logits(3, 9001, dtype), make_logits(3, 9001, dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_lie_over_the_logits(dtype):
    logits, wanted = make_logits(4, 1000, dtype), make_logits(4, 1000, dtype, seed=1)
    expected = divergence(logits, wanted)
    loss, gradient = divergence(logits, wanted, into=logits)
    assert gradient is logits
    assert torch.equal(loss, expected.loss)
    assert torch.equal(gradient, expected.gradient)


@pytest.mark.parametrize("layout", ["row stride", "transposed"])
def test_any_strides(layout):
    logits, wanted = (make_logits(60, 70, torch.bfloat16, seed=seed) for seed in (0, 1))
    view = {"row stride": lambda of: of[:, 3:50], "transposed": lambda of: of.t()}[layout]
    check(view(logits), view(wanted))
    check(view(logits).contiguous(), view(wanted))


def test_equal_logits_diverge_nowhere():
    logits = make_logits(5, 500, torch.float32, spread=30.0)
    loss, gradient = divergence(logits, logits.clone())
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_a_constant_on_all_logits_changes_little(level):
    check(make_logits(2, 300, torch.float32) + level, make_logits(2, 300, torch.float32, seed=1))


def test_what_is_excluded():
    """A token that the teacher excludes adds nothing; one that only the student excludes makes the loss infinite."""
    excluded = -torch.inf
    logits = torch.tensor([[1.0, 2.0, excluded], [1.0, 2.0, 0.0], [1.0, excluded, 0.0]])
    wanted = torch.tensor([[0.5, 0.0, excluded], [0.5, excluded, 0.0], [0.5, 0.0, 0.0]])
    check(logits, wanted)
    loss, gradient = divergence(logits, wanted)
    assert loss.isfinite().tolist() == [True, True, False]
    assert gradient.isfinite().all()


def test_a_word_that_both_exclude_counts_nothing():
    logits, wanted = torch.tensor([[0.0, 1.0, -1e30]]), torch.tensor([[1.0, 0.0, -1e30]])
    whole, without = divergence(logits, wanted), divergence(logits[:, :2], wanted[:, :2])
    assert torch.equal(whole.loss, without.loss)
    assert torch.equal(whole.gradient, torch.nn.functional.pad(without.gradient, (0, 1)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 299])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_a_number_is_seen(bad, place, side):
    rows = make_logits(3, 300, torch.float32), make_logits(3, 300, torch.float32, seed=1)
    rows[side][1, place] = bad
    loss, _ = divergence(*rows)
    assert loss.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(3)), "must both be"),
        ((torch.ones(3, 4), torch.ones(3, 5)), "must both be"),
        ((torch.ones(3, 0), torch.ones(3, 0)), "must both be"),
        ((torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4).bfloat16()), "into must have"),
        ((torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, 3).t()), "into must have"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)
