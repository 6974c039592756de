"""The metrics compared with their formulas and with each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton import ActivationStats, ScoreTerms, StatsError, metric_names, prune_linear, register_metric
from ace_triton.kernels.score_terms import scores_reference
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.methods.ace import cosp, varp
from ace_triton.methods.registry import _REGISTRY, metric
from ace_triton.methods.wanda_ria import ria, stade, wanda
from ace_triton.statistics.outputs import OutputStats, update_outputs

seeds = st.integers(0, 10_000)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_24(weight: torch.Tensor, terms: ScoreTerms) -> torch.Tensor:
    return select_nm(weight, terms, 2, 4, output="mask")


def stats_of(tokens: torch.Tensor, weight: torch.Tensor | None = None) -> ActivationStats:
    if weight is None:
        return ActivationStats.from_tokens(tokens)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return ActivationStats.from_tokens(tokens, layer=layer, reduce="abs")


@given(seed=seeds, exponent=st.integers(-8, 8))
@settings(max_examples=20, deadline=None)
def test_wanda_ignores_the_scale_and_the_number_of_sequences(seed, exponent):
    weight, tokens = drawn(seed, 16, 32), drawn(seed + 1, 6, 4, 32)
    mask = mask_24(weight, wanda(weight, stats_of(tokens)))
    assert torch.equal(mask, mask_24(weight, wanda(weight, stats_of(tokens * 4.0**exponent))))
    assert torch.equal(mask, mask_24(weight, wanda(weight, stats_of(tokens.reshape(24, 1, 32)))))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_permuting_channels_permutes_the_mask(seed):
    weight, tokens = drawn(seed, 16, 32), drawn(seed + 1, 6, 4, 32)
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(32, generator=generator)
    groups = (torch.randperm(8, generator=generator)[:, None] * 4 + torch.arange(4)).flatten()
    terms = wanda(weight, stats_of(tokens))
    rows = select_rows(weight, terms, 16, output="mask")
    permuted = weight[:, channels].contiguous()
    assert torch.equal(
        rows[:, channels], select_rows(permuted, wanda(permuted, stats_of(tokens[..., channels])), 16, output="mask")
    )
    permuted = weight[:, groups].contiguous()
    assert torch.equal(
        mask_24(weight, terms)[:, groups], mask_24(permuted, wanda(permuted, stats_of(tokens[..., groups])))
    )


@pytest.mark.parametrize("norm", ["max_layer", "max_sequence", "channel", "frobenius"])
def test_varp_ignores_the_scale(norm):
    squares = drawn(0, 5, 24).square()
    torch.testing.assert_close(
        variance_factor(squares, norm, 1.0, 0.01), variance_factor(squares * 1024, norm, 1.0, 0.01), rtol=0, atol=0
    )


def test_varp_of_identical_sequences_is_the_base():
    tokens = drawn(3, 1, 6, 32).expand(5, 6, 32)
    factor = variance_factor(stats_of(tokens).sequence_square, "channel", 1.0, 0.01)
    torch.testing.assert_close(factor, factor[:1].expand(32))
    weight = drawn(4, 16, 32)
    stats = stats_of(tokens)
    assert torch.equal(
        mask_24(weight, varp(weight, stats, base="wanda", norm="channel")), mask_24(weight, wanda(weight, stats))
    )


def test_varp_factor_by_hand():
    squares = torch.tensor([[1.0, 4.0, 0.0], [2.0, 1.0, 0.0]])
    y = 0.99 * squares / 4
    torch.testing.assert_close(variance_factor(squares, "max_layer", 1.0, 0.01), (1 / (1 - y)).mean(0))
    torch.testing.assert_close(variance_factor(squares, "max_layer", 0.5, 0.01), (1 - y).pow(-0.5).mean(0))
    stats = stats_of(drawn(0, 4, 3, 8))
    weight = drawn(1, 4, 8)
    up = varp(weight, stats, base="magnitude", sign=1).scale
    down = varp(weight, stats, base="magnitude", sign=-1).scale
    torch.testing.assert_close(up * down, torch.ones(8))


def test_published_cosp_loss_sums_to_one_for_a_token():
    weight, token = drawn(5, 6, 9), drawn(6, 1, 9)
    output = token @ weight.t()
    stats = stats_of(token, weight)
    signed = weight * stats.outputs.mean_coupling() * (output.t() @ token).sign()
    assert float(signed.sum()) == pytest.approx(1, abs=1e-5)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_separable_cosp_collapses_to_wanda(seed):
    weight, stats = drawn(seed, 16, 32), stats_of(drawn(seed + 1, 4, 8, 32))
    separable = torch.outer(drawn(seed + 2, 16).abs() + 0.1, stats.norm)
    collapsed = ScoreTerms(scale=stats.norm, coupling=separable.contiguous(), power=2)
    assert torch.equal(mask_24(weight, collapsed), mask_24(weight, wanda(weight, stats)))


def test_exact_cosp_is_the_leading_term_of_the_cosine_loss():
    weight, tokens = drawn(7, 256, 64).double() / 8, drawn(8, 12, 64).double()
    outputs = tokens @ weight.t()
    stats = stats_of(tokens.float(), weight.float())
    vector = cosp(weight.float(), stats).scale.double()
    for i, j in [(0, 0), (100, 33), (255, 63)]:
        change = tokens[:, j] * 1e-2 / 8
        pruned = outputs.clone()
        pruned[:, i] -= change
        loss = (1 - torch.cosine_similarity(outputs, pruned, dim=1)).mean()
        leading = (1e-2 / 8 * vector[j]).square() / 2
        correction = (change.square() * outputs[:, i].square() / (2 * outputs.square().sum(1).square())).mean()
        assert float(leading - correction) == pytest.approx(float(loss), rel=1e-3)
        published = (change * outputs[:, i] / outputs.square().sum(1)).mean()
        assert not math.isclose(float(published), float(loss), rel_tol=0.5)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_exact_cosp_of_outputs_of_equal_norm_is_wanda(seed):
    weight, tokens = drawn(seed, 8, 32), drawn(seed + 1, 20, 32)
    outputs = torch.nn.functional.normalize(drawn(seed + 2, 20, 8), dim=1)
    stats = ActivationStats.from_tokens(tokens, layer=torch.nn.Linear(32, 8))
    stats.outputs = OutputStats()
    update_outputs([stats.outputs], tokens, [outputs])
    torch.testing.assert_close(
        cosp(weight, stats).scale / stats.norm, torch.full((32,), 1 / math.sqrt(20)), rtol=1e-5, atol=0
    )


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_dass_along_inputs_is_magnitude(seed):
    weight, stats = drawn(seed, 16, 32), stats_of(drawn(seed + 1, 4, 8, 32))
    stats.consumer_norm = drawn(seed + 2, 16).abs() + 0.1
    terms = metric("dass").terms(weight, stats)
    assert torch.equal(mask_24(weight, terms), mask_24(weight, ScoreTerms()))
    assert not torch.equal(
        select_nm(weight, terms, 2, 4, axis="out", output="mask"),
        select_nm(weight, ScoreTerms(), 2, 4, axis="out", output="mask"),
    )


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_stade_of_zero_mean_channels_is_wanda(seed):
    half = drawn(seed, 10, 32)
    stats = stats_of(torch.cat([half, -half]))
    weight = drawn(seed + 1, 8, 32)
    torch.testing.assert_close(stade(weight, stats).scale * math.sqrt(20), wanda(weight, stats).scale)


def test_ria_of_equal_sums_without_activations_is_magnitude():
    circulant = torch.stack([drawn(9, 16).roll(i) for i in range(16)])
    terms = ria(circulant, stats_of(drawn(10, 4, 16)), a=0.0)
    assert torch.equal(mask_24(circulant, terms), mask_24(circulant, ScoreTerms()))


def test_ria_by_its_formula():
    weight, stats = drawn(11, 12, 20), stats_of(drawn(12, 5, 4, 20))
    magnitude = weight.abs()
    formula = (magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)) * stats.norm.sqrt()
    torch.testing.assert_close(scores_reference(weight, ria(weight, stats)), formula)


def test_ria_of_a_dead_row_and_column_stays_finite():
    weight = drawn(13, 8, 8)
    weight[2], weight[:, 5] = 0, 0
    scores = scores_reference(weight, ria(weight, stats_of(drawn(14, 4, 8))))
    assert bool(scores.isfinite().all())
    assert bool((scores[2] == 0).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "stade", "cosp", "varp", "ace", "ace-paper", "saap"])
def test_no_random_mask_keeps_a_higher_score(method):
    weight, tokens = drawn(15, 16, 32), drawn(16, 4, 8, 32)
    terms = metric(method).terms(weight, stats_of(tokens, weight))
    scores = scores_reference(weight, terms).double()
    best = scores[mask_24(weight, terms)].sum()
    for seed in range(50):
        anything = select_nm(drawn(seed, 16, 32), ScoreTerms(), 2, 4, output="mask")
        assert scores[anything].sum() <= best


def test_ace_is_the_product_of_its_parts():
    weight, stats = drawn(17, 8, 16), stats_of(drawn(18, 4, 6, 16), drawn(17, 8, 16))
    relative = scores_reference(weight, ria(weight, stats, a=0.0))
    turned = stats.outputs.mean_weighted_square().sqrt().float()
    factor = varp(weight, stats, base="magnitude", norm="frobenius").scale
    for power in (1, 0.75, 0.5):
        scores = scores_reference(weight, metric("ace").terms(weight, stats, a=power))
        torch.testing.assert_close(scores, relative * (turned / factor) ** power)
    torch.testing.assert_close(
        scores_reference(weight, metric("ace").terms(weight, stats, base="ria", sign=1)),
        scores_reference(weight, ria(weight, stats)) * scores_reference(weight, cosp(weight, stats)) * factor,
    )


def test_the_published_ace_is_wanda_times_the_published_loss_times_varp():
    weight, stats = drawn(17, 8, 16), stats_of(drawn(18, 4, 6, 16), drawn(17, 8, 16))
    lbar = weight.abs() * stats.outputs.mean_coupling()
    factor = varp(weight, stats, base="magnitude").scale
    scores = scores_reference(weight, metric("ace-paper").terms(weight, stats))
    ratio = scores / (weight.abs() * stats.norm * lbar * factor)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_saap_ranks_by_the_product_of_both_importances():
    weight, tokens = drawn(19, 8, 16), drawn(20, 4, 6, 16)
    stats = stats_of(tokens)
    own = weight.abs() * stats.norm
    fused = own * own.sum(0)
    scores = scores_reference(weight, metric("saap").terms(weight, stats))
    torch.testing.assert_close(scores, fused)


def test_built_in_methods_come_first_and_by_family():
    families = ["magnitude", "wanda", "ria", "stade", "dass", "cosp", "varp", "ace", "ace-paper", "saap", "sparsegpt"]
    assert metric_names()[: len(families)] == families


def test_a_metric_of_ones_own():
    @register_metric("last_channels")
    def last_channels(weight, stats, bonus=1.0):
        return ScoreTerms(scale=torch.arange(weight.shape[1]).float() * bonus)

    layer = torch.nn.Linear(8, 2)
    torch.nn.init.ones_(layer.weight)
    prune_linear(layer, torch.randn(3, 8), "last_channels", bonus=2.0)
    assert layer.weight[0].tolist() == [0, 0, 1, 1] * 2
    assert "last_channels" in metric_names()
    with pytest.raises(ValueError, match=r"bonus=1\.0"):
        prune_linear(layer, torch.randn(3, 8), "last_channels", malus=2.0)


def test_a_metric_that_did_not_declare_its_statistics_is_told_how(monkeypatch):
    monkeypatch.setattr("ace_triton.methods.registry._REGISTRY", dict(_REGISTRY))

    @register_metric("undeclared")
    def undeclared(weight, stats):
        return ScoreTerms(scale=stats.gram.matrix.diagonal())

    with pytest.raises(StatsError, match=r"the metric reads a statistic that was not collected .*gram=True"):
        prune_linear(torch.nn.Linear(8, 4), torch.randn(3, 8), "undeclared")


def test_wrong_choices_say_what_there_is():
    weight, stats = drawn(0, 8, 8), stats_of(drawn(1, 4, 8))
    with pytest.raises(ValueError, match="wanda"):
        metric("wnada")
    for options in ({"base": "x"}, {"norm": "x"}, {"sign": 2}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            varp(weight, stats, **options)
    with pytest.raises(StatsError, match="layer="):
        cosp(weight, stats)
    with pytest.raises(StatsError, match="reduce="):
        cosp(weight, stats_of(drawn(1, 4, 8), weight), reduce="rms")
    with pytest.raises(ValueError, match="prefactor"):
        cosp(weight, stats_of(drawn(1, 4, 8), weight), prefactor="x")
    for options in ({"a": 0.6}, {"a": 0.5, "reduce": "abs"}):
        with pytest.raises(ValueError, match=r"ACE's a must be 1, 0\.75 or 0\.5"):
            metric("ace").terms(weight, stats_of(drawn(1, 4, 8), weight), **options)
