"""Group fine-tuning: few values in each group, adapters that merge exactly, and a loss that falls."""

import pytest
import torch

from ace_triton import GroupTuning, RecoveryError, RecoverySettings, prune_model, recover, shrink_model
from ace_triton.processes import Processes
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.groups import adapted, min_max_groups, tuned_layers

TUNING = GroupTuning(bits=3, group=8, rank=4)


@pytest.fixture
def pair(make_decoder, ids):
    """A model that shrink wrote, and its dense teacher."""
    teacher = make_decoder("llama")
    with torch.no_grad():  # random weights predict next to nothing
        teacher.get_output_embeddings().weight.mul_(20)
    return shrink_model(teacher, ids, ratio=0.2, multiple=16, groups=0, method="magnitude").model, teacher


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def check_grid(weight):
    """Each row of each group has at most 2^bits values, with equal steps."""
    for values in weight.unflatten(1, (-1, TUNING.group)).flatten(0, 1):
        low, high = values.min(), values.max()
        steps = (values - low) / ((high - low) / (2**TUNING.bits - 1))
        assert float((steps - steps.round()).abs().max()) < 1e-2
        assert float(steps.max()) == pytest.approx(2**TUNING.bits - 1, abs=1e-2)


def test_groups_are_rounded_between_their_minimum_and_maximum():
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    weight[2, 8:16] = 0.25
    rounded = min_max_groups(weight, TUNING.bits, TUNING.group)
    groups, dense = rounded.unflatten(1, (-1, 8)), weight.unflatten(1, (-1, 8))
    step = (dense.amax(-1) - dense.amin(-1)) / 7
    assert bool(((groups - dense).abs().amax(-1) <= step / 2 + 1e-6).all())
    assert max(len(values.unique()) for values in groups.flatten(0, 1)) <= 8
    assert torch.equal(rounded[2, 8:16], weight[2, 8:16])


def test_adapters_start_at_the_quantized_weights_and_merge_exactly(pair, ids):
    model, _ = pair
    layers = tuned_layers(model, {f"{n}.weight": torch.ones(1) for n, _ in model.named_modules()}, TUNING, shard=False)
    assert len(layers) == 21
    wanted = {name: min_max_groups(layer.weight.detach(), 3, 8) for name, layer in layers.items()}
    with adapted(layers, TUNING, 0, torch.float32, Processes()) as optimizer:
        started = logits_of(model, ids)
        with torch.no_grad():
            for name in optimizer.values:  # In fp32 these are the parameters that forwards read.
                optimizer.values[name].mul_(1.5).add_(0.01)
        for adapter in optimizer._parameters.values():
            adapter.grad = torch.zeros_like(adapter)
        optimizer.step(0.0, 1.0)
        moved = logits_of(model, ids)
    torch.testing.assert_close(logits_of(model, ids), moved, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, started, rtol=1e-2, atol=1e-2)
    for layer in layers.values():
        check_grid(layer.weight.detach())
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with adapted(layers, TUNING, 0, torch.float32, Processes()):
        assert not torch.equal(logits_of(model, ids), moved)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    for name, layer in layers.items():
        layer.weight.data = wanted[name]
    torch.testing.assert_close(started, logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_the_loss_falls_and_a_stopped_run_resumes(pair, ids, tmp_path):
    model, teacher = pair
    again = shrink_model(teacher, ids, ratio=0.2, multiple=16, groups=0, method="magnitude").model
    options = {"tokens_per_step": 96, "learning_rate": 0.03, "forward_dtype": torch.float32, "groups": TUNING}
    report = recover(model, teacher, ids, RecoverySettings(steps=12, **options))
    assert sum(report.losses[-4:]) < 0.97 * sum(report.losses[:4])
    assert report.zeros == 0
    for block in model.model.layers:
        check_grid(block.mlp.down_proj.weight.detach())
    stop = [0]

    def interrupt(*_):
        stop[0] += 1
        if stop[0] == 5:
            raise KeyboardInterrupt

    settings, state = RecoverySettings(steps=12, **options), tmp_path / "state.pt"
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        recover(again, teacher, ids, settings, state=state, save_every=0, progress=interrupt)
    again.load_state_dict(before)
    recover(again, teacher, ids, settings, state=state, save_every=0)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_is_refused(pair, make_decoder, ids):
    model, teacher = pair
    with pytest.raises(RecoveryError, match=r"a group of 7 columns does not divide the 32 of model\.layers\.0"):
        recover(model, teacher, ids, RecoverySettings(steps=1, groups=GroupTuning(group=7)))
    with pytest.raises(RecoveryError, match="leave shard"):
        tuned_layers(model, pruned_masks(model, teacher), TUNING, shard=True)
    pruned = make_decoder("llama")
    prune_model(pruned, None, "magnitude", "2:4")
    with pytest.raises(
        RecoveryError, match=r"is pruned, and group fine-tuning moves whole groups.*shrink wrote, then prune it"
    ):
        recover(pruned, teacher, ids, RecoverySettings(steps=1, groups=TUNING))
    with pytest.raises(RecoveryError, match="bits of group fine-tuning must be from 2 to 8; got 9"):
        GroupTuning(bits=9)
    with pytest.raises(RecoveryError, match="leave norms"):
        RecoverySettings(steps=1, groups=TUNING, norms=True)
