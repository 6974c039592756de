"""SparseGPT at 2:4 from a given Gram matrix, compared with the published sweep, at layers of SmolLM2 and LLaMA-7B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, prune_linear
from benchmarks.claims import published
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import check_nearly_same
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.layer_shapes import SMOLLM2, TINY, LayerShape, distinct

TESTS = ("tests/benchmarks/test_published_baselines.py", "tests/kernels/test_select_nm.py")
SEQUENCES = (32, 64)


def params() -> list[Any]:
    return [
        pytest.param(shape, id=f"{shape.rows}x{shape.cols}", marks=[pytest.mark.quick] * (shape.cols == 576))
        for shape in distinct()
        if shape.model == SMOLLM2 or (shape.rows, shape.cols) == (4096, 4096)
    ]


@pytest.mark.parametrize("shape", params())
def test_two_of_four(compare: Compare, shape: LayerShape, device: torch.device, tiny: bool) -> None:
    if device.type == "cpu" and shape.model != SMOLLM2:
        pytest.skip("takes more than a minute on a CPU")
    shape = TINY if tiny else shape
    torch.manual_seed(0)
    layer = nn.Linear(shape.cols, shape.rows, bias=False, device=device)
    weight, dense = layer.weight.data, layer.weight.detach().clone()
    tokens = torch.randn(*SEQUENCES, shape.cols, device=device) * (torch.rand(shape.cols, device=device) + 0.1)
    stats, hessian = ActivationStats.from_tokens(tokens, gram=True), published.hessian(tokens)

    def ours() -> None:
        prune_linear(layer, stats.to(device), "sparsegpt", "2:4")

    def theirs() -> None:
        published.prune_by_sparsegpt(weight, hessian, 2, 4)

    def check() -> None:
        found = []
        for call in (ours, theirs):
            weight.copy_(dense)
            call()
            found.append(weight.clone())
        check_nearly_same(*found)

    compare(
        Comparison(
            "prune 2:4, sparsegpt",
            weight.shape,
            weight.dtype,
            ours,
            (Provider("published sweep", theirs),),
            0,
            check,
            lambda: weight.copy_(dense),
        )
    )
