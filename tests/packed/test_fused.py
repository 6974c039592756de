"""Fused products: the same bits in fewer calls, the same files, and taken apart as soon as they would be wrong."""

import copy

import pytest
import torch

from ace_triton import fuse_products, load, pack_model, prune_model, save_packed
from ace_triton.packed import packed_linear
from ace_triton.packed.fused import MOST_ROWS


def made(bits=None):
    """A tiny packed Qwen2, which has biases on queries, keys and values only."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=2, **sizes)).eval().float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    prune_model(model, None, "magnitude", "2:4")
    pack_model(model, bits=bits, group=32)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Number of rows of each product of a packed layer."""
    found = []
    multiply = packed_linear.multiply

    def counted(tokens, *rest):
        found.append(len(tokens))
        return multiply(tokens, *rest)

    monkeypatch.setattr(packed_linear, "multiply", counted)
    return found


def logits(model, rows):
    ids = torch.arange(rows)[None] % 64
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS + 1])
def test_the_same_bits_in_fewer_calls(bits, rows, calls):
    model = made(bits)
    before = logits(model, rows)
    assert len(calls) == 2 * 7
    calls.clear()
    assert fuse_products(model) == 2 * 2
    assert torch.equal(logits(model, rows), before)
    taken = rows <= MOST_ROWS and packed_linear_takes(model, rows)
    assert len(calls) == 2 * (4 if taken else 7)


def packed_linear_takes(model, rows):
    from ace_triton.packed.dispatch import choose_product

    return choose_product(rows, model.model.layers[0].mlp.gate_proj.packed) == "packed"


def test_files_and_tensors_stay_the_same(tmp_path):
    model = made()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_packed(model, None, tmp_path / "before")
    fuse_products(model)
    assert fuse_products(model) == 0
    fused = model.state_dict()
    assert fused.keys() == state.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in state.items())
    save_packed(model, None, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert torch.equal(logits(load(tmp_path / "after"), 1), logits(model, 1))


def test_a_changed_bias_counts():
    """The bias of a layer may be trained after fusing."""
    model, other = made(), made()
    fuse_products(model)
    for one in (model, other):
        with torch.no_grad():
            one.model.layers[0].self_attn.v_proj.bias += 1
    assert torch.equal(logits(model, 1), logits(other, 1))


@pytest.mark.parametrize("change", ["bias", "data", "call"])
def test_replaced_tensors_count(change):
    model, other = made(), made()
    fuse_products(model)
    name = "model.layers.0.self_attn.k_proj.values"
    for one in (model, other):
        layer = one.model.layers[0].self_attn.k_proj
        if change == "bias":
            layer.bias = torch.nn.Parameter(torch.ones_like(layer.bias))
        elif change == "data":
            layer.values.data = layer.values * 2
    if change == "call":
        states = {name: model.get_buffer(name) * 2}
        with torch.no_grad():
            found, expected = (
                torch.func.functional_call(m, states, torch.tensor([[1]])).logits for m in (model, other)
            )
        assert torch.equal(found, expected)
    assert torch.equal(logits(model, 1), logits(other, 1))


def test_a_shallow_copy_computes_by_itself():
    model = made()
    fuse_products(model)
    attention, tokens = model.model.layers[0].self_attn, torch.randn(1, 64)
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert torch.equal(copy.copy(layer)(tokens), layer(tokens))
    assert attention.q_proj._fused is not None


@pytest.mark.parametrize("change", ["to", "copy", "other tokens", "written tokens"])
def test_it_is_taken_apart_when_it_would_be_wrong(change):
    model, plain = made(), made()
    fuse_products(model)
    attention, expected = model.model.layers[0].self_attn, plain.model.layers[0].self_attn
    if change == "to":
        model.to(torch.bfloat16), plain.to(torch.bfloat16)
        assert torch.equal(logits(model, 1), logits(plain, 1))
    elif change == "copy":
        twin = copy.deepcopy(model)
        assert twin.model.layers[0].self_attn.q_proj._fused is None
        assert attention.q_proj._fused is not None
        assert torch.equal(logits(twin, 1), logits(plain, 1))
        return
    else:
        with torch.no_grad():
            tokens, others = torch.randn(1, 64), torch.randn(1, 64)
            attention.q_proj(tokens)
            if change == "written tokens":
                others = tokens.mul_(2)
            assert torch.equal(attention.k_proj(others), expected.k_proj(others))
    assert attention.v_proj._fused is None


def test_gradients_do_not_use_it(calls):
    model = made()
    fuse_products(model)
    model(torch.tensor([[1]])).logits.sum().backward()
    assert len(calls) == 2 * 7
    assert model.model.layers[0].self_attn.q_proj.bias.grad is not None


def test_the_command_fuses_what_is_packed(command, tiny_checkpoint, tmp_path):
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "packed", "--method", "magnitude", "--packed")
    assert code == 0, errors
    options = ("--prompt", "a fox", "--max-new-tokens", 8)
    fused, separate = (command("generate", tmp_path / "packed", *options, *more) for more in (["--fuse"], []))
    assert fused[0] == 0, fused[2]
    assert fused[1] == separate[1]
    assert "fused 4 groups of products (q_proj, k_proj, v_proj and gate_proj, up_proj)" in fused[2]
    assert "fused" not in separate[2]
    code, _, errors = command("generate", tiny_checkpoint, *options, "--fuse")
    assert code == 1
    assert "--fuse: no packed layers named q_proj, k_proj, v_proj or gate_proj, up_proj fit together" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "folder", "--prompt", "a", "--fuse", "--compile"), "--compile and --fuse: give only one of them"),
        (("bench", "--shape", "64x64", "--fuse"), "--fuse: for decoding with a whole model: add --tokens"),
    ],
)
def test_where_fusing_makes_no_sense_it_is_refused(command, words, message):
    code, _, errors = command(*words)
    assert code == 1
    assert message in errors
