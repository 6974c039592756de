"""Stacked experts that are packed one by one and run by the model's own eager forward, in memory and from a file."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ace_triton import NMLinear, RowLimits, load, prune_model, set_row_limits
from ace_triton.errors import PackedError
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.expert_stack import ExpertStack
from ace_triton.packed.manifest import TENSORS_FILE, Manifest
from ace_triton.packed.pack_model import pack_model

_SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 16, "num_experts_per_tok": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "mixtral": {**_GATED, "num_local_experts": 4},
    "qwen3_moe": {**_GATED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    "gpt_oss": {**_GATED, "head_dim": 8, "num_local_experts": 4},
    "aria_text": {**_GATED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}
"""The last two store their experts transposed."""


def make_mixture(family="qwen3_moe", *, dtype=torch.float32, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, _GATED), **_TOKENS, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 101, (16, 12), generator=torch.Generator().manual_seed(1))


def pruned(ids, family="qwen3_moe", **options):
    model = make_mixture(family, **options)
    prune_model(model, ids, "magnitude", "2:4")
    return model


def stacks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_packed_mixture_computes_and_writes_as_with_its_zeros(ids, family, implementation):
    model = pruned(ids, family)
    model.set_experts_implementation(implementation)
    dense = copy.deepcopy(model)
    report = pack_model(model)
    assert len(stacks(model)) == 4
    assert all(isinstance(layer, NMLinear) for stack in stacks(model).values() for layer in stack.children())
    assert not [p for p in model.parameters() if p.dim() == 3]
    assert {"model.layers.1.mlp.experts.3.down_proj"} <= {layer.name for layer in report.layers}
    assert report.packed_bytes < 0.54 * report.dense_bytes
    for one in (model, copy.deepcopy(model).to(torch.float32)):
        with torch.no_grad():
            torch.testing.assert_close(one(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    words = [m.generate(ids[:2, :4], max_new_tokens=6, do_sample=False) for m in (model, dense)]
    assert torch.equal(*words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_mixture_comes_back_from_its_file(ids, family, dtype, tmp_path):
    model = pruned(ids, family, dtype=dtype)
    dense = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    pack_model(model)
    save_packed(model, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / TENSORS_FILE)
    experts = [tensor for name, tensor in stored.items() if ".experts." in name and "_bias" not in name]
    assert sum(tensor.nbytes for tensor in experts) < 0.60 * dense
    again = load(tmp_path / "out")
    assert model.state_dict().keys() == again.state_dict().keys()
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.equal(*(m.generate(ids[:1, :4], max_new_tokens=4, do_sample=False) for m in (model, again)))


def test_an_expert_that_saw_no_token_stays_dense_and_is_named(ids, tmp_path):
    model = make_mixture(num_experts=16, num_experts_per_tok=1)
    skipped = prune_model(model, ids[:1, :4], "wanda", "2:4").skipped
    unseen = {entry.name for entry in skipped if entry.reason == "no calibration token reached it"}
    assert unseen
    dense = copy.deepcopy(model)
    report = pack_model(model)
    assert unseen <= {entry.name for entry in report.skipped}
    assert {type(layer) for stack in stacks(model).values() for layer in stack.children()} == {
        NMLinear,
        torch.nn.Linear,
    }
    save_packed(model, None, tmp_path / "out")
    again = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]


def test_only_what_was_asked_for_is_packed(ids):
    model = pruned(ids)
    report = pack_model(model, include=["*.experts.1.*"])
    assert {layer.name for layer in report.layers} == {
        f"model.layers.{block}.mlp.experts.1.{matrix}" for block in (0, 1) for matrix in ("gate_up_proj", "down_proj")
    }
    assert not [entry for entry in report.skipped if ".experts." in entry.name]
    model = pruned(ids)
    pack_model(model, exclude=["*.experts.*"])
    assert not stacks(model)


def test_stacks_that_are_multiplied_whole_stay_with_a_reason(ids):
    model = pruned(ids, "llama4_text", num_local_experts=4, head_dim=8, intermediate_size_mlp=48)
    with torch.no_grad():
        dense = model(ids).logits
        report = pack_model(model)
        assert not stacks(model)
        assert "one by one" in next(entry.reason for entry in report.skipped if ".experts." in entry.name)
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_models_setting_stays_and_packed_experts_do_not_depend_on_it(ids, implementation, tmp_path):
    model = pruned(ids)
    model.set_experts_implementation(implementation)
    dense = copy.deepcopy(model)
    pack_model(model, exclude="model.layers.1.*")
    assert model.config._experts_implementation == implementation
    first, second = (layer.mlp.experts.config for layer in model.model.layers)
    assert first._experts_implementation == "eager"
    assert second is model.config
    pack_model(model)
    save_packed(model, None, tmp_path / "out")
    again = load(tmp_path / "out")
    for packed in (model, again, copy.deepcopy(model)):
        packed.set_experts_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
        assert packed.config._experts_implementation == implementation


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_another_implementation_of_the_experts_is_an_error_that_says_what_to_do(ids, implementation):
    model = pruned(ids)
    pack_model(model)
    for layer in model.model.layers:
        layer.mlp.experts.config._experts_implementation = implementation
    with (
        torch.no_grad(),
        pytest.raises((AttributeError, TypeError), match=r"_experts_implementation of .* 'eager'"),
    ):
        model(ids)


def test_an_expert_s_weight_is_multiplied_by_and_nothing_else():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)]
    stack, tokens, bias = ExpertStack(layers), torch.randn(3, 8), torch.randn(4)
    assert len(stack) == 2
    assert torch.equal(F.linear(tokens, stack[torch.tensor(1)]), layers[1](tokens))
    assert torch.equal(F.linear(tokens, stack[0], bias), layers[0](tokens) + bias)
    assert torch.equal(F.linear(tokens, stack[0], bias=bias), layers[0](tokens) + bias)
    for wrong in (lambda: torch.matmul(tokens, stack[0]), lambda: stack[0:1], lambda: stack[torch.tensor([0, 1])]):
        with pytest.raises(TypeError, match="_experts_implementation"):
            wrong()
    transposed = ExpertStack(layers, transposed=True)
    assert torch.equal(tokens @ transposed[1], layers[1](tokens))
    assert torch.equal(torch.matmul(tokens, transposed[torch.tensor(0)]), layers[0](tokens))
    for wrong in (lambda: F.linear(tokens, transposed[0]), lambda: transposed[0] @ tokens, lambda: tokens + stack[0]):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError, match="no 'transpose'"):
        stack.transpose(1, 2)
    with pytest.raises(IndexError, match="expert 2 of 2"):
        stack[2]


def test_row_limits_reach_every_expert(ids):
    model = pruned(ids)
    pack_model(model)
    set_row_limits(model, RowLimits(packed=0))
    limits = {layer.limits for stack in stacks(model).values() for layer in stack.children()}
    assert limits == {RowLimits(packed=0)}


def test_gradients_reach_the_inputs(ids):
    model = pruned(ids)
    dense = copy.deepcopy(model)
    pack_model(model)
    gradients = []
    for one in (model, dense):
        embedded = one.get_input_embeddings()(ids[:2]).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_an_expert_that_the_model_has_not_is_refused(ids, tmp_path):
    model = pruned(ids)
    pack_model(model)
    save_packed(model, None, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    for wrong in ("model.layers.0.mlp.experts.down_proj.4", "model.layers.0.mlp.experts.down_proj.one"):
        layers = dict(manifest.layers)
        layers[wrong] = layers["model.layers.0.mlp.experts.down_proj.3"]
        dataclasses.replace(manifest, layers=layers).write(tmp_path / "out")
        with pytest.raises(PackedError, match="is not a layer of Qwen3MoeForCausalLM"):
            load(tmp_path / "out")
