"""A small calibration set, and runs that end early."""

import pytest
import torch

from ace_triton.streaming.file_store import FileStore
from tests.streaming.whole_runs import Stop


@pytest.fixture
def tiny_ids():
    return torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stopped_after(monkeypatch):
    """stopped_after(units): the run ends once the journal has this many units, before the next is pruned."""
    finish = FileStore.finish

    def arm(units):
        done = 0

        def stopping(self, *args):
            nonlocal done
            if done == units:
                raise Stop
            done += 1
            finish(self, *args)
            self.wait()

        monkeypatch.setattr(FileStore, "finish", stopping)

    yield arm
    monkeypatch.undo()
