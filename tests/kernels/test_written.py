"""Autograd notices in-place writes of an operation: a backward pass that needs the old numbers raises an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.cosp_select import cosp_select
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.gram_product import gram_product
from ace_triton.kernels.pack_nm import pack_nm
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.unpack_nm import unpack_nm

SIZE = 8


def take_step(written: torch.Tensor, role: str) -> None:
    roles = {name: torch.ones(SIZE, SIZE, device=written.device) for name in ("values", "first", "second", "rounded")}
    roles[role] = written
    moments = GradientMoments(roles["first"], roles["second"])
    adamw(roles["values"], moments, torch.ones_like(written), Step(0.1, 1), rounded=roles["rounded"])


def cosp(weight: torch.Tensor) -> None:
    tokens = torch.ones_like(weight)
    cosp_select(weight, ScoreTerms(), tokens, tokens, tokens[0].clone(), 2, 4)


def unpack(into: torch.Tensor) -> None:
    unpack_nm(pack_nm(torch.zeros_like(into), 2, 4), into=into)


WRITERS: dict[str, Callable[[torch.Tensor], object]] = {
    "select_nm": lambda weight: select_nm(weight, ScoreTerms(), 2, 4),
    "select_nm of a view": lambda weight: select_nm(weight.view(4, 16), ScoreTerms(), 2, 4),
    "select_nm, transposed": lambda weight: select_nm(weight.t(), ScoreTerms(), 2, 4),
    "select_rows": lambda weight: select_rows(weight, ScoreTerms(), 3),
    "select_rows of a layer": lambda weight: select_rows(weight, ScoreTerms(), 3, scope="layer"),
    "cosp_select": cosp,
    "adamw's values": lambda values: take_step(values, "values"),
    "adamw's first moments": lambda values: take_step(values, "first"),
    "adamw's second moments": lambda values: take_step(values, "second"),
    "adamw's rounded copy": lambda values: take_step(values, "rounded"),
    "round_groups' into": lambda values: round_groups(torch.ones_like(values), 8, 32, torch.float32, into=values),
    "divergence": lambda logits: divergence(logits, torch.zeros_like(logits), into=logits),
    "coupling": lambda matrix: coupling(
        torch.ones_like(matrix), torch.ones_like(matrix), torch.ones_like(matrix[0]), into=matrix
    ),
    "unpack_nm": unpack,
    "gram_product": lambda matrix: gram_product(torch.ones_like(matrix).bfloat16(), into=matrix),
}


@pytest.fixture(params=["own", "reference"])
def backend(request, monkeypatch):
    """The device's own backend, and plain torch."""
    if request.param == "reference":
        monkeypatch.setenv("ACE_TRITON_BACKEND", "reference")


@pytest.mark.parametrize("name", WRITERS)
def test_backward_through_what_was_overwritten_raises(device, backend, name):
    written = torch.rand(SIZE, SIZE, device=device)
    inputs = torch.ones(SIZE, SIZE, device=device, requires_grad=True)
    loss = (inputs * written).sum()
    WRITERS[name](written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("output", ["mask", "bits"])
def test_what_is_only_read_can_be_used_again(device, output):
    read = torch.rand(SIZE, SIZE, device=device)
    inputs = torch.ones(SIZE, SIZE, device=device, requires_grad=True)
    loss = (inputs * read).sum()
    select_nm(read, ScoreTerms(), 2, 4, output=output)
    select_rows(read, ScoreTerms(), 3, output=output)
    pack_nm(select_nm(read.clone(), ScoreTerms(), 2, 4), 2, 4)
    loss.backward()
    assert torch.equal(inputs.grad, read)


@pytest.mark.parametrize("name", WRITERS)
def test_tensors_of_inference_mode_are_written_too(device, name):
    with torch.inference_mode():
        written = torch.full((SIZE, SIZE), 0.5, device=device)
        before = written.clone()
        WRITERS[name](written)
        assert not torch.equal(written, before)
