"""A model whose forward changes its weights keeps the loaded weights when it is pruned."""

import copy

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from ace_triton import RecoverySettings, prune_model, recover
from ace_triton.decoders.loaded_weights import Writes, weights_as_loaded
from ace_triton.inputs.written_text import WrittenText, write_batch

RESCALED = ("attention.output.weight", "feed_forward.value.weight")
"""The weights that RWKV divides by 2 in every second block here, in its first forward."""


@pytest.fixture
def rwkv():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    tokens = {"vocab_size": 101, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2}
    return RwkvForCausalLM(RwkvConfig(**sizes, **tokens, rescale_every=2)).eval()


@pytest.mark.filterwarnings("ignore:.*the whole model is run")
@pytest.mark.parametrize(
    "how", [{}, {"permute": True}, {"budgets": "outliers", "sparsity": 0.5}, {"sequential": "none"}]
)
def test_kept_weights_equal_the_loaded_ones(rwkv, ids, how):
    dense, dtype = copy.deepcopy(rwkv), torch.bfloat16
    for model in (rwkv, dense):
        model.to(dtype)
    report = prune_model(rwkv, ids, "wanda", **how)
    loaded = dense.state_dict()
    assert not rwkv.rwkv.layers_are_rescaled
    for block in range(4):
        for name in RESCALED:
            pruned, whole = (m.get_parameter(f"rwkv.blocks.{block}.{name}") for m in (rwkv, dense))
            lost = pruned.numel() - int((pruned != 0).sum())
            assert 0 < lost < pruned.numel()
            if "permute" not in how:
                assert torch.equal(pruned[pruned != 0], whole[pruned != 0])
            assert torch.equal(pruned.abs().max(), whole.abs().max())
    assert report.account.pruned == report.account.blocks
    fresh = copy.deepcopy(dense)
    fresh.load_state_dict(rwkv.state_dict())
    with torch.no_grad():
        assert torch.equal(rwkv(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert rwkv.state_dict().keys() == loaded.keys()


@pytest.mark.filterwarnings("ignore:.*the whole model is run")
def test_an_error_during_pruning_restores_the_loaded_weights(rwkv, ids):
    dense = copy.deepcopy(rwkv.state_dict())

    def stop(*_args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(rwkv, ids, "wanda", include="rwkv.blocks.0.attention.*", progress=stop)
    for name in RESCALED:
        assert torch.equal(rwkv.get_parameter(f"rwkv.blocks.3.{name}"), dense[f"rwkv.blocks.3.{name}"])
    assert not rwkv.rwkv.layers_are_rescaled
    assert "forward" not in vars(rwkv)


def test_generating_text_restores_the_loaded_weights(rwkv):
    dense = copy.deepcopy(rwkv.state_dict())
    texts = [write_batch(rwkv, WrittenText(1, 4), seed=0, place=0, sequences=2) for _ in range(2)]
    assert torch.equal(*texts)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in rwkv.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*the whole model is run")
def test_a_recovered_model_keeps_its_training_and_the_loaded_scale(rwkv, ids):
    teacher = copy.deepcopy(rwkv)
    prune_model(rwkv, ids, "wanda")
    pruned = copy.deepcopy(rwkv)
    losses = recover(rwkv, teacher, ids, RecoverySettings(steps=12, forward_dtype=torch.float32)).losses
    assert losses[-1] < 0.9 * losses[0]
    assert not rwkv.rwkv.layers_are_rescaled
    again = recover(rwkv, teacher, ids, RecoverySettings(steps=1, forward_dtype=torch.float32)).losses
    assert again[0] < 0.9 * losses[0], "training continues from the recovered weights"
    for name in RESCALED:
        weight, before = (m.get_parameter(f"rwkv.blocks.3.{name}").detach() for m in (rwkv, pruned))
        assert torch.equal(weight == 0, before == 0)
        assert 0.8 < float(weight.norm() / before.norm()) < 1.25


def add(weight):
    weight.data.add_(1)


def scale(weight):
    weight.data.mul_(0.3)


def scale_out(weight):
    torch.mul(weight.data, 0.3, out=weight.data)


def scale_rows(weight):
    weight.data[:4] *= 0.5


def scale_many(weight):
    torch._foreach_mul_([weight.data], 0.3)


@pytest.mark.parametrize("change", [add, scale, scale_out, scale_rows, scale_many])
def test_a_change_that_cannot_be_reverted_is_refused(make_decoder, ids, change):
    model = make_decoder("llama")
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda *_: change(block.mlp.up_proj.weight))
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight is changed by the model's own forward"
    ):
        prune_model(model, ids, "wanda")
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_powers_of_two_are_reverted_and_nothing_else_changes(make_decoder, ids):
    model = make_decoder("llama").train()
    first, second, _ = model.model.layers
    dense = copy.deepcopy(model.state_dict())

    def once(module, _args):
        if not getattr(module, "halved", False):
            module.mlp.up_proj.weight.data.div_(2)
            module.mlp.gate_proj.weight.data.copy_(module.mlp.gate_proj.weight.data.clone())
            module.halved = True

    second.halved = False
    second.register_forward_pre_hook(once)
    with weights_as_loaded(model), torch.no_grad():
        model(input_ids=ids)
        assert second.halved
        assert torch.equal(second.mlp.up_proj.weight * 2, dense["model.layers.1.mlp.up_proj.weight"])
        first.mlp.up_proj.weight.data.mul_(3)
        second.mlp.up_proj.weight.data[0] = 0
    assert not second.halved
    assert model.training
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, dense[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert torch.equal(second.mlp.up_proj.weight[1:], dense["model.layers.1.mlp.up_proj.weight"][1:])
    assert not second.mlp.up_proj.weight[0].any()


def test_memory_that_a_weight_has_left_is_not_watched():
    weight = torch.nn.Parameter(torch.ones(4))
    left = weight.data
    with Writes([weight]) as writes:
        weight.data = torch.zeros(4)
        left.add_(1)
        assert not writes.before
        writes.add(weight)
        weight.data.mul_(2)
    assert list(writes.before) == [weight]
