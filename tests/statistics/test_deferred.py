"""Statistics whose numbers stay on the device, as on a GPU: collecting them does not wait."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ace_triton import ActivationStats, StatsError
from ace_triton.statistics.outputs import OutputStats, update_outputs


class Reads(TorchDispatchMode):
    """Counts numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deferred(monkeypatch):
    """Numbers are not read while collecting, as on a GPU."""
    for module in ("outputs", "batch"):
        monkeypatch.setattr(f"ace_triton.statistics.{module}.is_on_cpu", lambda tensor: False)


def collected(reduce: str | None) -> tuple[list[OutputStats], int]:
    """Statistics of two layers, and the number of reads.

    Some tokens have outputs of 0 and get no weight; in the first batch, all tokens of the first layer.
    """
    generator = torch.Generator().manual_seed(0)
    stats = [OutputStats(reduce) for _ in range(2)]
    reads = Reads()
    for batch in range(4):
        tokens = torch.randn(2, 11, 12, generator=generator) * 10.0**batch
        outputs = [torch.randn(2, 11, 5, generator=generator) * 10.0**-batch for _ in stats]
        outputs[1][0, batch] = 0
        if batch == 0:
            outputs[0].zero_()
        valid = None if batch % 2 else torch.rand(2, 11, generator=generator) < 0.7
        with reads:
            update_outputs(stats, tokens, outputs, valid)
    return stats, reads.count


@pytest.mark.parametrize("reduce", [None, "abs", "rms"])
def test_nothing_is_read_and_the_numbers_are_the_same(monkeypatch, reduce):
    at_once, reads = collected(reduce)
    assert reads > 0
    monkeypatch.setattr("ace_triton.statistics.outputs.is_on_cpu", lambda tensor: False)
    later, reads = collected(reduce)
    assert reads == 0
    for now, then in zip(at_once, later, strict=True):
        assert (type(then.count), type(then.unit)) == (int, float)
        assert (now.count, now.unit) == (then.count, then.unit)
        assert torch.equal(now.weighted_square, then.weighted_square)
        assert reduce is None or torch.equal(now.matrix, then.matrix)
        now.merge(then)
        assert now.count == 2 * then.count


@pytest.mark.parametrize(
    "use",
    [
        lambda stats: stats.outputs.count,
        lambda stats: stats.outputs.mean_weighted_square(),
        lambda stats: stats.outputs.relative_coupling(),
        lambda stats: stats.outputs.merge(OutputStats("abs", 1, 1.0, torch.ones(8), torch.ones(3, 8))),
        lambda stats: stats.to("cpu"),
        lambda stats: stats.save("nowhere/stats.safetensors"),
    ],
    ids=["count", "vector", "matrix", "merge", "to", "save"],
)
def test_outputs_that_are_not_finite_are_refused_when_they_are_used(deferred, use):
    tokens, outputs = torch.ones(4, 8), torch.ones(4, 3)
    stats = ActivationStats(8, outputs=OutputStats("abs"))
    stats.update(tokens, outputs=outputs)
    outputs[2, 1] = torch.inf
    stats.update(tokens, outputs=outputs)
    stats.update(tokens, outputs=torch.ones(4, 3))
    for _ in range(2):
        with pytest.raises(StatsError, match="outputs hold NaN or infinity"):
            use(stats)
