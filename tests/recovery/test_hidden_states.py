"""The distance of hidden states in the loss of a recovery: its value and gradient, and models it does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton import RecoverySettings, prune_model, recover
from ace_triton.decoders.blocks import find_blocks
from ace_triton.errors import RecoveryError
from ace_triton.recovery import distillation
from ace_triton.recovery.distillation import Distillation
from ace_triton.recovery.hidden_states import distance

WEIGHT = 0.5


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (5, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pair(make_decoder, ids):
    """pair(family): a pruned model and its dense teacher."""

    def make(family: str, **options: float) -> tuple[nn.Module, nn.Module]:
        model, teacher = (make_decoder(family, **options) for _ in range(2))
        prune_model(model, ids, "wanda", "2:4")
        return model, teacher

    return make


def hidden_states_of(model: nn.Module, text: torch.Tensor) -> list[torch.Tensor]:
    """The blocks' outputs; transformers returns the last one after the final norm, so it is left out here."""
    return list(model(text, use_cache=False, output_hidden_states=True).hidden_states[1:-1])


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("gemma3_text", {"final_logit_softcapping": 30.0})], ids=["hidden", "whole"]
)
def test_the_distance_is_the_one_of_the_definition(monkeypatch, pair, text, family, options):
    """With logits in chunks, and with whole logits in parts of two sequences."""
    monkeypatch.setattr(distillation, "WHOLE_TOKENS", 24)
    model, teacher = pair(family, **options)
    blocks, n_blocks = find_blocks(model), len(find_blocks(model))
    parameters = [p for block in blocks[:-1] for p in block.module.parameters() if p.dim() > 1]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.no_grad():
        wanted = hidden_states_of(teacher, text)
    loss = torch.zeros(())
    for given, target in zip(hidden_states_of(model, text), wanted, strict=True):
        loss = loss + ((given - target).square().mean(2) / target.var(2)).mean() / n_blocks
    last = [block.module for block in (blocks[-1], find_blocks(teacher)[-1])]
    outputs: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, a, out: outputs.append(out if torch.is_tensor(out) else out[0])) for m in last
    ]
    model(text, use_cache=False), teacher(text, use_cache=False)
    for hook in hooks:
        hook.remove()
    loss = loss + ((outputs[0] - outputs[1].detach()).square().mean(2) / outputs[1].detach().var(2)).mean() / n_blocks

    alone = Distillation(model, teacher, text, torch.float32).backward(text)
    without = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    told = Distillation(model, teacher, text, torch.float32, WEIGHT).backward(text)
    assert told - alone == pytest.approx(WEIGHT * float(loss.detach()), rel=1e-4)
    slopes = torch.autograd.grad(WEIGHT * loss, parameters)
    for parameter, before, slope in zip(parameters, without, slopes, strict=True):
        torch.testing.assert_close(parameter.grad, before + slope, rtol=1e-3, atol=1e-6)


def test_training_on_hidden_states_brings_them_closer(pair, text):
    model, teacher = pair("llama")
    settings = RecoverySettings(steps=20, tokens_per_step=60, learning_rate=0.01, hidden_states=5.0)
    report = recover(model, teacher, text, settings)
    assert report.losses[-1] < 0.8 * report.losses[0]


def test_blocks_that_differ_are_refused(pair, make_decoder, text):
    model, _ = pair("llama")
    settings = RecoverySettings(steps=1, tokens_per_step=60, hidden_states=1.0)
    deeper = make_decoder("llama", num_hidden_layers=4)
    with pytest.raises(RecoveryError, match=r"blocks, the teacher 4, or their names differ: leave hidden_states"):
        recover(model, deeper, text, settings)
    wider = make_decoder("llama", hidden_size=64)
    with pytest.raises(RecoveryError, match=r"differ, \(32,\) and \(64,\): leave hidden_states"):
        recover(model, wider, text, settings)


def test_tokens_whose_teacher_has_equal_hidden_states_count_nothing():
    wanted = torch.tensor([[[0.0, 0.0], [7.0, 7.0], [1e-9, 3e-9]]])
    given = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [3e-9, 3e-9]]], requires_grad=True)
    total = distance([given], [wanted])
    assert float(total.detach()) == pytest.approx(1.0)  # mean(4e-18, 0) / 2e-18
    total.backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())
    assert not bool(given.grad[0, :2].any())


@pytest.mark.parametrize("weight", ["1", None, True, float("nan"), -1.0])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(RecoveryError, match=f"hidden_states must be 0 or above, and finite; got {weight!r}"):
        RecoverySettings(steps=1, hidden_states=weight)


def test_a_loss_that_overflows_names_the_weight(pair, text):
    model, teacher = pair("llama")
    settings = RecoverySettings(steps=3, tokens_per_step=60, hidden_states=1e38)
    with pytest.raises(RecoveryError, match=r"learning rate, or a weight of hidden states .* below 1e\+38"):
        recover(model, teacher, text, settings)
