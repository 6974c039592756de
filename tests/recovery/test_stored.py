"""Trained values beyond the range of a model's dtype are stored as its largest number, with a warning."""

from __future__ import annotations

import warnings

import pytest
import torch

from ace_triton import RecoverySettings, prune_model, recover, recover_model
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.stored import as_stored

MOST = torch.finfo(torch.float16).max


def test_finite_values_beyond_the_range_become_its_largest_number_and_others_stay():
    values = torch.tensor([70_000.0, -80_000.0, 65_504.0, 1.5, float("inf"), float("nan")])
    with pytest.warns(UserWarning, match=r"^w: 2 trained values are beyond 65,504, the largest number of .*float16"):
        stored = as_stored("w", values, torch.float16)
    assert stored.dtype == torch.float16
    assert stored[:5].tolist() == [MOST, -MOST, MOST, 1.5, float("inf")]
    assert bool(stored[5].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_in_the_range_are_rounded_without_a_warning(dtype):
    values = torch.randn(100) * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_stored("w", values, dtype), values.to(dtype))


@pytest.mark.parametrize("any_model", [False, True])
def test_weights_that_outgrow_fp16_are_saved_finite(make_decoder, ids, any_model):
    model, teacher = make_decoder("llama"), make_decoder("llama")
    prune_model(model, ids, "wanda", "2:4")
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight.copy_(torch.where(weight != 0, weight.sign() * MOST, weight))
    mask = pruned_masks(model)[name]
    settings = RecoverySettings(steps=2, tokens_per_step=32, learning_rate=0.03)
    train, text = (recover_model, [{"input_ids": ids}]) if any_model else (recover, ids)
    with pytest.warns(UserWarning, match=rf"{name}: \d+ trained values are beyond 65,504"):
        train(model.half(), teacher.half(), text, settings)
    trained = model.get_parameter(name).detach()
    assert bool(trained.isfinite().all())
    assert bool((trained[~mask] == 0).all())
    assert float(trained.abs().max()) == MOST
    assert not bool((trained[mask].abs() == MOST).all())
