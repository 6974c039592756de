"""Towers of models that are no transformers: where blocks are found, and what runs a tower that cannot be replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ace_triton import prune_model
from ace_triton.decoders.blocks import find_towers
from ace_triton.errors import ArgumentError
from tests.decoders.small_towers import KINDS, make

pytestmark = pytest.mark.usefixtures("one_thread")


class OfTorch(nn.Module):
    """Blocks of torch itself, in an nn.Sequential with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        blocks = {f"block_{i}": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for i in range(2)}
        self.encoder = nn.Sequential(OrderedDict(blocks))

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.first(series))


def test_blocks_in_a_sequence_are_found_and_what_stays_dense_in_them_is_named():
    torch.manual_seed(0)
    report = prune_model(OfTorch(), [{"series": torch.randn(4, 6, 8)}], "wanda")
    assert [(tower.name, tower.blocks, tower.run) for tower in report.towers] == [("encoder", 2, "blocks")]
    assert [layer.name for layer in report.layers] == [
        f"encoder.block_{i}.{name}" for i in range(2) for name in ("linear1", "linear2")
    ]
    attention = "encoder.block_0.self_attn."
    assert {s.name: s.reason for s in report.skipped if s.name.startswith(attention)} == {
        f"{attention}in_proj_weight": "a parameter of a MultiheadAttention, not the weight of a linear layer",
        f"{attention}out_proj": "no calibration token reached it",
    }
    assert report.account.blocks == report.account.pruned + report.account.skipped


class Stages(nn.Module):
    """Stages as lists in a list, whose blocks return what they are told to."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap
        self.stages = nn.ModuleList([nn.ModuleList([Stage(wrap) for _ in range(2)]) for _ in range(2)])

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            for block in stage:
                series = block(series)
                while isinstance(series, tuple):
                    series = series[0]
        return series


class Stage(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap, self.inner = wrap, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor):
        return self.wrap(x + self.inner(x))


@pytest.mark.parametrize(
    ("wrap", "run"),
    [(lambda x: x, "blocks"), (lambda x: ((x, 1), 2), "forwards")],
    ids=["tensor", "nested tuple"],
)
def test_stages_in_a_list_of_lists_are_towers(wrap, run):
    torch.manual_seed(0)
    model = Stages(wrap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(model, [{"series": torch.randn(4, 6, 8)}], "wanda")
    assert [(t.name, t.blocks, t.run) for t in report.towers] == [("stages.0", 2, run), ("stages.1", 2, run)]
    assert len(report.layers) == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(2)]), "Sequential have no linear layers.* are in Conv2d$"),
        (nn.Bilinear(2, 2, 2), r"Bilinear has no blocks \(an nn.ModuleList or nn.Sequential of modules with linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), "Sequential has no blocks .* one by one with prune_linear"),
    ],
)
def test_a_model_without_blocks_of_linear_layers_says_what_it_has(model, message):
    with pytest.raises(ArgumentError, match=message):
        find_towers(model)


class Counting(nn.Module):
    """A feed-forward that needs to know how often the model has run."""

    def __init__(self, inner: nn.Module, calls: list[int], *, counts: bool) -> None:
        super().__init__()
        self.inner, self.calls, self.counts = inner, calls, counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.calls[:] = [0]
            return self.inner(x)
        self.calls[0] += 1
        return self.inner(x) / self.calls[0]


def test_a_tower_that_cannot_be_replayed_is_run_by_whole_forwards():
    (model, batches), (odd, _) = make(KINDS["bart"]), make(KINDS["bart"])
    calls: list[int] = []
    layers = odd.model.decoder.layers
    layers[0].fc2 = Counting(layers[0].fc2, calls, counts=True)
    layers[1].fc2 = Counting(layers[1].fc2, calls, counts=False)
    with pytest.warns(UserWarning, match="cannot be run one at a time"):
        report = prune_model(odd, batches, "wanda")
    assert [tower.run for tower in report.towers] == ["blocks", "forwards"]
    prune_model(model, batches, "wanda")
    theirs = {name.replace(".inner", ""): weight for name, weight in odd.state_dict().items()}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


class Perceptron(nn.Module):
    """Blocks, each with an MLP in an nn.ModuleList, and a projection in one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.projection = nn.ModuleList([nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)])

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        for module in (*self.blocks, *self.projection):
            series = module(series)
        return series


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleList([nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)])

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        hidden = series
        for module in self.mlp:
            hidden = module(hidden)
        return series + hidden


def test_a_list_of_the_layers_of_an_mlp_is_not_a_list_of_blocks():
    torch.manual_seed(0)
    report = prune_model(Perceptron(), [{"series": torch.randn(4, 6, 8)}], "wanda")
    assert [(tower.name, tower.blocks) for tower in report.towers] == [("blocks", 2)]
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.mlp.{j}" for i in range(2) for j in (0, 2)]
    assert report.account.outside == 2 * 8 * 16


class Tiled(nn.Module):
    """A tower of image tiles, some of which are padding, and a tower of text with one token for each real tile."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = nn.ModuleList(Residual() for _ in range(2))
        self.table = nn.Embedding(10, 8)
        self.text = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, tiles: torch.Tensor, tile_attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = tiles[tile_attention_mask].flatten(1)[:, None]
        for block in self.tiles:
            hidden = block(hidden)
        text = self.table(input_ids).masked_scatter((input_ids == 9)[..., None], hidden)
        if int((input_ids == 9).sum()) != len(hidden):
            raise ValueError("as many image tokens as tiles")
        for block in self.text:
            text = block(text)
        return text


def test_a_mask_of_whole_images_hides_no_tokens():
    torch.manual_seed(0)
    ids = torch.tensor([[9, 9, 1, 2], [9, 3, 4, 5]])
    real = torch.tensor([[True, True], [True, False]])
    inputs = {"input_ids": ids, "tiles": torch.randn(2, 2, 2, 2, 2), "tile_attention_mask": real}
    report = prune_model(Tiled(), [inputs], "wanda")
    assert [tower.name for tower in report.towers] == ["tiles", "text"]
    assert len(report.layers) == 8


def test_a_model_whose_weights_are_all_tied_says_so_in_one_line():
    model = Perceptron()
    model.twins = nn.ModuleList(model.blocks)
    with pytest.raises(ArgumentError, match=r"tied to twins\.0\.mlp\.0; .*; and 5 more reasons$"):
        prune_model(model, [{"series": torch.randn(4, 6, 8)}], "magnitude")


def test_batches_come_as_dicts_tuples_a_loader_or_a_function():
    torch.manual_seed(0)
    series = torch.randn(8, 6, 8)
    dicts = [{"series": part} for part in series.split(4)]
    loader = DataLoader(TensorDataset(series), batch_size=4)
    weights = []
    for batches in (dicts, [tuple(batch.values()) for batch in dicts], loader, lambda: iter(dicts)):
        torch.manual_seed(1)
        model = Perceptron()
        prune_model(model, batches, "wanda")
        weights.append(torch.cat([parameter.flatten() for parameter in model.blocks.parameters()]))
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    with pytest.raises(ArgumentError, match=r"calibration\[0\] has 2 tensors, but Perceptron takes 1 arguments"):
        prune_model(Perceptron(), [(series, series)], "wanda")
