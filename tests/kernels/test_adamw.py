"""adamw against the fp64 reference, and the reference against torch's optimizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton.kernels.adamw import GradientMoments, Step, adamw, adamw_reference
from ace_triton.kernels.backend import interpreting

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 3000 if interpreting() else 100_000


def make(size: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, GradientMoments, torch.Tensor]:
    """Values of which half are 0, moments that are 0 at the same places, and a gradient without zeros."""
    generator = torch.Generator().manual_seed(seed)
    values, first, second, gradient = torch.randn(4, size, generator=generator)
    kept = torch.rand(size, generator=generator) < 0.5
    return (
        values * kept,
        GradientMoments(first * kept * 1e-3, second.square() * kept * 1e-6),
        (gradient * 1e-3).to(dtype),
    )


def check(values, moments, gradient, step, rounded=None, **options):
    """Moments agree to fp32 rounding, values to the rounding of the value."""
    old = values.double()
    exact, exact_moments = adamw_reference(values, moments, gradient, step, **options)
    adamw(values, moments, gradient, step, rounded=rounded, **options)
    assert bool(((values - exact).abs() <= 2e-7 * old.abs() + 1e-5 * (exact - old).abs()).all())
    torch.testing.assert_close(moments.first.double(), exact_moments.first, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(moments.second.double(), exact_moments.second, rtol=1e-5, atol=1e-15)
    if rounded is not None and interpreting():  # the interpreter's cast to 16 bits truncates
        torch.testing.assert_close(rounded.float(), values, rtol=torch.finfo(rounded.dtype).eps, atol=1e-7)
    elif rounded is not None:
        assert torch.equal(rounded, values.to(rounded.dtype))


@given(
    size=st.integers(0, MOST),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from((None, *DTYPES))),
    number=st.integers(1, 5000),
    factor=st.sampled_from((None, 0.0, 0.3)),
    zeros_stay=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(size, dtypes, number, factor, zeros_stay, seed):
    values, moments, gradient = make(size, dtypes[0], seed)
    rounded = None if dtypes[1] is None else torch.full((size,), torch.nan, dtype=dtypes[1])
    times = None if factor is None else torch.tensor(factor)
    step = Step(1e-3, number, (0.9, 0.95))
    check(values, moments, gradient, step, rounded, factor=times, zeros_stay=zeros_stay)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_many_steps_are_those_of_torch(betas):
    values, _, _ = make(700, torch.float32)
    moments, theirs = GradientMoments.like(values), values.double().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], betas=betas, weight_decay=0.0)
    for number in range(1, 30):
        gradient = make(700, torch.float32, seed=number)[2]
        rate = 1e-2 / number
        optimizer.param_groups[0]["lr"], theirs.grad = rate, gradient.double()
        optimizer.step()
        adamw(values, moments, gradient, Step(rate, number, betas), zeros_stay=False)
    torch.testing.assert_close(values.double(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_zero_stays_zero_whatever_its_gradient():
    values, _, gradient = make(999, torch.bfloat16)
    moments, pruned = GradientMoments.like(values), values == 0
    gradient[pruned.nonzero()[::3, 0]] = torch.inf
    gradient[pruned.nonzero()[::5, 0]] = torch.nan
    rounded = values.bfloat16()
    for number in range(1, 6):
        adamw(values, moments, gradient, Step(0.1, number), rounded=rounded)
    assert torch.equal(values == 0, pruned)
    for tensor in (rounded, moments.first, moments.second):
        assert not tensor[pruned].any()
        assert tensor[~pruned].all()


def test_what_is_not_a_number_is_seen():
    values, moments, gradient = make(300, torch.float32)
    place = int(values.nonzero()[7, 0])
    gradient[place] = torch.nan
    adamw(values, moments, gradient, Step(0.1, 1))
    assert (~values.isfinite()).nonzero().flatten().tolist() == [place]


def test_any_number_of_dimensions():
    values, moments, gradient = make(6 * 35, torch.float32)
    shape = (2, 3, 35)
    check(
        values.view(shape),
        GradientMoments(moments.first.view(shape), moments.second.view(shape)),
        gradient.view(shape),
        Step(0.1, 1),
    )


def of_ones(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.ones(3, 4) for name in ("values", "first", "second", "gradient")} | changed


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (of_ones(values=torch.ones(3, 4).bfloat16()), "values must be fp32"),
        (of_ones(second=torch.ones(3, 4).double()), "second moments must be fp32"),
        (of_ones(gradient=torch.ones(4, 3)), "gradient must be contiguous and of the values' shape"),
        (of_ones(gradient=torch.ones(4, 3).t()), "gradient must be contiguous"),
        (of_ones(rounded=torch.ones(12)), "rounded copy must be contiguous and of the values' shape"),
        (of_ones(factor=torch.ones(2)), "factor must be fp32 with one element"),
        (of_ones(factor=torch.ones(1).double()), "factor must be fp32 with one element"),
    ],
)
def test_says_what_is_wrong(tensors, message):
    moments = GradientMoments(tensors.pop("first"), tensors.pop("second"))
    values, gradient = tensors.pop("values"), tensors.pop("gradient")
    with pytest.raises(ValueError, match=message):
        adamw(values, moments, gradient, Step(0.1, 1), **tensors)


@pytest.mark.parametrize(
    "words", [{"rate": -1.0, "number": 1}, {"rate": 1.0, "number": 0}, {"rate": 1.0, "number": 1, "betas": (0.9, 1.0)}]
)
def test_steps_that_will_not_do(words):
    with pytest.raises(ValueError, match="an optimizer step needs"):
        Step(**words)
