"""Memory of mapped files and of loaded models."""

import mmap
import os
import time

import pytest
import torch
from torch import nn

from ace_triton.process_memory import few_pages_of, map_file, own_memory, resident_bytes

SIZE = 2**26


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as opened:
        opened.write(b"1" * SIZE)
        opened.flush()
        os.fsync(opened.fileno())  # Pages that are not on disk yet cannot leave memory.
    return path


def test_pages_that_were_read_leave_memory_and_keep_their_values(file):
    """Also the values that were written to a private map."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), SIZE, mmap.MAP_PRIVATE) as private:
        values = torch.frombuffer(private, dtype=torch.uint8)
        values[0] = 7
        before = resident_bytes()
        total = int(values[::1024].sum())
        assert resident_bytes() - before > SIZE // 2
        with few_pages_of([file]):
            deadline = time.monotonic() + 10
            while resident_bytes() - before > SIZE // 4 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert resident_bytes() - before < SIZE // 4
        assert int(values[::1024].sum()) == total == SIZE // 1024 * ord("1") + 7 - ord("1")
        del values


def test_only_views_of_a_larger_memory_are_copied(file):
    shared = torch.empty(0, dtype=torch.float32, device="cpu").set_(map_file(file, SIZE), 0, (4, 4))
    model = nn.Module()
    model.view, model.alone = (nn.Parameter(tensor, requires_grad=False) for tensor in (shared, torch.ones(4, 4)))
    places = [parameter.data_ptr() for parameter in (model.view, model.alone)]
    own_memory(model)
    assert model.view.data_ptr() != places[0]
    assert torch.equal(model.view.data, shared)
    assert model.alone.data_ptr() == places[1]
