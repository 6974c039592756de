"""A statistic of one's own: registered beside a metric that asks for it, and followed through everything."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ace_triton import (
    ActivationStats,
    Needs,
    RecipeError,
    ScoreTerms,
    Statistic,
    StatsError,
    TensorForm,
    prune_linear,
    prune_model,
    register_metric,
    register_statistic,
)
from ace_triton.statistics import statistic


@pytest.fixture(autouse=True)
def registered_statistics(monkeypatch):
    monkeypatch.setattr(statistic, "_REGISTRY", dict(statistic._REGISTRY))


@pytest.fixture
def peaks() -> type[Statistic]:
    """The largest |x_tj|, and a metric that multiplies |W_ij| by it."""

    @register_statistic("peaks")
    class Peaks(Statistic):
        forms = {"largest": TensorForm("j")}  # noqa: RUF012
        largest = None

        def update(self, tokens, valid=None):
            rows = tokens.flatten(0, -2) if valid is None else tokens[valid]
            batch = copy.copy(self)
            batch.largest = rows.float().abs().amax(0) if len(rows) else None
            self.largest = (self + batch).largest

        def __add__(self, other):
            both = copy.copy(other if self.largest is None else self)
            if self.largest is not None and other.largest is not None:
                both.largest = torch.maximum(self.largest, other.largest)
            return both

        def reordered(self, order):
            moved = copy.copy(self)
            moved.largest = None if self.largest is None else self.largest[order]
            return moved

    @register_metric("by_peak", Needs(parts=[Peaks]))
    def by_peak(weight, stats):
        return ScoreTerms(scale=stats.part(Peaks).largest)

    return Peaks


def kept_of(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The mask at 2:4 along the inputs of |W_ij| scale_j; of equal scores the later is kept."""
    score = weight.detach().abs() * scale
    ranks = score.reshape(len(weight), -1, 4).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (ranks >= 2).reshape(weight.shape)


@pytest.mark.parametrize("sequential", ["none", "blocks", "layers"])
def test_prunes_a_model_by_what_each_layer_reads(peaks, tiny_model, ids, sequential):
    dense, read = copy.deepcopy(tiny_model), []
    layers = dense.model.layers[0].self_attn, dense.model.layers[0].mlp
    watched = layers[1].up_proj if sequential == "none" else layers[0].k_proj
    watched.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    dense(input_ids=ids)
    prune_model(tiny_model, ids, "by_peak", batch_size=4, sequential=sequential)
    largest = read[0].flatten(0, 1).abs().amax(0)
    pruned = tiny_model.model.layers[0]
    weight = pruned.mlp.up_proj.weight if sequential == "none" else pruned.self_attn.k_proj.weight
    assert torch.equal(weight != 0, kept_of(watched.weight, largest))


def test_works_with_orders_updates_and_raw_tokens(peaks, tiny_model, ids):
    report = prune_model(tiny_model, ids, "by_peak", permute=True, update="lstsq")
    assert len(report.layers) == 14
    layer, tokens = torch.nn.Linear(16, 8), torch.randn(3, 5, 16)
    dense = layer.weight.detach().clone()
    prune_linear(layer, tokens, "by_peak")
    assert torch.equal(layer.weight != 0, kept_of(dense, tokens.flatten(0, 1).abs().amax(0)))


def test_goes_through_batches_merging_moving_reordering_and_a_file(peaks, tmp_path):
    tokens, valid = torch.randn(6, 5, 16), torch.rand(6, 5) > 0.3
    valid[2] = False
    wanted = tokens[valid].abs().amax(0)
    stats = ActivationStats(16, parts=[peaks(16)])
    stats.update(tokens[:2], valid=valid[:2])
    stats.update(tokens[2:3], valid=valid[2:3])
    further = ActivationStats.from_tokens(tokens[3:], valid=valid[3:], parts=[peaks])
    stats.merge(further)
    order = torch.randperm(16)
    stats.save(tmp_path / "stats.safetensors")
    read = ActivationStats.load(tmp_path / "stats.safetensors")
    for carried in (stats, stats.to("cpu"), stats.with_outputs(None), read, copy.deepcopy(stats)):
        assert torch.equal(carried.part(peaks).largest, wanted)
        carried.reorder(order)
        assert torch.equal(carried.part(peaks).largest, wanted[order])
        carried.update(torch.full((1, 16), 9.0))
        assert torch.equal(carried.part(peaks).largest, torch.full((16,), 9.0))


def test_a_statistic_may_keep_numbers_and_own_shapes_in_a_file(peaks, tmp_path):
    @register_statistic("histogram")
    class Histogram(peaks):
        forms = {"largest": TensorForm("j"), "bins": TensorForm("kj", (torch.int64,), optional=True)}  # noqa: RUF012
        fact_names = ("width",)
        bins, width = None, 0.5

    path = tmp_path / "stats.safetensors"
    stats = ActivationStats.from_tokens(torch.randn(4, 16), sample=True, parts=[Histogram])
    stats.part(Histogram).bins, stats.part(Histogram).width = torch.arange(48).reshape(3, 16), 0.25
    stats.save(path)
    again = ActivationStats.load(path).part(Histogram)
    assert again.width == 0.25
    assert torch.equal(again.bins, stats.part(Histogram).bins)
    assert torch.equal(again.largest, stats.part(Histogram).largest)
    stats.part(Histogram).largest = None
    stats.save(path)
    with pytest.raises(StatsError, match=r"only one of histogram and histogram\.largest, which belong together"):
        ActivationStats.load(path)


def test_statistics_without_it_do_not_merge_and_say_how_to_collect_it(peaks):
    tokens = torch.randn(4, 16)
    stats = ActivationStats.from_tokens(tokens)
    with pytest.raises(StatsError, match="with and without the statistic 'peaks' do not merge"):
        stats.merge(ActivationStats.from_tokens(tokens, parts=[peaks]))
    with pytest.raises(StatsError, match=r"layer: these statistics .*'peaks': .*from_tokens\(tokens, parts=\[Peaks\]"):
        prune_linear(torch.nn.Linear(16, 8), stats, "by_peak", name="layer")


def test_a_batch_that_one_statistic_refuses_is_added_to_none(peaks):
    @register_statistic("choosy")
    class Choosy(peaks):
        def update(self, tokens, valid=None):
            if tokens.max() > 5:
                raise StatsError("too large")

    layer, tokens = torch.nn.Linear(16, 8), torch.rand(3, 5, 16)
    stats = ActivationStats.from_tokens(
        tokens, layer=layer, reduce="abs", gram=True, sample=True, parts=[peaks, Choosy]
    )
    one, vector = stats.outputs.matrix.clone(), stats.mean.clone()
    with pytest.raises(StatsError, match="too large"):
        stats.update(tokens + 9, outputs=layer(tokens).detach())
    assert (stats.count, stats.n_sequences, stats.gram.count, stats.sample.count, stats.outputs.count) == (
        *(15, 3, 15, 12, 15),
    )
    assert torch.equal(stats.part(peaks).largest, tokens.flatten(0, 1).amax(0))
    assert torch.equal(stats.outputs.matrix, one)
    assert torch.equal(stats.mean, vector)


def test_a_file_is_refused_if_its_statistic_is_unknown_or_damaged(peaks, tmp_path, monkeypatch):
    path = str(tmp_path / "stats.safetensors")
    ActivationStats.from_tokens(torch.randn(4, 16), parts=[peaks]).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert set(tensors) == {"mean", "deviation", "sequence_square", "sequence_count", "peaks.largest"}
    save_file(tensors | {"peaks.largest": torch.ones(15)}, path, metadata=metadata)
    with pytest.raises(StatsError, match=r"peaks.largest must have shape \[16\], got \[15\]; the file is damaged"):
        ActivationStats.load(path)
    statistic._REGISTRY.pop("peaks")
    with pytest.raises(StatsError, match="holds the statistic 'peaks', which is not registered: first import"):
        ActivationStats.load(path)


@pytest.mark.parametrize(
    ("name", "base", "members", "message"),
    [
        ("in_features", "peaks", {}, "'in_features' cannot be the name of a statistic"),
        ("two words", "peaks", {}, "'two words' cannot be the name of a statistic"),
        ("gram", "peaks", {}, "there is a statistic 'gram' already"),
        ("mine", None, {}, "must be a class derived from ace_triton.Statistic"),
        ("mine", "Statistic", {}, "'mine' lacks __add__, reordered, update"),
        ("mine", "peaks", {"forms": {}}, "'mine' has no forms"),
    ],
)
def test_what_cannot_be_registered(peaks, name, base, members, message):
    bases = {"peaks": (peaks,), "Statistic": (Statistic,), None: ()}[base]
    with pytest.raises(StatsError, match=message):
        register_statistic(name)(type("Mine", bases, {"__module__": __name__, **members}))


def test_what_a_metric_cannot_ask_for(peaks):
    class Unregistered(peaks):
        pass

    with pytest.raises(StatsError, match="Unregistered'> is no registered statistic"):
        Needs(parts=[Unregistered])
    with pytest.raises(StatsError, match=r"got the class Peaks: use \[Peaks\]"):
        Needs(parts=peaks)
    with pytest.raises(StatsError, match="OutputStats follows a layer's outputs"):
        Needs(parts=[statistic.statistics()["outputs"]])
    with pytest.raises(RecipeError, match="leave tokens=False out"):
        Needs(tokens=False, parts=[peaks])
    with pytest.raises(StatsError, match="is no registered statistic"):
        ActivationStats(16, parts=[Unregistered(16)])


def test_a_file_of_the_built_in_statistics_keeps_its_format(tmp_path):
    """Written here tensor by tensor; it is read, and written again byte for byte."""
    tensors = {
        "mean": torch.randn(4, dtype=torch.float64),
        "deviation": torch.rand(4, dtype=torch.float64),
        "sequence_square": torch.rand(2, 4),
        "sequence_count": torch.tensor([3, 2]),
        "consumer_norm": torch.rand(3),
        "gram": torch.eye(4),
        "sample": torch.randn(2, 4, dtype=torch.bfloat16),
        "draws": torch.rand(2, dtype=torch.float64),
        "weighted_square": torch.rand(4, dtype=torch.float64),
        "coupling": torch.rand(3, 4),
    }
    outputs = {"reduce": "rms", "count": 5, "unit": 2.5}
    header = {"format": "ace_triton.activation_stats.1", "in_features": 4, "count": 5, "outputs": outputs}
    written, again = tmp_path / "written.safetensors", tmp_path / "again.safetensors"
    save_file(tensors, written, metadata={"ace_triton": json.dumps(header)})
    stats = ActivationStats.load(written)
    stats.save(again)
    assert again.read_bytes() == written.read_bytes()
    assert (stats.count, stats.gram.count, stats.sample.count, stats.outputs.unit) == (5, 5, 5, 2.5)
    assert torch.equal(stats.consumer_norm, tensors["consumer_norm"])
