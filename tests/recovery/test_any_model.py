"""Recovery of encoders, vision models and encoder-decoders."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from ace_triton import RecoveryError, RecoverySettings, prune_model, recover_model
from ace_triton.decoders.calibration_forms import batches_of
from ace_triton.errors import ArgumentError
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.output_distillation import OutputDistillation
from tests.decoders import small_towers

SHORT = RecoverySettings(steps=6, learning_rate=0.03, forward_dtype=torch.float32)


def text_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Token ids whose second sequence has padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[1, 5:] = 0
        found.append({"input_ids": torch.randint(3, 99, (2, 8), generator=generator), "attention_mask": mask})
    return found


def image_batches() -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in (1, 2)]


def batches_for(kind: str) -> list[dict[str, torch.Tensor]]:
    if kind == "vit":
        return image_batches()
    text = text_batches()
    return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in text] if kind == "t5" else text


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A pruned model and its dense teacher."""
    torch.manual_seed(0)
    teacher = getattr(small_towers, kind)().eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # Random weights of the usual size change the hidden states too little.
    model = copy.deepcopy(teacher)
    prune_model(model, batches_for(kind), "wanda", "2:4")
    return model, teacher


@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
def test_the_loss_falls_and_zeros_stay(kind):
    model, teacher = pair(kind)
    before, masks = {n: p.clone() for n, p in model.state_dict().items()}, pruned_masks(model)
    report = recover_model(model, teacher, batches_for(kind), RecoverySettings(steps=15, learning_rate=0.02))
    assert sum(report.losses[-3:]) < 0.8 * sum(report.losses[:3])
    for name, tensor in model.state_dict().items():
        if name in masks:
            assert bool((tensor[~masks[name]] == 0).all()), name
            assert not torch.equal(tensor, before[name]), f"{name} did not move"
        else:
            assert torch.equal(tensor, before[name]), f"{name} moved"
    tokens = 0 if kind == "vit" else 13 * 15
    assert (report.steps, report.tokens, report.zeros) == (15, tokens, sum(int((~m).sum()) for m in masks.values()))


def test_the_loss_is_the_relative_error_of_blocks_and_the_distance_of_embeddings():
    model, teacher = pair("bert")
    inputs = text_batches(1)[0]
    valid = inputs["attention_mask"].bool()
    one, other = (m(**inputs, output_hidden_states=True) for m in (model, teacher))
    errors = [
        ((a - b)[valid].square().sum() / b[valid].square().sum()).item()
        for a, b in zip(one.hidden_states[1:], other.hidden_states[1:], strict=True)
    ]
    pooled = [torch.stack([row[keep].mean(0) for row, keep in zip(o[0], valid, strict=True)]) for o in (one, other)]
    expected = sum(errors) / len(errors) + 1 - nn.functional.cosine_similarity(*pooled).mean().item()
    report = recover_model(model, teacher, [inputs], RecoverySettings(steps=1, forward_dtype=torch.float32))
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)


def test_predictions_are_compared_by_their_divergence():
    model, teacher = pair("vit")
    inputs = image_batches()[0]
    batch = batches_of(model, [inputs], None)[0]
    loss = OutputDistillation(model, teacher, batch, "mean", torch.float32)
    assert loss.terms == ("hidden states", "predictions")
    with torch.no_grad():
        p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (teacher, model))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    loss._hidden = False
    assert loss.backward(batch) == pytest.approx(divergence, rel=1e-4)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    (whole, teacher), (parted, _) = pair("bert"), pair("bert")
    batches = text_batches()
    expected = recover_model(whole, teacher, batches, SHORT)

    def stop(spent: float, budget: float, loss: float) -> None:
        if spent == 4:
            raise KeyboardInterrupt

    keeping = {"state": tmp_path / "state.pt", "save_every": 0.0}
    start = copy.deepcopy(parted)
    with pytest.raises(KeyboardInterrupt):
        recover_model(parted, teacher, batches, SHORT, progress=stop, **keeping)
    report = recover_model(start, teacher, batches, SHORT, **keeping)
    assert report.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), whole.parameters(), strict=True))
    with pytest.raises(RecoveryError, match="other settings, text, weights or teacher"):
        recover_model(pair("bert")[0], teacher, batches[:2], SHORT, **keeping)


def test_what_cannot_be_trained_is_refused():
    model, teacher = pair("bert")
    with pytest.raises(RecoveryError, match="prune the model first"):
        recover_model(copy.deepcopy(teacher), teacher, text_batches(), SHORT)
    with pytest.raises(RecoveryError, match="same zeros"):
        recover_model(model, copy.deepcopy(model), text_batches(), SHORT)
    with pytest.raises(Exception, match="pooling 'max': use mean, cls, last"):
        recover_model(model, teacher, text_batches(), SHORT, pooling="max")
    with pytest.raises(ArgumentError, match=r"has more than 10,000 batches, .*: give a list of fewer"):
        recover_model(model, teacher, itertools.repeat(text_batches(1)[0]), SHORT)
    with pytest.raises(ArgumentError, match=r"one batch, a dict with input_ids, .* in a list, \[batch\]"):
        recover_model(model, teacher, text_batches(1)[0], SHORT)
    with pytest.raises(RecoveryError, match=r"both models in float32, not torch\.bfloat16"):
        recover_model(copy.deepcopy(model).bfloat16(), copy.deepcopy(teacher).bfloat16(), text_batches(), SHORT)
