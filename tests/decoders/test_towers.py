"""Models with one or more towers, of any inputs, are pruned tower by tower."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ace_triton import prune_model
from ace_triton.decoders.blocks import Tower, find_blocks, find_towers, linears_of
from ace_triton.decoders.calibration_forms import batches_of
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.decoders.collect import InputCollector
from ace_triton.decoders.replay import Replay, WholeForward, make_runner
from ace_triton.errors import ArgumentError
from ace_triton.linears import linear_weight
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch
from benchmarks.harness.small_models import small_model
from tests.decoders.small_towers import KINDS, SOURCE, Kind, ids, llava, make


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers_of(tower: Tower) -> list[dict[str, nn.Module]]:
    return [dict(linears_of(block.module, block.name)) for block in tower.blocks]


def prune_naively(kind: Kind) -> nn.Module:
    """Wanda 2:4, block by block, by whole forwards of the model, sharing nothing with the package."""
    model, batches = make(kind)
    modules = dict(model.named_modules())
    for tower in kind.towers:
        for block in modules[tower]:
            layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
            square: dict[str, torch.Tensor] = dict.fromkeys(layers, torch.zeros(1, dtype=torch.float64))
            for inputs in batches:
                seen: dict[str, torch.Tensor] = {}
                hooks = [
                    m.register_forward_hook(lambda _m, args, _o, n=n, seen=seen: seen.update({n: args[0]}))
                    for n, m in layers.items()
                ]
                with torch.no_grad():
                    model(**inputs)
                for hook in hooks:
                    hook.remove()
                for name, tokens in seen.items():
                    crossing = any(part in name for part in ("EncDecAttention", "encoder_attn"))
                    source = crossing and name.split(".")[-1] in ("k", "v", "k_proj", "v_proj")
                    valid = inputs.get(kind.masks.get(next(iter(kind.towers)) if source else tower, ""))
                    rows = tokens.double() if valid is None else tokens[valid.bool()].double()
                    square[name] = square[name] + rows.reshape(-1, rows.shape[-1]).square().sum(0)
            for name, layer in layers.items():
                score = (layer.weight.detach().double().abs() * square[name].sqrt()).reshape(-1, 4)
                dropped = torch.zeros_like(score, dtype=torch.bool)
                dropped.scatter_(1, torch.sort(score, dim=1, stable=True).indices[:, :2], True)
                layer.weight.data[dropped.reshape(layer.weight.shape)] = 0
    return model


def test_masks_are_those_of_a_naive_implementation(kind):
    """So each tower sees the pruned towers before it, and no tower sees padding."""
    model, batches = make(kind)
    naive = prune_naively(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prune_model(model, batches, "wanda", "2:4")
    weights = naive.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert [(tower.name, tower.run) for tower in report.towers] == [(name, "blocks") for name in kind.towers]


@pytest.mark.parametrize(
    "options", [{}, {"sequential": "layers"}, {"sequential": "none", "budgets": "outliers"}], ids=str
)
def test_every_layer_of_every_tower_has_exactly_the_pattern(kind, options):
    model, batches = make(kind)
    dense, _ = make(kind)
    with torch.no_grad():
        expected = model(**batches[0])
    report = prune_model(model, batches, "ace", "4:8", permute=True, **options)
    counts = [sum(layer.name.startswith(f"{tower}.") for layer in report.layers) for tower in kind.towers]
    assert counts == list(kind.towers.values())
    assert len(report.layers) == sum(counts)
    for layer in report.layers:
        groups = linear_weight(model.get_submodule(layer.name)).reshape(-1, 8)
        assert set((groups != 0).sum(1).tolist()) == {int(layer.pattern[0])}
    blocks = [block.module for block in find_blocks(dense, batches_of(dense, batches, None)[0])]
    matrices = {p: p.numel() for block in blocks for p in block.parameters() if p.dim() > 1}
    account = report.account
    assert account.blocks == account.pruned + account.skipped == sum(matrices.values())
    assert account.pruned == sum(layer.parameters for layer in report.layers)
    assert {skipped.reason for skipped in report.skipped} <= {"an embedding"}
    assert report.permutation.reordered
    assert not report.permutation.unfolded
    with torch.no_grad():
        assert type(model(**batches[0])) is type(expected)


def collected(runner: Replay | WholeForward, layers: dict[str, nn.Module], index: int) -> InputCollector:
    collector = InputCollector(layers, Needs(), Stopwatch(torch.device("cpu")))
    runner.run(index, collector, advance=True)
    return collector


def test_replayed_statistics_are_those_of_a_whole_forward(kind):
    model, inputs = make(kind)
    batches, clock = batches_of(model, inputs, None), Stopwatch(torch.device("cpu"))
    with calibration_mode(model):
        towers = find_towers(model, batches[0])
        assert [tower.masks.own for tower in towers if tower.masks.own in batches[0].masks] == list(kind.masks.values())
        for tower in towers:
            replay = make_runner(model, tower.blocks, batches, clock, tower.masks)
            whole = WholeForward(model, batches, clock, tower.blocks, tower.masks)
            assert isinstance(replay, Replay)
            for index, layers in enumerate(layers_of(tower)):
                ours, theirs = collected(replay, layers, index), collected(whole, layers, index)
                assert ours.groups == theirs.groups
                for name in layers:
                    one, other = ours.statistics(name), theirs.statistics(name)
                    assert torch.equal(one.norm, other.norm), name
                    assert torch.equal(one.sequence_square, other.sequence_square), name


def test_a_tower_that_no_input_reaches_is_reported(recwarn):
    """Token ids alone do not reach a vision tower."""
    torch.manual_seed(0)
    model, text = llava().eval(), ids(12)
    report = prune_model(model, text, "wanda")
    assert [(tower.name, tower.blocks, tower.run) for tower in report.towers] == [
        ("model.language_model.layers", 2, "blocks"),
        ("model.vision_tower.encoder.layers", 2, "unreached"),
    ]
    assert len(report.layers) == 14
    assert report.to_dict()["towers"][1] == {
        "name": "model.vision_tower.encoder.layers",
        "blocks": 2,
        "run": "unreached",
    }


def test_token_ids_and_a_dict_of_them_give_the_same():
    kind = KINDS["bert"]
    (one, batches), (other, _) = make(kind), make(kind)
    (plain, _), (masked, _) = make(kind), make(kind)
    prune_model(one, [{"input_ids": batches[0]["input_ids"]}])
    prune_model(other, batches[0]["input_ids"])
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    calibration = type("Calibration", (), {"ids": batches[0]["input_ids"], "mask": SOURCE.bool()})()
    prune_model(plain, calibration)
    prune_model(masked, batches[:1])
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, masked.state_dict()[name]), name


@pytest.mark.parametrize("family", ["hrm_text", "gemma3n_text"])
def test_towers_of_the_same_tokens_have_the_same_mask(family):
    """Two towers that read the same text, and hidden states in several streams."""
    tokens, valid = ids(12), SOURCE.bool()
    (one, other) = (small_model(family, tokens) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Not all of them can be replayed.
        calibration = type("Calibration", (), {"ids": tokens, "mask": valid})()
        prune_model(one, calibration, "wanda")
        prune_model(other, [{"input_ids": tokens, "attention_mask": SOURCE}], "wanda")
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_layers_are_chosen_by_their_dotted_names():
    model, batches = make(KINDS["bart"])
    report = prune_model(model, batches, "wanda", include="model.decoder.*", exclude="*.fc1")
    assert len(report.layers) == 18
    assert all(layer.name.startswith("model.decoder.") for layer in report.layers)
    assert [tower.run for tower in report.towers] == ["none", "blocks"]
    assert {e.name.split(".")[1] for e in report.excluded} == {"encoder", "decoder"}


def test_all_towers_are_pruned_without_a_forward():
    model, _ = make(KINDS["t5"])
    report = prune_model(model, None, "magnitude")
    assert len(report.layers) == 32
    assert [(tower.name, tower.run) for tower in report.towers] == [
        ("encoder.block", "none"),
        ("decoder.block", "none"),
    ]


def test_a_head_is_pruned_by_what_the_last_tower_gives_it():
    model, batches = make(KINDS["bart"])
    report = prune_model(model, batches, "wanda", include=["lm_head", "*.fc2"], sequential="none")
    assert [skipped.reason[:22] for skipped in report.skipped] == ["its weight is tied to "]
    model, batches = make(KINDS["vit"])
    report = prune_model(model, batches, "wanda", include=["classifier", "*.fc2"])
    assert report.layers[-1].name == "classifier"
    assert report.layers[-1].kept == 0.5


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
