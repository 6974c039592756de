"""The executor itself: it computes as a GPU does, and detects accesses outside a kernel's tensors."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ace_triton.kernels.backend import interpreting
from tests.ptx.executor import OutOfBounds, executed_as_ptx

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


@triton.jit
def _row_sums(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, size, BLOCK):
        total += tl.load(source_ptr + row * size + first + place, mask=first + place < size, other=0.0)
    tl.store(target_ptr + row, tl.sum(total, 0))


def row_sums(source: torch.Tensor, size: int) -> torch.Tensor:
    sums = torch.zeros(len(source))
    with executed_as_ptx("sm_80") as ran:
        _row_sums[(len(source),)](source, sums, size, BLOCK=128)
    assert ran == ["_row_sums"]
    return sums


def test_sums_over_threads_warps_and_trips():
    source = torch.arange(3 * 301).remainder(50).float().view(3, 301)
    assert torch.equal(row_sums(source, 301), source.sum(1))


def test_an_access_outside_the_tensors_is_an_error():
    with pytest.raises(OutOfBounds, match="which lie in no tensor"):
        row_sums(torch.ones(3, 301), 5000)
