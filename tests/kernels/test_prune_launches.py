"""Launches and host waits of pruning, counted in Triton's interpreter, and weights that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, PruneError, Recipe, prune_linear, prune_model
from ace_triton.checked_terms import read_checks
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.finite_check import FiniteCheck
from ace_triton.kernels.weight_sums import keep_relative_importance
from ace_triton.prune import prune_checked
from ace_triton.prune_blocks import check_later
from ace_triton.prune_together import LayerToPrune, prune_together
from benchmarks.harness.traffic_counter import Counter
from benchmarks.reports.block_traffic import SHAPES, block_to_prune

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")


def layers_of_an_input(count: int = 2) -> tuple[list[nn.Linear], list[ActivationStats]]:
    """Layers that share an input, and their statistics, with everything that they share computed."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, 32)
    layers = [nn.Linear(32, 16, bias=False, dtype=torch.float32) for _ in range(count + 1)]
    first, *others = (ActivationStats.from_tokens(tokens, layer=layer) for layer in layers)
    for method in ("ace", "ria"):
        prune_linear(layers[0], first, method)
    return layers[1:], [first.with_outputs(other.outputs) for other in others]


@pytest.mark.parametrize(("method", "launches"), [("magnitude", 1), ("wanda", 1), ("ria", 2), ("ace", 2)])
def test_a_layer_of_a_model_is_scored_and_pruned_without_a_wait(method, launches):
    layers, every = layers_of_an_input()
    unread, finite, recipe = [], FiniteCheck(), Recipe(method)
    weights = [layer.weight.detach() for layer in layers]
    expected = [layer.weight.detach().clone() for layer in layers]
    for weight in weights:
        keep_relative_importance(weight, finite)
    with Counter().counting() as reading:
        finite.read()
    for layer, weight, stats in zip(layers, weights, every, strict=True):
        with Counter().counting() as traffic:
            prune_checked(layer, weight, stats, recipe, "layer", finite, unread=unread)
        assert (traffic.launches, traffic.waits) == (launches, 0)
    with Counter().counting() as at_the_end:
        read_checks(unread)
    assert reading.waits == 1
    assert at_the_end.waits == (method in ("wanda", "ria", "ace"))
    for layer, before, stats in zip(layers, expected, every, strict=True):
        alone = nn.Linear(32, 16, bias=False, dtype=torch.float32)
        alone.weight.data.copy_(before)
        prune_linear(alone, stats, method)
        assert torch.equal(layer.weight, alone.weight)
        assert (layer.weight == 0).sum() == layer.weight.numel() / 2


@pytest.mark.parametrize(("method", "kernels"), [("magnitude", 2), ("wanda", 2), ("ria", 3), ("ace", 3)])
def test_a_layer_by_itself_takes_no_more_kernels_than_as_a_group(method, kernels):
    """A layer by itself has its column vector in the launch that merges its sums. A group has one for all vectors."""
    (layer, other), (stats, of_other) = layers_of_an_input()
    with Counter().counting() as alone:
        prune_linear(layer, stats, method)
    assert (alone.kernels, alone.waits) == (kernels, 1)
    unread = []
    with Counter().counting() as group:
        weight = other.weight.detach()
        prune_together([LayerToPrune("layer", other, weight, of_other)], Recipe(method), FiniteCheck(), unread)
        read_checks(unread)
    assert group.kernels == kernels + (method in ("ria", "ace"))
    assert group.waits == 1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "ace"])
def test_a_weight_that_is_not_finite_stays_as_it_is(method):
    (layer, _), (stats, _) = layers_of_an_input()
    with torch.no_grad():
        layer.weight[3, 5] = torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match="the weight holds NaN or infinity"):
        prune_linear(layer, stats, method)
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.weight[3, 5] = 1
    prune_linear(layer, stats, method)


def test_statistics_that_are_not_finite_change_nothing():
    (layer, _), (stats, _) = layers_of_an_input()
    stats.outputs.weighted_square[4] = torch.nan
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match="NaN or infinity in the score's scale"):
        prune_linear(layer, stats, "ace")
    assert torch.equal(layer.weight, before)


def test_terms_that_were_kept_are_computed_again_after_a_write():
    (layer, other), (stats, _) = layers_of_an_input()
    keep_relative_importance(layer.weight.detach(), FiniteCheck())
    weight, finite = layer.weight.detach(), FiniteCheck()
    keep_relative_importance(weight, finite)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 9, 32))
        other.weight.copy_(layer.weight)
    prune_checked(layer, weight, stats, Recipe("ria"), "layer", finite)
    prune_linear(other, stats, "ria")
    assert torch.equal(layer.weight, other.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(8, 8, bias=False, dtype=torch.float32) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8, dtype=torch.float32)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def test_a_block_of_a_model_takes_two_waits(monkeypatch, model):
    """One for counts and units of the statistics before it is pruned, and one for its checks."""
    for module in ("outputs", "batch"):
        monkeypatch.setattr(f"ace_triton.statistics.{module}.is_on_cpu", lambda tensor: False)
    waits = []
    with Counter().counting() as traffic:
        prune_model(model, torch.arange(4)[None], "ace", progress=lambda *_: waits.append(traffic.waits))
    assert waits[1] - waits[0] == 2


@pytest.mark.parametrize(
    ("method", "checking", "pruning"),
    [("magnitude", 1, 1), ("ria", 2, 4 + 2), ("ace", 2, 2 + 2)],
)
def test_a_block_takes_at_most_one_kernel_a_layer_for_sums_and_selection(method, checking, pruning):
    """``pruning`` includes the vectors of the four inputs: a kernel for each norm, or two for all of VarP's factors."""
    layers, recipe, finite, unread = block_to_prune(), Recipe(method), FiniteCheck(), []
    compared = layers[1::5]
    alone = [nn.Linear(*entry.weight.shape[::-1], bias=False, dtype=torch.float32) for entry in compared]
    for copy, entry in zip(alone, compared, strict=True):
        copy.weight.data.copy_(entry.weight)
    with Counter().counting() as first:
        check_later([entry.weight for entry in layers], recipe, finite)
    assert (first.kernels, first.waits) == (checking, 0)
    finite.read()
    with Counter().counting() as second:
        results = prune_together(layers, recipe, finite, unread)
    assert (second.kernels, second.waits) == (pruning, 0)
    assert first.kernels + second.kernels <= len(layers) + (method == "ria")
    with Counter().counting() as at_the_end:
        read_checks(unread)
    assert at_the_end.waits == (method != "magnitude")
    assert [result.name for result in results] == list(SHAPES)
    for copy, entry in zip(alone, compared, strict=True):
        prune_linear(copy, entry.stats, method)
        assert torch.equal(entry.weight, copy.weight)
    assert all((entry.weight == 0).sum() == entry.weight.numel() / 2 for entry in layers)


def test_a_layer_with_statistics_that_are_not_finite_keeps_the_block_as_it_is():
    layers, finite, unread = block_to_prune(), FiniteCheck(), []
    before = [entry.weight.clone() for entry in layers]
    layers[4].stats.outputs.weighted_square[4] = torch.nan
    prune_together(layers, Recipe("ace"), finite, unread)
    with pytest.raises(PruneError, match="gate: the statistics give NaN or infinity in the score's scale"):
        read_checks(unread)
    for entry, dense in zip(layers, before, strict=True):
        assert torch.equal(entry.weight, dense)


def test_a_weight_that_nobody_has_checked_keeps_the_block_as_it_is():
    layers, finite, unread = block_to_prune(), FiniteCheck(), []
    layers[2].weight[1, 1] = torch.inf
    before = [entry.weight.clone() for entry in layers]
    prune_together(layers, Recipe("wanda"), finite, unread)
    with pytest.raises(PruneError, match="v: the weight holds NaN or infinity"):
        read_checks(unread)
    for entry, dense in zip(layers, before, strict=True):
        assert torch.equal(entry.weight, dense)
