"""The optimiser of recovery: what moves, by how much, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton.solvers.kept_adamw import LEAST_SCALE, KeptAdamW


def parameters() -> dict[str, nn.Parameter]:
    """A pruned matrix, a bias of zeros and a norm."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(6, 8, generator=generator) * (torch.arange(8) % 2)
    return {
        "matrix": nn.Parameter(matrix),
        "bias": nn.Parameter(torch.zeros(6)),
        "norm": nn.Parameter(torch.full((8,), 2.0)),
    }


def give_gradients(trained: dict[str, nn.Parameter], times: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in trained.values():
        parameter.grad = times * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_step_goes_as_far_as_the_rate_says(dtype):
    trained = parameters()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = KeptAdamW(trained, dtype)
    give_gradients(trained)
    optimizer.step(0.1, 1.0)
    scales = {
        "matrix": float(before["matrix"][before["matrix"] != 0].square().mean().sqrt()),
        "bias": LEAST_SCALE,
        "norm": 2.0,
    }
    for name, parameter in trained.items():
        moved = (optimizer.values[name] - before[name]).abs()
        moves = torch.ones_like(moved, dtype=torch.bool) if parameter.dim() == 1 else before[name] != 0
        torch.testing.assert_close(moved[moves], torch.full_like(moved[moves], 0.1 * scales[name]), rtol=1e-3, atol=0.0)
        assert not moved[~moves].any()
        assert parameter.dtype == dtype
        assert torch.equal(parameter.detach(), optimizer.values[name].to(dtype))
        assert parameter.grad is None


def test_gradients_are_cut_to_a_norm_together():
    trained, other = parameters(), parameters()
    one, two = KeptAdamW(trained, torch.float32), KeptAdamW(other, torch.float32)
    for times in (1.0, 50.0):  # the second step of one follows a gradient fifty times as large as the first
        give_gradients(trained, times)
        give_gradients(other)
        one.step(0.1, 1e-3)
        two.step(0.1, 1e-3)
    for name, values in one.values.items():
        torch.testing.assert_close(values, two.values[name], rtol=1e-4, atol=1e-7)
    give_gradients(trained, 50.0)
    give_gradients(other)
    one.step(0.1, 1e6)
    two.step(0.1, 1e6)
    assert not torch.allclose(one.values["matrix"], two.values["matrix"], rtol=1e-3)


def test_what_has_no_gradient_waits():
    """An expert that no token reached: it neither moves nor counts a step."""
    trained, whole = parameters(), parameters()
    optimizer, other = KeptAdamW(trained, torch.float32), KeptAdamW(whole, torch.float32)
    before = trained["matrix"].detach().clone()
    give_gradients(trained)
    trained["matrix"].grad = None
    optimizer.step(0.1, 1e6)
    assert torch.equal(trained["matrix"], before)
    for parameters_of, stepping in ((trained, optimizer), (whole, other)):
        give_gradients(parameters_of)
        stepping.step(0.1, 1e6)
    assert torch.equal(trained["matrix"], whole["matrix"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_goes_on_from_its_state(dtype):
    trained, resumed = parameters(), parameters()
    optimizer = KeptAdamW(trained, dtype)
    give_gradients(trained)
    optimizer.step(0.1, 1.0)
    again = KeptAdamW(resumed, dtype)
    again.load_state_dict(optimizer.state_dict())
    for some, stepping in ((trained, optimizer), (resumed, again)):
        give_gradients(some, 0.3)
        stepping.step(0.05, 1.0)
    for name, values in optimizer.values.items():
        assert torch.equal(values, again.values[name])
        assert torch.equal(trained[name], resumed[name])
