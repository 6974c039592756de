"""Launch sizes that depend on the GPU: how they are chosen, and that results do not depend on them."""

from __future__ import annotations

import math

import pytest
import torch

from ace_triton.kernels import launch, launch_sums
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.moments import moments, moments_reference
from ace_triton.kernels.weight_sums import weight_sums, weight_sums_reference
from ace_triton.kernels.weighted_squares import weighted_squares, weighted_squares_reference

GPUS = {"T4": 40, "A100": 108, "H100": 132, "RTX 5090": 170, "MI300X": 304}
"""Numbers of multiprocessors."""


@pytest.fixture
def gpu_of(monkeypatch):
    """gpu_of(n): launchers choose sizes for a GPU with n multiprocessors."""
    return lambda n: monkeypatch.setattr(launch, "multiprocessors", lambda device: n)


def test_sizes_stay_the_same_without_a_gpu():
    assert launch.multiprocessors(torch.device("cpu")) is None
    assert launch_sums.sum_warps(torch.device("cpu")) == 1024


@pytest.mark.parametrize("multiprocessors", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("shape", [(4096, 11008), (14336, 4096)])
def test_every_multiprocessor_has_its_share_of_a_weight(gpu_of, multiprocessors, shape):
    gpu_of(multiprocessors)
    tile = launch_sums.weight_sums(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    across = math.ceil(shape[1] / (tile.pieces * tile.block_cols))
    programs = across * math.ceil(shape[0] / (tile.block_rows * tile.trips))
    assert 1.5 * multiprocessors <= programs * tile.num_warps / 8 <= 2 * multiprocessors


@pytest.mark.parametrize("multiprocessors", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("shape", [(1, 16384, 4096), (8, 2048, 4096)])
def test_every_multiprocessor_has_its_share_of_a_batch(gpu_of, multiprocessors, shape):
    """At most four programs, which even the smallest of these GPUs runs at once."""
    gpu_of(multiprocessors)
    tile = launch_sums.moments(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    parts = math.ceil(shape[0] / tile.sequences) * math.ceil(shape[1] / tile.chunk)
    programs = parts * math.ceil(shape[2] / tile.block_cols)
    assert multiprocessors <= programs * tile.num_warps / 8 <= 4 * multiprocessors


@pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="the CPU library has no launches")
@pytest.mark.parametrize("multiprocessors", [1, 7, 304])
def test_sums_do_not_depend_on_the_gpu_but_for_rounding(gpu_of, make_matrix, multiprocessors):
    gpu_of(multiprocessors)
    weight = make_matrix(200, 300, torch.bfloat16)
    for got, expected in zip(weight_sums(weight), weight_sums_reference(weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    shares = weight[:3].float().abs()
    expected = weighted_squares_reference(weight.t(), shares[:, :300])
    torch.testing.assert_close(weighted_squares(weight.t(), shares[:, :300]), expected, rtol=1e-5, atol=0)
    tokens = make_matrix(300, 40, torch.float32).reshape(2, 150, 40) + 5
    got, expected = moments(tokens), moments_reference(tokens)
    for name in ("total", "deviation", "sequence_square"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-4)
