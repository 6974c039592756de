"""Recovery: the loss falls, zeros stay, a killed run ends where an uninterrupted one does."""

from __future__ import annotations

import copy
import importlib
import shutil

import pytest
import torch

from ace_triton import RecoveryError, RecoverySettings, WrittenText, prune_model, recover
from ace_triton.recovery import text as recovery_text
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.text import GivenBatches, WrittenBatches

recovery = importlib.import_module("ace_triton.recovery.train")
"""The module: in the package its name is the function's."""

SHORT = RecoverySettings(steps=6, tokens_per_step=32, learning_rate=0.03)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (24, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pair(make_decoder, ids):
    """pair(family, dtype): a pruned model and its dense teacher."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32):
        model, teacher = make_decoder(family).to(dtype), make_decoder(family).to(dtype)
        with torch.no_grad():  # random weights predict next to nothing
            for decoder in (model, teacher):
                decoder.get_output_embeddings().weight.mul_(20)
        prune_model(model, ids, "wanda", "2:4")
        return model, teacher

    return make


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_loss_falls_and_only_kept_weights_move(pair, text, family, dtype):
    model, teacher = pair(family, dtype)
    before, masks, frozen = state_of(model), pruned_masks(model), state_of(teacher)
    settings = RecoverySettings(steps=25, tokens_per_step=128, learning_rate=0.03)
    report = recover(model, teacher, text, settings)
    assert sum(report.losses[-5:]) < 0.8 * sum(report.losses[:5])
    assert (report.steps, report.tokens) == (25, 25 * 128)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        if name in masks:
            assert bool((tensor[~masks[name]] == 0).all()), name
            assert not torch.equal(tensor, before[name]), f"{name} did not move"
        else:
            assert torch.equal(tensor, before[name]), f"{name} moved"
    assert report.zeros == sum(int((~mask).sum()) for mask in masks.values())
    assert report.trained == sum(int(mask.sum()) for mask in masks.values())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_the_loss_is_the_divergence_from_the_teacher(pair, text):
    model, teacher = pair()
    settings = RecoverySettings(steps=1, tokens_per_step=text.numel(), forward_dtype=torch.float32)
    with torch.no_grad():
        p = teacher(text).logits.double().softmax(-1)
        q = model(text).logits.double().softmax(-1)
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    assert recover(model, teacher, text, settings).losses[0] == pytest.approx(expected, rel=1e-4)


def test_the_rate_counts_in_each_weights_size(pair, text):
    """AdamW's first step moves a weight by its rate, up or down: by that share of the root mean square here."""
    model, teacher = pair()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(10)
    before = state_of(model)
    recover(model, teacher, text, RecoverySettings(steps=1, tokens_per_step=128, learning_rate=0.01, warmup=0.0))
    for name, mask in pruned_masks(model).items():
        kept, now = before[name][mask], state_of(model)[name][mask]
        steps = (now - kept).abs()
        assert float(steps.median()) == pytest.approx(0.01 * float(kept.norm()) / kept.numel() ** 0.5, rel=0.02), name


def test_a_weight_that_blocks_share_moves_once(pair, text):
    model, teacher = pair()
    blocks = model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    mask = blocks[0].mlp.up_proj.weight != 0
    recover(model, teacher, text, RecoverySettings(steps=3, tokens_per_step=32))
    assert blocks[1].mlp.up_proj.weight is blocks[0].mlp.up_proj.weight
    assert torch.equal(blocks[0].mlp.up_proj.weight != 0, mask)


def test_norms_in_float32_keep_their_precision_beside_weights_in_bfloat16(pair, text):
    model, teacher = pair("gpt_neox", torch.bfloat16)
    for module in (*model.modules(), *teacher.modules()):
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    before, masks = state_of(model), pruned_masks(model)
    recover(model, teacher, text, RecoverySettings(steps=3, tokens_per_step=32, norms=True))
    norms = {name: tensor for name, tensor in model.state_dict().items() if ".layers." in name and "norm." in name}
    assert all(tensor.dtype == torch.float32 for tensor in norms.values())
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in norms.values())
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_norms_move_where_that_is_asked_for(pair, text):
    model, teacher = pair()
    before, masks = state_of(model), pruned_masks(model)
    report = recover(model, teacher, text, RecoverySettings(steps=3, tokens_per_step=32, norms=True))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "model.layers.0.input_layernorm.weight" in moved
    assert "model.norm.weight" not in moved
    assert "model.embed_tokens.weight" not in moved
    norms = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 1)
    assert report.trained == norms + sum(int(mask.sum()) for mask in masks.values())


def test_the_teacher_writes_the_text(pair):
    model, teacher = pair()
    before, frozen = state_of(model), state_of(teacher)
    settings = RecoverySettings(steps=25, tokens_per_step=128, learning_rate=0.03)
    report = recover(model, teacher, WrittenText(start=1, length=16), settings)
    assert sum(report.losses[-5:]) < 0.8 * sum(report.losses[:5])
    assert (report.tokens, report.passes) == (25 * 128, 1.0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in teacher.state_dict().items())


def test_what_the_teacher_writes_is_read_once_and_the_same_again(make_decoder, monkeypatch):
    teacher, text = make_decoder("llama").eval(), WrittenText(start=1, length=8)
    monkeypatch.setattr(recovery_text, "AT_ONCE", 4)

    def batches(seed: int = 0) -> WrittenBatches:
        return WrittenBatches(text, teacher, tokens_per_step=24, seed=seed)

    read = torch.cat([batches().of(step) for step in range(4)])
    assert read.shape == (12, 8)
    assert len({tuple(sequence.tolist()) for sequence in read}) == 12
    again = batches()
    assert torch.equal(torch.cat([again.of(step) for step in range(4)]), read)
    assert not torch.equal(batches(seed=1).of(0), read[:3])


@pytest.mark.parametrize("written", [False, True])
def test_a_killed_run_goes_on_where_it_was(pair, text, tmp_path, written):
    """Bit for bit as one that was never stopped; one that had come to its end has nothing left to do."""
    text = WrittenText(start=1, length=16) if written else text
    whole, teacher = pair()
    report = recover(whole, teacher, text, SHORT)
    stopped, again = copy.deepcopy(pair()[0]), pair()[0]
    path = tmp_path / "run" / "state.pt"

    def kill(spent: float, _budget: float, _loss: float) -> None:
        if spent == 5:
            raise KeyboardInterrupt
        if spent == 4:
            shutil.copy(path, tmp_path / "last.pt")

    with pytest.raises(KeyboardInterrupt):
        recover(stopped, teacher, text, SHORT, state=path, save_every=0, progress=kill)
    shutil.move(tmp_path / "last.pt", path)
    before_the_kill = torch.load(path)["cpu_seconds"]
    seen = []
    resumed = recover(again, teacher, text, SHORT, state=path, progress=lambda *told: seen.append(told))
    assert [step for step, _, _ in seen] == [5, 6]
    assert resumed.losses == report.losses
    assert resumed.cpu_seconds > before_the_kill > 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    again = pair()[0]
    assert recover(again, teacher, text, SHORT, state=path).losses == report.losses
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)


def test_two_runs_at_once_are_refused(pair, text, tmp_path):
    model, teacher = pair()
    path = tmp_path / "state.pt"

    def again(*_told: float) -> None:
        other, _ = pair()
        with pytest.raises(ValueError, match="another process runs this recovery"):
            recover(other, teacher, text, SHORT, state=path)

    recover(model, teacher, text, RecoverySettings(steps=1, tokens_per_step=32), state=path, progress=again)


def test_an_epoch_is_shuffled_once(text, monkeypatch):
    shuffled = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *words, **more: shuffled.append(1) or randperm(*words, **more))
    batches = GivenBatches(text, tokens_per_step=48, seed=3)
    read = torch.cat([batches.of(step) for step in range(16)])
    assert len(shuffled) == 2
    orders = [randperm(24, generator=torch.Generator().manual_seed(3 + epoch)) for epoch in range(2)]
    assert torch.equal(read, text[torch.cat(orders)])
    assert torch.equal(batches.of(0), read[:3])


def test_five_minutes_are_the_default(pair, text, monkeypatch):
    monkeypatch.setattr(recovery, "DEFAULT_MINUTES", 0.005)
    told = []
    recover(*pair(), text, progress=lambda *step: told.append(step))
    assert told[-1][:2] == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize("how", ["itself", "the same zeros", "pruned otherwise"])
def test_a_pruned_teacher_is_refused(pair, make_decoder, ids, text, how):
    model, teacher = pair()
    if how == "itself":
        teacher = model
    elif how == "the same zeros":  # in one layer only, and trained since
        model, teacher = make_decoder("llama"), make_decoder("llama")
        for decoder in (model, teacher):
            prune_model(decoder, ids, "wanda", "2:4", include=["*layers.0.mlp.up_proj"])
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    else:
        prune_model(teacher, None, "magnitude", "4:8")
    with pytest.raises(ValueError, match=r"the teacher is .*give the dense model"):
        recover(model, teacher, text, SHORT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_teacher_that_was_rounded_to_4_bits_is_not_pruned(pair, text, family):
    model, teacher = pair(family)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() >= 2:  # Groups of 32 inputs, along the axis that the family has them on.
                rows = parameter.mT if family == "gpt2" else parameter
                for block in rows.split(32, dim=-1):
                    most = block.abs().amax(-1, keepdim=True)
                    block.copy_((block / most * 7).round() * most / 7)
    assert recover(model, teacher, text, RecoverySettings(steps=1, tokens_per_step=32)).steps == 1


@pytest.mark.parametrize(("kept", "rounded"), [(0.9, False), (0.5, True)])
def test_a_teacher_with_zeros_without_a_pattern_is_pruned_unless_rounding_left_them(pair, text, kept, rounded):
    model, teacher = pair()
    prune_model(teacher, None, "magnitude", kept)
    if rounded:
        with torch.no_grad():
            for parameter in teacher.model.layers.parameters():
                parameter.copy_(parameter.sign())
    with pytest.raises(ValueError, match=r"the teacher is pruned too .*give the dense model"):
        recover(model, teacher, text, SHORT)


def test_between_two_writes_of_the_state_some_time_passes(pair, text, tmp_path):
    model, teacher = pair()
    path = tmp_path / "state.pt"
    there = []
    recover(model, teacher, text, SHORT, state=path, progress=lambda *_: there.append(path.exists()))
    assert there == [False] * 5 + [True]


def test_a_state_of_another_run_is_refused(pair, text, tmp_path):
    model, teacher = pair()
    path = tmp_path / "state.pt"

    def kill(*_told: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher, text, SHORT, state=path, save_every=0, progress=kill)
    with pytest.raises(ValueError, match="other settings"):
        recover(model, teacher, text, RecoverySettings(steps=7, tokens_per_step=32), state=path)
    with pytest.raises(ValueError, match="other settings"):
        recover(model, teacher, text.flip(0), SHORT, state=path)
    model, teacher = pair()
    with torch.no_grad():
        teacher.lm_head.weight[3].mul_(2)
    with pytest.raises(ValueError, match="weights or teacher; remove it"):
        recover(model, teacher, text, SHORT, state=path)
    model, teacher = pair()
    with torch.no_grad():  # as after an update: other weights, the same mask
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="weights or teacher; remove it"):
        recover(model, teacher, text, SHORT, state=path)
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match="remove it"):
        recover(model, teacher, text, SHORT, state=path)


def test_minutes_are_a_budget(pair, text):
    model, teacher = pair()
    told = []
    report = recover(model, teacher, text, RecoverySettings(minutes=0.01), progress=lambda *step: told.append(step))
    assert report.seconds >= 0.6
    assert report.steps == len(told)
    assert told[-1][:2] == (0.6, 0.6)


@pytest.mark.parametrize(("length", "inside"), [(recovery.EAGER_LENGTH, "eager"), (recovery.EAGER_LENGTH + 1, "sdpa")])
def test_short_sequences_on_a_cpu_take_the_quicker_attention(make_decoder, ids, length, inside):
    model, teacher = (make_decoder("llama", attention="sdpa", max_position_embeddings=512) for _ in range(2))
    prune_model(model, ids, "wanda", "2:4")
    text = torch.randint(3, 101, (2, length), generator=torch.Generator().manual_seed(5))
    kinds = []

    def look(*_):
        kinds.append({decoder.config._attn_implementation for decoder in (model, teacher)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(model, teacher, text, RecoverySettings(steps=2), progress=look)
    assert kinds == [{inside}]
    assert {decoder.config._attn_implementation for decoder in (model, teacher)} == {"sdpa"}


def test_the_rate_rises_and_falls():
    settings = RecoverySettings(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [settings.rate(step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert RecoverySettings(steps=1, warmup=0.0, learning_rate=1.0).rate(0.0) == 1.0


def test_a_dense_model_is_refused(make_decoder, text):
    with pytest.raises(ValueError, match="has 5% zeros or more: prune the model first"):
        recover(make_decoder("llama"), make_decoder("llama"), text, SHORT)


def test_text_that_is_no_tensor_is_refused(pair, text):
    with pytest.raises(RecoveryError, match="or a WrittenText; got a list: give its ids"):
        recover(*pair(), text.tolist(), SHORT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "one of them"),
        ({"steps": 3, "minutes": 1.0}, "one of them"),
        ({"steps": 0}, "above 0"),
        ({"steps": 3, "learning_rate": -1.0}, "above 0"),
        ({"steps": 3, "hidden_states": -1.0}, "hidden_states must be 0 or above, and finite; got -1.0"),
        ({"steps": 3, "hidden_states": float("inf")}, "hidden_states"),
        ({"minutes": float("inf")}, "finite"),
        ({"steps": 3, "seed": 2**64}, "64 bits"),
        ({"steps": 3, "warmup": 1.0}, "warmup"),
        ({"steps": 3, "forward_dtype": torch.float16}, "forward_dtype"),
    ],
)
def test_settings_that_will_not_do(words, message):
    with pytest.raises(ValueError, match=message):
        RecoverySettings(**words)


def test_what_does_not_fit_is_refused(pair, make_decoder, text):
    model, teacher = pair()
    with pytest.raises(ValueError, match="int64"):
        recover(model, teacher, text.float(), SHORT)
    with pytest.raises(ValueError, match="vocabulary from 0 to 100"):
        recover(model, teacher, text + 50, SHORT)
    with pytest.raises(ValueError, match="from 101 to 101, the vocabulary from 0 to 100"):
        recover(model, teacher, WrittenText(start=101), SHORT)
    with pytest.raises(ValueError, match="a length of 0"):
        recover(model, teacher, WrittenText(start=1, length=0), SHORT)
    with pytest.raises(ValueError, match=r"got a length of 3 with start \(1, 2, 3\)"):
        recover(model, teacher, WrittenText(start=(1, 2, 3), length=3, keep_start=True), SHORT)
    short = make_decoder("llama", max_position_embeddings=15)
    with pytest.raises(ValueError, match="a length of 16 is more than the model's 15 positions"):
        recover(model, short, text, SHORT)
    with pytest.raises(ValueError, match="a length of 16 is more than the model's 15 positions"):
        recover(model, short, WrittenText(start=1, length=16), SHORT)
    with pytest.raises(ValueError, match="the teacher's 99"):
        recover(model, make_decoder("llama", vocab_size=99), text, SHORT)
    with pytest.raises(ValueError, match="load them"):
        recover(*pair("llama", torch.bfloat16), text, RecoverySettings(steps=1, forward_dtype=torch.float32))
    with torch.no_grad():
        teacher.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="smaller learning rate"):
        recover(model, teacher, text, SHORT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
