"""prune_linear on given statistics, compared with the published score and selection, at layers of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ace_triton import ActivationStats, prune_linear
from benchmarks.claims import published
from benchmarks.claims.published_model import LayerStatistics
from benchmarks.conftest import Compare
from benchmarks.harness.agreement import check_same_choice
from benchmarks.harness.comparison import Comparison, Provider
from benchmarks.harness.layer_shapes import TINY, LayerShape, distinct

TESTS = (
    "tests/benchmarks/test_published_baselines.py",
    "tests/kernels/test_select_nm.py",
    "tests/kernels/test_select_rows.py",
)
SEQUENCES = (8, 16)

METHODS = ("magnitude", "wanda", "ria", "ace", "ace-paper")
QUICK = {(576, 576), (1536, 576), (4096, 4096)}
MOST_SORTED = 2**24


@dataclass
class Layer:
    """A random layer, its statistics, and a copy of its dense weight."""

    module: nn.Linear
    dense: torch.Tensor
    stats: ActivationStats
    mean_square: torch.Tensor

    def restore(self) -> None:
        self.module.weight.data.copy_(self.dense)

    def published_scores(self, method: str) -> torch.Tensor:
        """The published scores, from the same tokens as the statistics."""
        outputs = self.stats.outputs
        assert outputs is not None
        loss = outputs.mean_coupling() if method == "ace-paper" else outputs.mean_weighted_square().float()
        norms = published.InputNorms(self.mean_square)
        seen = LayerStatistics(norms, [self.stats.sequence_square], loss, 1)
        return seen.scores(method, self.module.weight.data)


def make_layer(shape: LayerShape, device: torch.device) -> Layer:
    torch.manual_seed(0)
    module = nn.Linear(shape.cols, shape.rows, bias=False, dtype=torch.bfloat16, device=device)
    tokens = torch.randn(*SEQUENCES, shape.cols, device=device) * (torch.rand(shape.cols, device=device) + 0.1)
    stats = ActivationStats.from_tokens(tokens.bfloat16(), layer=module, reduce="abs")
    return Layer(module, module.weight.detach().clone(), stats, stats.norm.square())


def params() -> list[Any]:
    return [
        pytest.param(
            shape, id=f"{shape.rows}x{shape.cols}", marks=[pytest.mark.quick] * ((shape.rows, shape.cols) in QUICK)
        )
        for shape in distinct()
    ]


@pytest.fixture(params=params(), scope="module")
def shape(request: pytest.FixtureRequest, tiny: bool) -> LayerShape:
    return TINY if tiny else request.param


@pytest.fixture(scope="module")
def layer(shape: LayerShape, device: torch.device) -> Layer:
    return make_layer(shape, device)


def side_by_side(
    layer: Layer, method: str, sparsity: str | float, select: Callable[[torch.Tensor], None], name: str
) -> Comparison:
    """Ours against published scores and the published ``select(scores)``, from the same statistics."""
    weight = layer.module.weight.data
    pattern = f"{sparsity} a row" if isinstance(sparsity, float) else sparsity
    group = weight.shape[1] if isinstance(sparsity, float) else int(sparsity.split(":")[1])

    def ours() -> None:
        stats = None if method == "magnitude" else layer.stats.to(weight.device)
        prune_linear(layer.module, stats, method, sparsity)

    def theirs() -> None:
        select(layer.published_scores(method))

    def check() -> None:
        layer.restore()
        scores = layer.published_scores(method)
        masks = []
        for call in (ours, theirs):
            layer.restore()
            call()
            masks.append(weight != 0)
        check_same_choice(scores, *masks, group)

    return Comparison(
        f"prune {pattern}, {method}",
        weight.shape,
        weight.dtype,
        ours,
        (Provider(name, theirs),),
        2 * weight.nbytes,
        check,
        layer.restore,
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four(compare: Compare, layer: Layer, method: str) -> None:
    weight = layer.module.weight.data
    compare(side_by_side(layer, method, "2:4", lambda s: published.prune_groups(weight, s, 2, 4), "published loop"))


def test_half_of_every_row(compare: Compare, layer: Layer, shape: LayerShape) -> None:
    if not layer.dense.is_cuda and shape.rows * shape.cols > MOST_SORTED:
        pytest.skip("sorting takes seconds on a CPU; bench_select_rows.py has one such layer")
    weight, half = layer.module.weight.data, shape.cols // 2
    select = lambda s: published.prune_rows_by_sort(weight, s, half)  # noqa: E731
    compare(side_by_side(layer, "wanda", 0.5, select, "published sort"))
