import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ace_triton import (
    ActivationStats,
    PruneError,
    ScoreTerms,
    Sparsity,
    StatsError,
    metric_names,
    prune_linear,
    register_metric,
)
from ace_triton.kernels.column_scale import ColumnScale
from ace_triton.kernels.weight_sums import relative_importance

METHODS = ["magnitude", "wanda", "ria", "stade", "dass", "cosp", "varp", "ace", "ace-paper", "saap"]


def test_every_method_is_registered_by_the_import_of_the_package():
    """Before any of the tests' own."""
    assert metric_names()[: len(METHODS) + 1] == [*METHODS, "sparsegpt"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sparsity",
    ["2:4", "1:4", "4:8", "16:32", 0.5, "33%", Sparsity(0.5, scope="layer"), Sparsity("2:4", axis="out"),
     Sparsity(0.3, axis="out")],
    ids=str,
)  # fmt: skip
def test_what_is_kept_keeps_its_bits_and_the_rest_is_zero(method, sparsity):
    layer = torch.nn.Linear(64, 32)
    before = layer.weight.detach().clone()
    bias = layer.bias.detach().clone()
    result = prune_linear(layer, torch.randn(6, 8, 64), method, sparsity, name="block.0.q", return_mask=True)
    weight = layer.weight.detach()
    assert torch.equal(weight, torch.where(result.mask, before, 0.0))
    assert int(result.mask.sum()) == result.kept
    assert result.sparsity == pytest.approx(Sparsity.of(sparsity).fraction, abs=0.02)
    assert torch.equal(layer.bias, bias)
    assert result.name == "block.0.q"
    assert layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_floating_dtype(dtype):
    layer = torch.nn.Linear(32, 16, bias=False)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    before = layer.weight.float()
    result = prune_linear(layer, torch.randn(12, 32), "wanda", return_mask=True)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight.float(), torch.where(result.mask, before, 0.0))


def test_a_mask_and_an_in_place_run_agree():
    one = torch.nn.Linear(64, 32)
    other = copy.deepcopy(one)
    tokens = torch.randn(5, 64)
    prune_linear(one, tokens)
    prune_linear(other, tokens, return_mask=True)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced"])
def test_any_strides(layout):
    dense = torch.randn(16, 32)
    if layout == "transposed":
        strided = dense.t().contiguous().t()
    elif layout == "strided":
        strided = torch.randn(16, 64)[:, ::2]
        strided.copy_(dense)
    else:
        strided = torch.randn(16, 40)[:, 4:36]
        strided.copy_(dense)
    layer, plain = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
    layer.weight = torch.nn.Parameter(strided)
    plain.weight = torch.nn.Parameter(dense)
    tokens = torch.randn(7, 32)
    for sparsity in ("2:4", 0.5):
        prune_linear(layer, tokens, "ria", sparsity)
        prune_linear(plain, tokens, "ria", sparsity)
        assert torch.equal(layer.weight, plain.weight)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    conv, linear = Conv1D(16, 32), torch.nn.Linear(32, 16)
    linear.weight.data = conv.weight.detach().t().contiguous()
    linear.bias.data = conv.bias.detach().clone()
    tokens = torch.randn(3, 5, 32)
    prune_linear(conv, tokens)
    prune_linear(linear, tokens)
    assert torch.equal(conv.weight.t(), linear.weight)


def test_statistics_and_raw_tokens_agree():
    layer = torch.nn.Linear(32, 16)
    other = copy.deepcopy(layer)
    tokens = torch.randn(4, 9, 32)
    prune_linear(layer, tokens, "ace")
    prune_linear(other, ActivationStats.from_tokens(tokens, layer=other), "ace")
    assert torch.equal(layer.weight, other.weight)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 65504.0]), min_size=32, max_size=32),
    sparsity=st.sampled_from(["2:4", "4:8", "1:2", 0.5]),
)
@settings(max_examples=40, deadline=None)
def test_ties_prune_the_lower_index_first(values, sparsity):
    layer = torch.nn.Linear(16, 2, bias=False)
    layer.weight.data = torch.tensor(values).reshape(2, 16)
    result = prune_linear(layer, None, "magnitude", sparsity, return_mask=True)
    size = result.mask.shape[1] if isinstance(sparsity, float) else int(sparsity[2:])
    scores = torch.tensor(values).abs().reshape(-1, size)
    mask = result.mask.reshape(-1, size)
    drop = size - int(mask[0].sum())
    for score, kept in zip(scores, mask, strict=True):
        pruned_first = score.argsort(stable=True)
        assert not bool(kept[pruned_first[:drop]].any())
        assert bool(kept[pruned_first[drop:]].all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "tokens"])
@pytest.mark.parametrize("method", ["wanda", "ria", "ace", "ace-paper", "dass"])
@pytest.mark.parametrize("collected", [False, True])
def test_numbers_that_are_none_change_nothing(bad, where, method, collected):
    layer, name = torch.nn.Linear(32, 16), "model.layers.3.mlp.up_proj"
    tokens = torch.randn(12, 32)
    stats = tokens
    if collected and where == "weight":
        stats = ActivationStats.from_tokens(tokens, layer=layer, reduce="abs")
        stats.consumer_norm = torch.rand(16)
    with torch.no_grad():
        (layer.weight if where == "weight" else tokens)[3, 5] = bad
    before = layer.weight.detach().clone()
    blamed = "the weight holds NaN" if where == "weight" else ""
    with pytest.raises((PruneError, StatsError), match=f"^{name}: {blamed}"):
        prune_linear(layer, stats, method, name=name)
    assert torch.equal(before.view(torch.int32), layer.weight.detach().view(torch.int32))


@pytest.mark.parametrize(("method", "term"), [("ace-paper", "coupling"), ("dass", "row")])
def test_a_term_of_the_layer_alone_is_looked_at(method, term):
    layer, tokens = torch.nn.Linear(32, 16), torch.randn(12, 32)
    stats = ActivationStats.from_tokens(tokens, layer=layer, reduce="abs")
    stats.consumer_norm = torch.rand(16)
    stats.consumer_norm[3] = stats.outputs.matrix[3, 5] = torch.nan
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match=f"NaN or infinity in the score's {term}"):
        prune_linear(layer, stats, method)
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("method", "update"),
    [("sparsegpt", None), ("sparsegpt", "lstsq"), ("ria", "rescale"), ("raises", None), ("matrix", None)],
)
def test_a_weight_that_is_not_finite_is_blamed_whatever_reads_it_first(method, update, dtype):
    @register_metric("raises")
    def raises(weight, stats):
        raise ArithmeticError("NaN")

    register_metric("matrix")(lambda weight, stats: torch.ones_like(weight))
    layer, tokens = torch.nn.Linear(32, 16, dtype=dtype), torch.randn(40, 32)
    stats = ActivationStats.from_tokens(tokens, gram=True, sample=True)
    with torch.no_grad():
        layer.weight[3, 5] = torch.nan
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match=r"^up: the weight holds NaN"):
        prune_linear(layer, stats, method, update=update, name="up")
    assert torch.equal(before.nan_to_num(), layer.weight.nan_to_num())


def test_an_error_of_a_metric_is_its_own_if_the_weight_is_finite():
    @register_metric("raises")
    def raises(weight, stats):
        raise ArithmeticError("no NaN")

    with pytest.raises(ArithmeticError, match="no NaN"):
        prune_linear(torch.nn.Linear(32, 16), torch.randn(40, 32), "raises")


@pytest.mark.parametrize("name", ["row", "col", "scale"])
def test_terms_that_a_metric_puts_in_place_of_checked_ones_are_checked(name):
    @register_metric("changed")
    def changed(weight, stats):
        terms = relative_importance(weight, ColumnScale(base=stats.norm))
        return replace(terms, **{name: terms.tensors[name] / 0})

    layer = torch.nn.Linear(32, 16)
    before = layer.weight.detach().clone()
    with pytest.raises(PruneError, match=f"NaN or infinity in the score's {name}"):
        prune_linear(layer, ActivationStats.from_tokens(torch.randn(40, 32)), "changed")
    assert torch.equal(before, layer.weight)


def test_a_weight_tied_in_the_callers_model_is_refused():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(16, 32), "head": torch.nn.Linear(32, 16, bias=False)})
    head = model["head"]
    head.weight = model["embed"].weight
    dense = head.weight.detach().clone()
    with pytest.raises(PruneError, match=r"^head: its weight is tied to embed\.weight, which would be pruned with it"):
        prune_linear(head, torch.randn(4, 32), name="head", model=model)
    assert torch.equal(head.weight, dense)
    head.weight = torch.nn.Parameter(dense)
    assert prune_linear(head, torch.randn(4, 32), model=model).kept == 16 * 32 / 2
    assert not torch.equal(head.weight, model["embed"].weight)


def test_ties_are_looked_for_in_the_callers_model_alone():
    """Neither other objects of the interpreter nor a module that was never initialized matter."""
    head, half_made = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear.__new__(torch.nn.Linear)
    held = [head.weight, torch.optim.SGD(head.parameters()), torch.nn.Embedding(16, 32, _weight=head.weight)]
    prune_linear(head, torch.randn(4, 32))
    assert held[0] is head.weight
    assert half_made.__dict__.get("_parameters") is None
    prune_linear(head, torch.randn(4, 32), model=torch.nn.ModuleList([head]))


def test_a_weight_that_overlaps_another_in_memory_is_tied():
    storage = torch.randn(24, 32)
    parts = {"whole": storage, "upper": storage[:16], "left": storage[:, :16], "right": storage[:, 16:]}
    layers = {name: torch.nn.Linear(part.shape[1], part.shape[0], bias=False) for name, part in parts.items()}
    for name, part in parts.items():
        layers[name].weight = torch.nn.Parameter(part)
    for name in ("upper", "left"):
        pair = torch.nn.ModuleDict({"first": layers["whole"], "second": layers[name]})
        with pytest.raises(PruneError, match=r"tied to second\.weight"):
            prune_linear(layers["whole"], torch.randn(4, 32), model=pair)
        with pytest.raises(PruneError, match=r"tied to first\.weight"):
            prune_linear(layers[name], torch.randn(4, layers[name].in_features), model=pair)
    halves = torch.nn.ModuleDict({name: layers[name] for name in ("left", "right")})
    right = storage[:, 16:].clone()
    prune_linear(layers["left"], torch.randn(4, 16), model=halves)
    assert torch.equal(storage[:, 16:], right)


def parametrized_weight_norm(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)


def parametrized_spectral_norm(layer):
    torch.nn.utils.parametrizations.spectral_norm(layer)


def masked(layer):
    torch.nn.utils.prune.random_unstructured(layer, "weight", 0.25)


def masked_twice(layer):
    masked(layer)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.25)


def set_by_hand(layer):
    weight = layer.weight.detach()
    del layer._parameters["weight"]
    layer.weight = weight


COMPUTED = [
    (parametrized_weight_norm, "remove_parametrizations", torch.nn.utils.parametrize.remove_parametrizations),
    (parametrized_spectral_norm, "remove_parametrizations", torch.nn.utils.parametrize.remove_parametrizations),
    (torch.nn.utils.weight_norm, "remove_weight_norm", lambda layer, _: torch.nn.utils.remove_weight_norm(layer)),
    (torch.nn.utils.spectral_norm, "remove_spectral_norm", lambda layer, _: torch.nn.utils.remove_spectral_norm(layer)),
    (masked, r"prune\.remove", torch.nn.utils.prune.remove),
    (masked_twice, r"prune\.remove", torch.nn.utils.prune.remove),
    (set_by_hand, r"nn\.Parameter", lambda layer, _: setattr(layer, "weight", torch.nn.Parameter(layer.weight))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("compute", "remedy", "make_permanent"), COMPUTED)
def test_a_computed_weight_is_refused_and_the_remedy_works(compute, remedy, make_permanent):
    layer = torch.nn.Linear(32, 16)
    compute(layer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(PruneError, match=rf"^up: its weight is computed.* make it permanent first: .*{remedy}"):
        prune_linear(layer, None, "magnitude", name="up")
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    make_permanent(layer, "weight")
    prune_linear(layer, None, "magnitude")
    layer(torch.randn(2, 32))
    assert ((layer.weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


@pytest.mark.parametrize("method", ["wanda", "ace", "ria"])
def test_another_device_than_the_weights_is_named(method):
    layer, tokens = torch.nn.Linear(32, 16), torch.randn(8, 32)
    stats = ActivationStats.from_tokens(tokens, layer=layer)
    with pytest.raises(StatsError, match=r"^up: statistics on meta, weight on cpu: use stats\.to\(device\)$"):
        prune_linear(layer, stats.to("meta"), method, name="up")
    with pytest.raises(StatsError, match=r"^up: tokens on meta, weight on cpu: use tokens\.to\(device\)$"):
        prune_linear(layer, tokens.to("meta"), method, name="up")
    prune_linear(layer, stats, method)


def test_what_cannot_be_pruned_says_why():
    tokens = torch.randn(4, 30)
    with pytest.raises(PruneError, match="Embedding is no"):
        prune_linear(torch.nn.Embedding(4, 4), tokens)
    with pytest.raises(PruneError, match="multiple of 4"):
        prune_linear(torch.nn.Linear(30, 8), tokens)
    with pytest.raises(PruneError, match="meta device"):
        prune_linear(torch.nn.Linear(30, 8, device="meta"), tokens)
    quantised = torch.nn.Linear(30, 8)
    quantised.weight = torch.nn.Parameter(torch.zeros(8, 30, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PruneError, match="quantized"):
        prune_linear(quantised, tokens, "wanda", 0.5)
    layer = torch.nn.Linear(30, 8)
    with pytest.raises(StatsError, match="ActivationStats or the raw tokens"):
        prune_linear(layer, None, "wanda", 0.5)
    with pytest.raises(StatsError, match="30"):
        prune_linear(layer, torch.randn(4, 31), "wanda", 0.5)
    with pytest.raises(StatsError, match="no token"):
        prune_linear(layer, ActivationStats(30), "wanda", 0.5)
    with pytest.raises(ValueError, match="unknown method"):
        prune_linear(layer, tokens, "obs")


def unwilling(kind: str) -> torch.nn.Linear:
    """A layer whose weight no kernel can work on where it lies."""
    layer = torch.nn.Linear(16, 8)
    weight = layer.weight.detach().clone()
    if kind == "fake":
        with FakeTensorMode():
            return torch.nn.Linear(16, 8)
    if kind == "freed":
        layer.weight.data = torch.cat([weight, weight])[8:]
        layer.weight.untyped_storage().resize_(0)
    elif kind == "sparse":
        layer.weight = torch.nn.Parameter(weight.to_sparse())
    elif kind == "expanded":
        layer.weight = torch.nn.Parameter(weight[:1].expand(8, 16))
    elif kind == "overlapping":
        layer.weight = torch.nn.Parameter(torch.ones(100).as_strided((8, 16), (8, 1)))
    return layer


@pytest.mark.parametrize("method", ["magnitude", "ace"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fake", "the weight is a FakeTensor"),
        ("freed", "the weight cannot be read: .* has no memory"),
        ("sparse", "the weight is sparse"),
        ("expanded", ".* share memory with each other"),
        ("overlapping", ".* share memory with each other"),
    ],
)
def test_weights_without_memory_of_their_own_are_refused(kind, message, method):
    layer, tokens = unwilling(kind), torch.randn(6, 16)
    for stats in (tokens, ActivationStats.from_tokens(tokens, layer=torch.nn.Linear(16, 8))):
        with pytest.raises(PruneError, match=f"q: {message}"):
            prune_linear(layer, stats, method, name="q")


@pytest.mark.parametrize("method", METHODS)
def test_torchs_defaults_change_no_mask(method):
    tokens, masks = torch.randn(4, 5, 64), []
    layer = torch.nn.Linear(64, 32)
    before = torch.get_default_dtype()
    try:
        for dtype, device in ((torch.float32, None), (torch.bfloat16, None), (torch.float64, None), (before, "meta")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            pruned = copy.deepcopy(layer)
            masks.append(prune_linear(pruned, tokens, method, return_mask=True).mask)
            assert torch.equal(pruned.weight != 0, masks[0])
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", ["row", "scale", "coupling"])
def test_a_metric_that_gives_numbers_below_zero_is_refused(where, shared):
    def below_zero(weight, stats):
        shape = {"row": weight.shape[:1], "scale": weight.shape[1:], "coupling": weight.shape}[where]
        term = torch.full(shape, 2.0)
        term.view(-1)[3] = -1
        return ScoreTerms(**{where: stats.derive("below zero", lambda: term) if shared else term})

    register_metric("below_zero")(below_zero)
    layer = torch.nn.Linear(16, 8)
    before = layer.weight.detach().clone()
    for sparsity in ("2:4", 0.5, Sparsity(0.5, axis="out")):
        with pytest.raises(PruneError, match=f"'below_zero' gives numbers below 0 in the score's {where}"):
            prune_linear(layer, torch.randn(6, 16), "below_zero", sparsity)
    assert torch.equal(layer.weight, before)


def test_statistics_whose_logarithm_is_below_zero_are_no_score():
    """Norms below 1: what chose opposite masks on the compiled library and in plain torch."""

    @register_metric("log_norm")
    def log_norm(weight, stats):
        return ScoreTerms(scale=stats.norm.log())

    with pytest.raises(PruneError, match="numbers below 0 in the score's scale"):
        prune_linear(torch.nn.Linear(16, 8), torch.randn(6, 16) / 100, "log_norm")
