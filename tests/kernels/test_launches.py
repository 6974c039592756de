"""The number of kernels and torch operations on data that prune a layer, counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ace_triton import ActivationStats, prune_linear
from ace_triton.kernels.backend import interpreting
from benchmarks.harness.traffic_counter import Counter

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

LOOK_FOR_NAN = 1


@pytest.mark.parametrize(
    ("method", "launches"),
    [
        ("magnitude", 1 + LOOK_FOR_NAN),
        ("wanda", 1 + LOOK_FOR_NAN),
        ("stade", 1 + LOOK_FOR_NAN),
        ("cosp", 2 + LOOK_FOR_NAN),
        ("ria", 3),
        ("saap", 3),
        ("varp", 3),
        ("ace", 3),
        ("ace-paper", 2 + LOOK_FOR_NAN),
        ("dass", 2 + LOOK_FOR_NAN),
    ],
)
def test_launches_of_a_layer_that_shares_its_input(method, launches):
    tokens = torch.randn(2, 4, 32).bfloat16()
    layers = [torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16) for _ in range(2)]
    first, other = (ActivationStats.from_tokens(tokens, layer=layer, reduce="abs") for layer in layers)
    first.consumer_norm = torch.rand(16)
    further = first.with_outputs(other.outputs)
    prune_linear(layers[0], first, method)
    with Counter().counting() as traffic:
        prune_linear(layers[1], further, method)
    assert traffic.launches == launches


@pytest.mark.parametrize(("method", "launches"), [("wanda", 4), ("stade", 3)])
def test_the_first_layer_of_an_input_checks_weight_and_shared_vector_in_one_launch(method, launches):
    layer = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    stats = ActivationStats.from_tokens(torch.randn(2, 4, 32).bfloat16())
    with Counter().counting() as traffic:
        prune_linear(layer, stats, method)
    assert traffic.launches == launches
