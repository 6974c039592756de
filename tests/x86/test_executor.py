"""The executor itself: it detects accesses outside a kernel's tensors."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ace_triton.kernels.backend import interpreting
from tests.x86.executor import OutOfBounds, executed_on_x86

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are not compiled in the interpreter")


@triton.jit
def _copy(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(target_ptr + place, tl.load(source_ptr + place, mask=place < size), mask=place < size)


@triton.jit
def _fill(target_ptr, first, BLOCK: tl.constexpr):
    tl.store(target_ptr + first + tl.arange(0, BLOCK), 1.0)


def copy(source: torch.Tensor, target: torch.Tensor, size: int) -> None:
    with executed_on_x86():
        _copy[(1,)](source, target, size, BLOCK=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_copies(dtype):
    source, target = torch.arange(50).to(dtype), torch.zeros(50, dtype=dtype)
    copy(source, target, 50)
    assert torch.equal(source, target)


@pytest.mark.parametrize("size", [16, 13])
def test_writes_beside_a_tensor_are_seen(size):
    with pytest.raises(OutOfBounds):
        copy(torch.zeros(64), torch.zeros(size), size + 1)


def test_writes_before_a_tensor_are_seen():
    with pytest.raises(OutOfBounds), executed_on_x86():
        _fill[(1,)](torch.zeros(16), -1, BLOCK=16)


def test_reads_beside_a_tensor_are_seen():
    with pytest.raises(OutOfBounds):
        copy(torch.zeros(16), torch.zeros(64), 17)


def test_new_memory_is_poisoned():
    with executed_on_x86():
        assert torch.empty(8).isnan().all()
        assert (torch.empty(8, dtype=torch.uint8) == 255).all()
