"""Which outputs of finished modules are cached."""

import torch
from torch import nn

from ace_triton.decoders.collect import InputCollector
from ace_triton.decoders.finished import FinishedOutputs
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch


class Pair(nn.Module):
    """Returns a tuple, as attention does."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, x.sum()


def collector_of(layer: nn.Module) -> InputCollector:
    return InputCollector({"pending": layer}, Needs(), Stopwatch(torch.device("cpu")))


def test_an_output_that_a_pending_layer_may_change_is_not_cached():
    early, pending, late = Pair(), nn.Linear(4, 4), nn.Identity()
    outputs, collector, x = FinishedOutputs(), collector_of(pending), torch.randn(2, 3, 4)
    for number in range(2):
        with torch.no_grad(), collector.batch((2, 3), None), outputs.caching([early, late], number, collector):
            late(pending(early(x)[0]))
    assert [outputs.cached_for([early, late], number) for number in range(3)] == [[early], [early], []]
    with outputs.reusing([early], 0):
        first, second = early(torch.zeros(1))
    assert torch.equal(first, 2 * x)
    assert second is None
    assert float(early(torch.ones(1))[0]) == 2
    outputs.clear()
    assert outputs.cached_for([early], 0) == []


def test_an_output_before_any_pending_layer_is_cached_whatever_follows():
    early, late, pending = nn.Identity(), nn.Identity(), nn.Linear(4, 4)
    outputs, collector, x = FinishedOutputs(), collector_of(pending), torch.randn(1, 2, 4)
    with torch.no_grad(), collector.batch((1, 2), None), outputs.caching([early, late], 0, collector):
        pending(late(early(x)))
    assert outputs.cached_for([early, late], 0) == [early, late]


def test_an_output_that_is_changed_in_place_or_computed_twice_is_not_cached():
    changed, twice, kept, pending = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    outputs, collector, x = FinishedOutputs(), collector_of(pending), torch.randn(1, 2, 4)
    with torch.no_grad(), collector.batch((1, 2), None), outputs.caching([changed, twice, kept], 0, collector):
        pending(changed(x).relu_() + twice(twice(x)) + kept(x))
    assert outputs.cached_for([changed, twice, kept], 0) == [kept]
