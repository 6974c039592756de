"""Dense copies of packed weights: which layers have one, what they compute, and when they are freed."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModel

from ace_triton import (
    ArgumentError,
    PackedLinear,
    RowLimits,
    dense_copies,
    keep_dense,
    load,
    pack_model,
    prune_model,
    set_row_limits,
)
from ace_triton.packed import dense_copy
from ace_triton.packed.dispatch import choose_product, copy_limits, default_limits
from ace_triton.packed.keep_dense import copies_of_folder
from ace_triton.packed.saving import save_packed
from tests.decoders import small_towers

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A pruned encoder, and the folder of the same model packed."""
    torch.manual_seed(0)
    pruned = small_towers.bert().eval()
    prune_model(pruned, None, "magnitude", "2:4")
    packed = copy.deepcopy(pruned)
    pack_model(packed)
    folder = tmp_path_factory.mktemp("packed") / "encoder"
    save_packed(packed, None, folder)
    return pruned, folder


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def hidden(model):
    with torch.inference_mode():
        return model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("loaded", [load, AutoModel.from_pretrained])
def test_a_loaded_encoder_multiplies_by_dense_copies_and_computes_what_the_dense_model_does(encoder, loaded):
    pruned, folder = encoder
    model = loaded(folder)
    layers = layers_of(model)
    sizes = [layer.in_features * layer.out_features * 4 for layer in layers]
    assert (dense_copies(model).layers, dense_copies(model).bytes) == (len(layers), sum(sizes))
    assert copies_of_folder(folder) == dense_copies(model)
    many = max(layer.limits.packed for layer in layers) + 1
    assert {choose_product(many, layer.packed, layer.limits) for layer in layers} == {"dense_copy"}
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(hidden(one), hidden(pruned))


def test_a_model_that_generates_keeps_none_unless_asked(make_decoder, tmp_path):
    model = make_decoder("llama", attention="sdpa", dtype=torch.float32)
    prune_model(model, torch.arange(3, 35).reshape(2, 16), "magnitude", "2:4")
    pack_model(model)
    save_packed(model, None, tmp_path / "out")
    plain, fast = load(tmp_path / "out"), load(tmp_path / "out", keep="fast")
    assert dense_copies(plain).layers == copies_of_folder(tmp_path / "out").layers == 0
    assert {layer.limits for layer in layers_of(plain)} == {None}
    assert dense_copies(fast).layers == len(layers_of(fast))


def test_packed_keeps_none_and_frees_those_that_exist(encoder):
    model = load(encoder[1])
    values = layers_of(model)[0].values
    assert values in dense_copy._copies._kept
    assert keep_dense(model, "packed").bytes == 0
    assert values not in dense_copy._copies._kept
    assert dense_copies(load(encoder[1], keep="packed")).bytes == 0
    with pytest.raises(ArgumentError, match="keep 'small': use auto, packed, fast"):
        load(encoder[1], keep="small")


def test_a_weight_that_changes_gets_a_new_copy(encoder):
    model = load(encoder[1])
    set_row_limits(model, RowLimits(0, dense_copy=True))
    layer, tokens = layers_of(model)[0], torch.randn(20, layers_of(model)[0].in_features)
    changes = (
        lambda: layer.values.mul_(2),
        lambda: setattr(layer, "meta", layer.meta.roll(1, 0)),
        lambda: setattr(layer.values, "data", layer.values * 2),
        lambda: [setattr(layer.values, "data", layer.values * 2) for _ in range(2)],  # The first memory is used again.
    )
    for change in changes:
        change()
        expected = torch.nn.functional.linear(tokens, layer.unpack(), layer.bias)
        assert torch.equal(layer(tokens), expected)
        with torch.no_grad():  # Takes fewer checks.
            assert torch.equal(layer(tokens), expected)


def test_in_inference_mode_a_changed_weight_gets_a_new_copy(encoder):
    pruned, _ = encoder
    with torch.inference_mode():
        assert not layers_of(load(encoder[1]))[0].values.is_inference()
        model = copy.deepcopy(pruned)
        pack_model(model)
        keep_dense(model)
        layer = layers_of(model)[0]
        layer.values = layer.values.clone()
        assert layer.values.is_inference()
        tokens = torch.randn(20, layer.in_features)
        layer(tokens)
        layer.values.mul_(2)
        assert torch.equal(layer(tokens), torch.nn.functional.linear(tokens, layer.unpack(), layer.bias))


@pytest.mark.parametrize("restore", [lambda m: set_row_limits(m, None), lambda m: setattr(m, "limits", RowLimits(4))])
def test_limits_without_a_copy_free_it(encoder, restore):
    layer = layers_of(load(encoder[1]))[0]
    assert layer.values in dense_copy._copies._kept
    restore(layer)
    assert layer.values not in dense_copy._copies._kept
    assert dense_copies(layer).bytes == 0
    dense_copy.dense_copy_of(layer.packed)  # Without the layer's limits.
    keep_dense(layer, "packed")
    assert layer.values not in dense_copy._copies._kept


def test_a_layer_with_a_copy_refuses_what_other_layers_refuse(encoder):
    layer = layers_of(load(encoder[1]))[0]
    layer.limits = RowLimits(0, dense_copy=True)
    with torch.no_grad():
        with pytest.raises(
            ArgumentError, match=r"tokens must be \[\.\.\., \d+\] torch.float32, got \(\) torch.float32"
        ):
            layer(torch.tensor(1.0))
        with pytest.raises(ArgumentError, match=r"tokens must be a tensor \[\.\.\., \d+\], got list"):
            layer([1.0])


def test_a_folder_with_code_of_its_own_is_not_asked_about(encoder, tmp_path, monkeypatch):
    folder = shutil.copytree(encoder[1], tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    assert copies_of_folder(folder) is None


@pytest.mark.parametrize("bits", [None, 8])
def test_the_limits_with_a_copy_are_never_above_those_without(bits):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        without = default_limits(torch.device("cpu"), dtype, (8, 16), bits).packed
        for cached in (True, False):
            limits = copy_limits(dtype, (8, 16), bits, cached=cached)
            assert limits.dense_copy
            assert limits.packed <= without


def test_limits_with_a_copy_pass_through_an_operation(encoder):
    limits = RowLimits(2, 3, others=(), dense_copy=True)
    assert RowLimits.from_flat(*limits.flat()) == limits
    assert repr(limits) == "RowLimits(packed=2, semi_structured=3, dense_copy=True)"
    layer = layers_of(load(encoder[1]))[0]
    tokens = torch.randn(20, layer.in_features)
    layer.limits = RowLimits(0, dense_copy=True)
    assert torch.equal(
        layer._traced(tokens, layer.bias), torch.nn.functional.linear(tokens, layer.unpack(), layer.bias)
    )
