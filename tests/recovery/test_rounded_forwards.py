"""Recovery with rounded weights: what forwards read, what is saved, and that packing keeps it bit for bit."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import nn

from ace_triton import (
    GroupTuning,
    Quantization,
    RecoveryError,
    RecoverySettings,
    pack_model,
    prune_model,
    recover,
    recover_model,
    shrink_model,
    unpack_model,
)
from ace_triton.recovery.checks import pruned_masks, zeros_of_rounding
from ace_triton.recovery.rounded_forwards import RoundedWeight, roundings_of
from ace_triton.solvers.kept_adamw import KeptAdamW
from tests.recovery import test_any_model

FOUR, EIGHT = (Quantization(bits, 32, "absmax") for bits in (4, 8))


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (24, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pair(make_decoder, ids):
    """pair(family, dtype, quantize): a model pruned to 8:16, and its dense teacher."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, quantize: Quantization | None = None):
        model, teacher = make_decoder(family).to(dtype), make_decoder(family).to(dtype)
        with torch.no_grad():  # random weights predict next to nothing
            for decoder in (model, teacher):
                decoder.get_output_embeddings().weight.mul_(20)
        prune_model(model, ids, "wanda", "8:16", quantize=quantize)
        return model, teacher

    return make


def settings_of(quantize: Quantization | int | None, steps: int = 4, **changes) -> RecoverySettings:
    words = {"tokens_per_step": 64, "learning_rate": 0.03, "forward_dtype": torch.float32}
    return RecoverySettings(steps=steps, quantize=quantize, **{**words, **changes})


def check_packing(model: nn.Module, names: Collection[str], **bits: int) -> None:
    """Packing in these bits keeps each weight, bit for bit, and none of the named ones is left out."""
    before = {name: model.get_parameter(name).clone() for name in names}
    report = pack_model(model, group=32, **bits)
    assert {layer.bits for layer in report.layers} == set(bits.values())
    assert not {f"{skipped.name}.weight" for skipped in report.skipped} & set(names)
    unpack_model(model)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in names)
    assert not any(bool(before[name].signbit()[before[name] == 0].any()) for name in names)


@pytest.mark.parametrize(
    ("family", "dtype", "by"),
    [
        ("llama", torch.float32, FOUR),
        ("llama", torch.bfloat16, EIGHT),
        ("llama", torch.float16, FOUR),
        ("gpt2", torch.float32, FOUR),
        ("qwen3_moe", torch.bfloat16, FOUR),
    ],
)
def test_the_loss_falls_and_packing_keeps_each_weight(pair, text, family, dtype, by):
    model, teacher = pair(family, dtype)
    masks = pruned_masks(model)
    exact = {"forward_dtype": torch.float32 if dtype == torch.float32 else torch.bfloat16}
    report = recover(model, teacher, text, settings_of(by, steps=10, tokens_per_step=128, **exact))
    assert sum(report.losses[-3:]) < 0.8 * sum(report.losses[:3])
    assert all(not bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    check_packing(model, masks, bits=by.bits)


def test_a_model_that_shrink_wrote_is_rounded_too(make_decoder, ids, text):
    teacher = make_decoder("llama")
    model = shrink_model(teacher, ids, ratio=0.2, multiple=16, groups=0, method="magnitude").model
    masks = pruned_masks(model, teacher)
    assert recover(model, teacher, text, settings_of(EIGHT, steps=2)).zeros == 0
    check_packing(model, masks, dense_bits=8)


def test_zeros_of_rounding_are_trained_again_in_a_model_that_shrink_wrote(make_decoder, ids, text):
    teacher = make_decoder("llama")
    model = shrink_model(teacher, ids, ratio=0.2, multiple=16, groups=0, method="magnitude").model
    masks = pruned_masks(model, teacher)
    first = recover(model, teacher, text, settings_of(FOUR, steps=1))
    before = {name: model.get_parameter(name) == 0 for name in masks}
    assert sum(int(zeros.sum()) for zeros in before.values()) > 0.1 * first.trained
    second = recover(model, teacher, text, settings_of(None, steps=1))
    assert (second.zeros, second.trained) == (0, first.trained)
    assert all(not bool((model.get_parameter(name)[zeros] == 0).all()) for name, zeros in before.items())


@pytest.mark.parametrize("bits", [None, 4])
def test_zeros_of_a_smaller_model_that_was_pruned_stay(make_decoder, ids, bits):
    teacher = make_decoder("llama")
    model = shrink_model(teacher, ids, ratio=0.2, multiple=16, groups=0, method="magnitude").model
    prune_model(model, ids, "magnitude", "3:4", quantize=None if bits is None else FOUR)
    masks = pruned_masks(model, teacher)
    assert all(torch.equal(mask, model.get_parameter(name) != 0) for name, mask in masks.items())
    assert all(bool(mask.all()) for mask in pruned_masks(model, teacher, pruned=False).values())


def test_zeros_of_rounding_are_counted(pair):
    model, _ = pair(quantize=FOUR)
    masks = pruned_masks(model)
    assert zeros_of_rounding(model, masks) == sum(mask.numel() // 2 - int(mask.sum()) for mask in masks.values()) > 0
    exact, _ = pair()
    assert zeros_of_rounding(exact, pruned_masks(exact)) == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_as_they_are(pair, text, broken):
    model, teacher = pair()
    name = next(iter(pruned_masks(model)))
    with torch.no_grad():
        model.get_parameter(name)[0, :].masked_fill_(model.get_parameter(name)[0] != 0, broken)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecoveryError, match=f"{name} holds NaN or infinity.*nothing was changed"):
        recover(model, teacher, text, settings_of(FOUR))
    with pytest.raises(RecoveryError, match="holds NaN or infinity"):
        recover_model(model, teacher, [{"input_ids": text[:4]}], settings_of(FOUR))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("whole", [True, False])
def test_a_failure_before_the_first_step_gives_the_weights_back(pair, text, whole):
    model, teacher = pair(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        teacher.get_input_embeddings().weight.fill_(float("nan"))
    train, given = (recover, text) if whole else (recover_model, [{"input_ids": text[:4]}])
    with pytest.raises(RecoveryError, match="the loss became nan in step 0"):
        train(model, teacher, given, settings_of(FOUR, forward_dtype=torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("by", [FOUR, EIGHT])
def test_weights_that_outgrow_the_range_of_their_scales_stay_finite(by):
    """Scales of a model in fp16 end at 65,504; a group that grows further keeps that scale."""
    weight = nn.Parameter(torch.tensor([[60_000.0, 100.0, 0.0, -50_000.0]]))
    optimizer = KeptAdamW({"w": weight}, torch.bfloat16, roundings={"w": RoundedWeight(by, torch.float16, False)})
    for _ in range(5):
        weight.grad = torch.tensor([[-1.0, 0.0, 0.0, 1.0]], dtype=weight.dtype)
        optimizer.step(0.1, 100.0)
    assert float(optimizer.values["w"][0, 0]) > torch.finfo(torch.float16).max
    rounded = optimizer.trained("w").half()
    assert rounded[0, 0] == torch.finfo(torch.float16).max
    assert rounded[0, 2] == 0
    assert bool(rounded.isfinite().all())
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("by", [None, EIGHT])
def test_norms_of_torch_are_trained_in_their_own_dtype(pair, text, by):
    model, teacher = pair("gpt2")
    before = model.transformer.h[0].ln_1.weight.detach().clone()
    recover(model, teacher, text, settings_of(by, steps=1, norms=True, forward_dtype=torch.bfloat16))
    assert not torch.equal(model.transformer.h[0].ln_1.weight, before)
    halves = [decoder.to(torch.float16) for decoder in (model, teacher)]
    with pytest.raises(RecoveryError, match=r"ln_1 is a LayerNorm in torch.float16.*forward_dtype=torch.float32"):
        recover(*halves, text, settings_of(by, norms=True, forward_dtype=torch.bfloat16))


def test_forwards_read_rounded_weights(pair, text):
    model, teacher = pair()
    rounded, _ = pair()
    errors = {}
    with torch.no_grad():
        for name in pruned_masks(model):
            weight = rounded.get_parameter(name)
            blocks = weight.split(32, dim=1)
            steps = [block.abs().amax(1, keepdim=True) / 7 for block in blocks]
            grid = torch.cat([(block / step).round() * step for block, step in zip(blocks, steps, strict=True)], dim=1)
            errors[name] = float((grid - weight).norm() / weight.norm())
            weight.copy_(grid)
    assert all(0.02 < error < 0.2 for error in errors.values())
    wanted = recover(rounded, teacher, text, settings_of(None, steps=1)).losses
    assert recover(model, teacher, text, settings_of(FOUR, steps=1)).losses == pytest.approx(wanted, rel=1e-4)


def test_weights_that_gptq_rounded_start_as_they_are(pair, text):
    by = Quantization(4, 32, "gptq")
    given, teacher = pair(quantize=by)
    before = {name: given.get_parameter(name).clone() for name in pruned_masks(given)}
    wanted = recover(given, teacher, text, settings_of(None, steps=1)).losses
    model, _ = pair(quantize=by)
    assert recover(model, teacher, text, settings_of(FOUR, steps=1, learning_rate=1e-9)).losses == wanted
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


def test_a_weight_that_is_rounded_to_zero_is_still_trained():
    weight = nn.Parameter(torch.tensor([[1.0, 0.05, 0.0, -0.6]]))
    optimizer = KeptAdamW({"w": weight}, torch.bfloat16, roundings={"w": RoundedWeight(FOUR, torch.float32, False)})
    assert weight[0].tolist() == [1.0, 0.0, 0.0, torch.tensor(-4 / 7).bfloat16().item()]
    for _ in range(4):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step(0.05, 100.0)
    values = optimizer.values["w"][0]
    assert float(values[1]) > 0.1
    assert float(values[2]) == 0.0
    assert float(weight.detach()[0, 1]) == pytest.approx(float(values[0]) / 7, rel=0.01)


def test_a_killed_run_resumes_bit_for_bit_and_other_bits_are_refused(pair, text, tmp_path):
    whole, teacher = pair()
    report = recover(whole, teacher, text, settings_of(FOUR))
    path = tmp_path / "state.pt"

    def kill(spent: float, *_: float) -> None:
        if spent == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(pair()[0], teacher, text, settings_of(FOUR), state=path, save_every=0, progress=kill)
    for other in (EIGHT, None, 4):
        with pytest.raises(RecoveryError, match="is the state of a recovery with other settings"):
            recover(pair()[0], teacher, text, settings_of(other), state=path)
    again = pair()[0]
    assert recover(again, teacher, text, settings_of(FOUR), state=path).losses == report.losses
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_an_encoder_is_trained_rounded():
    model, teacher = test_any_model.pair("bert")
    settings = settings_of(EIGHT, steps=10)
    report = recover_model(model, teacher, test_any_model.batches_for("bert"), settings)
    assert sum(report.losses[-3:]) < 0.8 * sum(report.losses[:3])
    check_packing(model, pruned_masks(model), bits=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_are_rounded_in_each_process(pair, text, together, dtype):
    forward = torch.float32 if dtype == torch.float32 else torch.bfloat16
    settings = settings_of(FOUR, steps=2, forward_dtype=forward)
    report = recover(*pair(dtype=dtype), text, settings)
    other = pair("gpt2")

    def train(rank):
        model, teacher = pair(dtype=dtype)
        shared = recover(model, teacher, text, settings, shard="cpu")
        assert shared.losses == pytest.approx(report.losses, rel=0.01)
        if rank == 0:
            check_packing(model, pruned_masks(model), bits=4)
        model, teacher = other
        with pytest.raises(RecoveryError, match=r"weight is stored as \[in_features, out_features\].*without --shard"):
            recover(model, teacher, text, settings_of(FOUR), shard="cpu")

    assert together(2, train) == [0, 0]


def test_a_pruned_weight_that_is_no_linear_layer_is_refused(make_decoder):
    model = make_decoder("llama")
    model.model.layers[0].table = nn.Parameter(torch.eye(32))
    with pytest.raises(RecoveryError, match=r"0\.table is pruned, and only linear layers .* stored in 4 bits: leave"):
        roundings_of(model, pruned_masks(model), FOUR)
    assert roundings_of(model, pruned_masks(model), None) == {}


def test_a_number_of_bits_is_enough():
    assert RecoverySettings(steps=1, quantize=4).quantization == Quantization(4, 128, "absmax")
    assert RecoverySettings(steps=1).quantization is None


@pytest.mark.parametrize(
    ("quantize", "groups", "message"),
    [
        (3, None, "quantize: bits must be one of 8, 4; got 3"),
        ("eight", None, "quantize must be 8, 4, an ace_triton.Quantization"),
        (Quantization(4, 64), None, r"rule 'absmax'; got 'gptq': give Quantization\(4, 64, 'absmax'\)"),
        (4, GroupTuning(), r"leave quantize \(--bits\) out, or recover without groups \(--tune weights\)"),
    ],
)
def test_what_does_not_go_together(quantize, groups, message):
    with pytest.raises(RecoveryError, match=message):
        RecoverySettings(steps=1, quantize=quantize, groups=groups)
