"""A recovery with sharded weights agrees with one of whole models, keeps the zeros, and is saved by one process."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import RwkvConfig, RwkvForCausalLM

import ace_triton.recovery.sharded  # noqa: F401 - once, before processes are forked
from ace_triton import RecoverySettings, prune_model, recover
from ace_triton.errors import RecoveryError
from ace_triton.inputs import checkpoint
from ace_triton.processes import Processes
from ace_triton.recovery import distillation
from ace_triton.recovery.checks import pruned_masks
from ace_triton.recovery.distillation import Distillation
from ace_triton.recovery.sharing import passes_of

SHORT = RecoverySettings(steps=3, tokens_per_step=64, learning_rate=0.01)
EXACT = RecoverySettings(
    steps=2, tokens_per_step=80, learning_rate=0.01, norms=True, hidden_states=0.5, forward_dtype=torch.float32
)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 101, (24, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pair(make_decoder, ids):
    """pair(family): a pruned model and its dense teacher."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32):
        capped = {"final_logit_softcapping": 30.0} if family == "gemma3_text" else {}
        model, teacher = make_decoder(family, **capped), make_decoder(family, **capped)
        with torch.no_grad():  # random weights predict next to nothing
            for decoder in (model, teacher):
                decoder.get_output_embeddings().weight.mul_(20)
        prune_model(model, ids, "wanda", "2:4")
        return model.to(dtype), teacher.to(dtype)

    return make


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])


@pytest.mark.parametrize(("size", "family"), [(3, "qwen3_moe"), (2, "gemma3_text")])
def test_it_agrees_with_whole_models(pair, text, together, monkeypatch, family, size):
    """Also if processes have different numbers of sequences, and read them one by one because the logits are capped."""
    monkeypatch.setattr(distillation, "WHOLE_TOKENS", 16)
    held = []
    backward = Distillation.backward

    def watched(self, *args, **options):
        held[:] = [p.to_local().numel() for p in self._model.parameters() if isinstance(p, DTensor) and p.requires_grad]
        return backward(self, *args, **options)

    alone, teacher = pair(family)
    before, dense, masks = weights_of(alone), weights_of(teacher), pruned_masks(alone)
    report = recover(alone, teacher, text, EXACT)

    def train(rank):
        monkeypatch.setattr(Distillation, "backward", watched)
        model, teacher = pair(family)
        shared = recover(model, teacher, text, EXACT, shard="cpu")
        assert shared.losses == pytest.approx(report.losses, rel=1e-4)
        assert (shared.trained, shared.zeros) == (report.trained, report.zeros)
        assert torch.equal(weights_of(teacher), dense)
        everywhere = Processes.now().gather(sum(held))
        assert sum(everywhere) >= report.trained + report.zeros
        assert max(everywhere) < sum(everywhere) * 0.55
        if rank:
            assert {name for name, p in model.named_parameters() if p.is_meta} >= set(masks)
            return
        found = weights_of(model)
        assert float((found - weights_of(alone)).norm() / (before - weights_of(alone)).norm()) < 0.02
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
        assert not any(parameter.is_meta for parameter in model.parameters())

    assert together(size, train) == [0] * size


def test_weights_in_bfloat16_are_trained_in_float32(pair, text, together, tmp_path):
    before, whole = pair(dtype=torch.bfloat16)[0], pair(dtype=torch.bfloat16)
    report = recover(*whole, text, SHORT)

    def train(rank):
        model, teacher = pair(dtype=torch.bfloat16)
        shared = recover(model, teacher, text, SHORT, shard="cpu")
        assert shared.losses == pytest.approx(report.losses, rel=0.02)
        if not rank:
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
            moved, expected = (weights_of(m) - weights_of(before) for m in (model, whole[0]))
            assert float((moved - expected).norm() / expected.norm()) < 0.2

    assert together(2, train) == [0, 0]


def test_a_killed_run_resumes_bit_for_bit_and_with_whole_models(pair, text, together, tmp_path):
    def train(out: str, *, kill: bool = False) -> None:
        def stop(spent: float, *_: float) -> None:
            if kill and spent == 2:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

        model, teacher = pair()
        path = tmp_path / ("expected.pt" if out == "expected" else "state.pt")
        recover(model, teacher, text, SHORT, shard="cpu", state=path, save_every=0, progress=stop)
        if Processes.now().is_first:
            torch.save(weights_of(model), tmp_path / out)

    assert together(2, lambda _: train("killed", kill=True)) == [-signal.SIGKILL] * 2
    saved = (tmp_path / "state.pt").read_bytes()
    assert together(2, lambda _: train("expected")) == [0, 0]
    assert together(2, lambda _: train("resumed")) == [0, 0]
    expected, resumed = (torch.load(tmp_path / name) for name in ("expected", "resumed"))
    assert torch.equal(expected, resumed)
    (tmp_path / "state.pt").write_bytes(saved)
    model, teacher = pair()
    recover(model, teacher, text, SHORT, state=tmp_path / "state.pt")
    assert float((weights_of(model) - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(
    ("sequences", "most", "size", "expected"), [(5, 1, 2, 2), (4, 2, 2, 1), (9, 2, 2, 3), (3, 8, 3, 1), (7, 1, 3, 2)]
)
def test_all_processes_run_the_same_number_of_passes(sequences, most, size, expected):
    assert passes_of(sequences, most, Processes(0, size)) == expected


def state_and_flags(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[object]]:
    """Copies of all tensors, and what a training must give back beside them."""
    flags: list[object] = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    flags += [(name, type(module), module.training) for name, module in model.named_modules()]
    flags.append(model.config._attn_implementation)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, flags


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, None), (torch.float32, 4), (torch.bfloat16, 8)])
def test_a_failure_before_the_first_step_leaves_both_models_as_they_were(
    pair, text, together, tmp_path, dtype, bits, norms
):
    settings = RecoverySettings(
        steps=2,
        tokens_per_step=64,
        quantize=bits,
        norms=norms,
        forward_dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
    )
    alone = pair(dtype=dtype)
    expected = recover(*alone, text, settings)

    def train(rank):
        model, teacher = (decoder.train() for decoder in pair(dtype=dtype))
        broken = teacher.get_input_embeddings().weight
        sound = broken.detach().clone()
        with torch.no_grad():
            broken.fill_(float("nan"))
        before = [state_and_flags(decoder) for decoder in (model, teacher)]
        state = tmp_path / "state.pt"
        with pytest.raises(RecoveryError, match="the loss became nan in step 0"):
            recover(model, teacher, text, settings, shard="cpu", state=state)
        for decoder, (tensors, flags) in zip((model, teacher), before, strict=True):
            found, found_flags = state_and_flags(decoder)
            assert found_flags == flags
            for name, tensor in tensors.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert not state.exists()
        with torch.no_grad():
            broken.copy_(sound)
        again = recover(model, teacher, text, settings, shard="cpu", state=state)
        assert again.losses == pytest.approx(expected.losses, rel=0.02)

    assert together(2, train) == [0, 0]


def test_one_process_and_blocks_that_share_weights_are_refused(pair, make_decoder, text, together):
    with pytest.raises(RecoveryError, match="takes several processes: torchrun --nproc-per-node 2"):
        recover(*pair(), text, SHORT, shard="cpu")

    def train(_rank):
        model, teacher = pair()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(RecoveryError, match=r"layers\.0 and model\.layers\.1 share a weight.*without --shard"):
            recover(model, teacher, text, SHORT, shard="cpu")

    assert together(2, train) == [0, 0]


def test_a_model_that_rescales_its_weights_is_refused(text, together):
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    config = RwkvConfig(**sizes, bos_token_id=1, eos_token_id=2, rescale_every=2)
    model, teacher = RwkvForCausalLM(config), RwkvForCausalLM(config)
    with torch.no_grad():
        model.rwkv.blocks[1].feed_forward.key.weight[::2] = 0

    def train(_rank):
        with pytest.raises(RecoveryError, match="changes its own weights, and cannot be sharded"):
            recover(model, teacher, text, SHORT, shard="cpu")

    assert together(2, train) == [0, 0]


def test_the_command(command, command_together, tiny_checkpoint, some_text, tmp_path):
    small = ("--calibration", some_text, "--samples", 8, "--length", 16)
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "wanda", *small)[0] == 0
    words = (*small, "--steps", 2, "--tokens-per-step", 32, "--shard", "--json", tmp_path / "told.json")
    (code, shown, errors), other = command_together(2, "recover", tmp_path / "pruned", tmp_path / "out", *words)
    assert code == 0, errors
    assert other == (0, "", "")
    assert shown.count("written to") == 1
    assert json.loads((tmp_path / "told.json").read_text())["sharded"] is True
    before, after = (pruned_masks(checkpoint.load(tmp_path / name)[0]) for name in ("pruned", "out"))
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert not list(tmp_path.glob(".out*"))
