"""Quantization with a fixed mask: what it keeps, and what error feedback gains."""

from __future__ import annotations

import pytest
import torch

from ace_triton import ActivationStats, Recipe, prune_linear
from ace_triton.errors import RecipeError
from ace_triton.kernels.pack_nm import pack_nm
from ace_triton.kernels.quantize_nm import quantize_nm
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.solvers.quantize import Quantization, quantized_weight


@pytest.fixture(scope="module")
def stats() -> ActivationStats:
    torch.manual_seed(0)
    tokens = torch.randn(600, 160) @ (torch.randn(160, 160) / 160**0.5 + 0.5 * torch.eye(160))
    tokens[:, 7] = 0
    return ActivationStats.from_tokens(tokens, gram=True)


def pruned(n: int, m: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    weight = (torch.randn(24, 160) * 0.02).to(dtype)
    weight[3] = 0
    return select_nm(weight, ScoreTerms(), n, m)


def output_error(change: torch.Tensor, stats: ActivationStats) -> float:
    return float(((change @ stats.gram.matrix) * change).sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 256])
def test_error_feedback_lowers_the_error_of_the_outputs(stats, bits, group):
    weight = pruned(8, 16)
    mask = weight != 0
    errors = {}
    for rule in ("absmax", "gptq"):
        quantized = quantized_weight(weight, mask, stats, Quantization(bits, group, rule), torch.float32)
        assert not bool(quantized[~mask].any())
        assert not bool(quantized.signbit()[quantized == 0].any())
        errors[rule] = output_error(quantized - weight, stats)
    assert 0 < errors["gptq"] < 0.9 * errors["absmax"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rule", ["absmax", "gptq"])
def test_packing_keeps_the_quantized_weights(stats, dtype, bits, rule):
    weight = pruned(2, 4, dtype)
    by = Quantization(bits, 64, rule)
    quantized = quantized_weight(weight.float(), weight != 0, stats, by, dtype).to(dtype)
    assert torch.equal(unpack_nm(quantize_nm(pack_nm(quantized, 2, 4), bits, 64)), quantized)


@pytest.mark.parametrize("update", [None, "rescale", "lstsq"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_prune_linear_quantizes_after_the_update(method, update):
    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(64, 16, bias=False), torch.randn(200, 64)
    dense = layer.weight.detach().clone()
    results = {}
    for quantize in (None, 8, 4):
        with torch.no_grad():
            layer.weight.copy_(dense)
        mask = prune_linear(layer, tokens, method, "8:16", update=update, quantize=quantize, return_mask=True).mask
        assert not bool(layer.weight.detach()[~mask].any())
        results[quantize] = layer.weight.detach().clone(), mask
    assert torch.equal(results[8][1], results[None][1])
    assert len(results[4][0][0].unique()) <= 15
    changes = [float((results[bits][0] - results[None][0]).norm() / results[None][0].norm()) for bits in (8, 4)]
    assert changes[0] < 0.02 < changes[1] < 0.3


def test_a_recipe_says_how_to_quantize():
    recipe = Recipe("magnitude", sparsity="8:16", quantize={"bits": 4, "rule": "absmax"})
    assert recipe.quantize == Quantization(4, 128, "absmax")
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.words == "magnitude, 4 bits by absmax"
    assert not recipe.calibrated
    assert Recipe("magnitude", quantize=8).needs.gram
    assert "quantize" not in Recipe("magnitude").to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "bits must be one of 8, 4; got 3"),
        ({"bits": 8, "group": 20}, "multiple of 32 above 0 and at most 1048576; got 20"),
        ({"bits": 8, "rule": "round"}, "rule must be one of absmax, gptq; got 'round'"),
        ({"bit": 8}, "no entry 'bit'; its entries: bits, group, rule"),
        ("eight", "quantize must be 8, 4, an ace_triton.Quantization, a dict, or None; got 'eight'"),
    ],
)
def test_a_quantization_that_there_is_not(given, message):
    with pytest.raises(RecipeError, match=message):
        Recipe("magnitude", quantize=given)
