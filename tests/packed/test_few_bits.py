"""Packed layers and checkpoints of 8 and 4 bits, and the commands that write and run them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ace_triton
from ace_triton import ArgumentError, NMLinear, PackedError, load, pack_model, prune_linear, prune_model
from ace_triton.inputs.checkpoint import load as load_dense
from ace_triton.packed.bench import bench_layer, kinds_of
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.dispatch import choose_product
from ace_triton.packed.manifest import MANIFEST_FILE, TENSORS_FILE
from ace_triton.packed.products import RowLimits
from tests.packed.test_checkpoint import copy_of, refuse_or_same, resigned, same, signed

FUZZ = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
GATE = "model.layers.0.mlp.gate_proj"


def small_model(bits: int, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prune_model(model, None, "magnitude", "8:16")
    pack_model(model, bits=bits, group=32)
    return model


@pytest.fixture(scope="module", params=[8, 4])
def sound(request, tmp_path_factory):
    """A valid folder with quantized layers, and the tensors of its model."""
    model = small_model(request.param)
    folder = tmp_path_factory.mktemp("few") / "sound"
    save_packed(model, None, folder)
    return folder, {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_comes_back_the_same(bits, dtype, tmp_path):
    model = small_model(bits, dtype)
    save_packed(model, None, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert (manifest["version"], manifest["layout"], manifest["dtype"]) == (3, 2, str(dtype).removeprefix("torch."))
    assert manifest["layers"][GATE] == {
        "pattern": "8:16",
        "shape": [48, 32],
        "bias": False,
        "bits": bits,
        "group": 32,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layout"] == 2
    ids = torch.arange(3, 19)[None]
    again = load(tmp_path / "out")
    ace_triton.register_quantizer()
    from transformers import AutoModelForCausalLM

    others = (again, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), copy.deepcopy(model))
    with torch.no_grad():
        expected = model(ids).logits
        assert all(torch.equal(other(ids).logits, expected) for other in others)
    assert same(model, again)
    layer = load(tmp_path / "out", dtype=torch.float16).get_submodule(GATE)
    assert (layer.absmax.dtype, layer.weight.dtype, layer.bits) == (torch.float16, torch.float16, bits)


def test_other_checkpoints_keep_their_version(tmp_path):
    model = small_model(8)
    prune_model(model_of := copy.deepcopy(unpacked(model)), None, "magnitude", "8:16")
    pack_model(model_of)
    save_packed(model_of, None, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert (manifest["version"], manifest["layout"]) == (2, 1)
    assert "bits" not in manifest["layers"][GATE]
    assert not any(name.endswith("absmax") for name in load_file(tmp_path / "out" / TENSORS_FILE))


def unpacked(model):
    """The model with dense layers in place of packed ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NMLinear):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = torch.nn.Parameter(layer.unpack())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dense)
    del model.save_pretrained
    return model


@FUZZ
@given(
    name=st.sampled_from([TENSORS_FILE, MANIFEST_FILE]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_changed_byte_is_found(sound, tmp_path, name, where, flip):
    folder = copy_of(sound, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= flip
    (folder / name).write_bytes(content)
    assert refuse_or_same(folder, sound[1]) or name == MANIFEST_FILE


@FUZZ
@given(
    field=st.sampled_from(["bits", "group", "pattern"]),
    value=st.sampled_from([8, 4, 2, 0, -8, True, None, "8", 32, 64, 33, 2**70, 8.0, "4:8", "2:4", []]),
    missing=st.booleans(),
)
def test_a_manifest_that_was_edited_and_signed_again_never_loads_wrong(sound, tmp_path, field, value, missing):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    if missing:
        del content["layers"][GATE][field]
    else:
        content["layers"][GATE][field] = value
    (folder / MANIFEST_FILE).write_text(signed(content))
    refuse_or_same(folder, sound[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{GATE}.values"].view(torch.uint8).fill_(0x80), "a number that no quantization gives"),
        (lambda t: t[f"{GATE}.absmax"].neg_(), "NaN, infinity or a negative number"),
        (lambda t: t.pop(f"{GATE}.absmax"), r"1 missing \(.*absmax\)"),
        (lambda t: t.update({f"{GATE}.values": t[f"{GATE}.values"].to(torch.int32)}), r"values is torch\.int32"),
        (lambda t: t[f"{GATE}.meta"].fill_(0), "keeps 0 of 16 weights"),
    ],
)
def test_tensors_that_do_not_fit_are_named(sound, tmp_path, change, message):
    with pytest.raises(PackedError, match=message):
        load(resigned(copy_of(sound, tmp_path), change))


def test_a_layout_and_a_version_that_do_not_fit_the_layers(sound, tmp_path):
    for field, older, message in (
        ("version", 2, r"version 2 has no layers like .*; version 3 has"),
        ("layout", 1, "its layers have layout 2, it says 1"),
    ):
        folder = copy_of(sound, tmp_path)
        content = json.loads((folder / MANIFEST_FILE).read_text())
        content[field] = older
        (folder / MANIFEST_FILE).write_text(signed(content))
        with pytest.raises(PackedError, match=message):
            load(folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_multiplies_casts_and_differentiates(bits):
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 23)
    prune_linear(layer, method="magnitude", sparsity="8:16")
    packed = NMLinear.from_linear(layer, 8, 16, bits=bits, group=32)
    dense = packed.unpack()
    for rows in (1, 3, 100):
        tokens = torch.randn(rows, 96, requires_grad=True)
        outputs = packed(tokens)
        torch.testing.assert_close(outputs, tokens @ dense.t() + layer.bias, rtol=1e-4, atol=2e-4)
        outputs.sum().backward()
        torch.testing.assert_close(tokens.grad, dense.sum(0).expand(rows, -1))
    assert packed.packed.packed_bytes == {8: 48 * 23, 4: 24 * 23}[bits] + 12 * 23 + 4 * 3 * 23
    ones = torch.ones(2, 96, dtype=torch.float16)
    for cast in (lambda layer: layer.half(), lambda layer: layer.type(torch.float16)):
        half = cast(copy.deepcopy(packed))
        dtypes = half.values.dtype, half.meta.dtype, half.absmax.dtype
        assert dtypes == (packed.values.dtype, torch.int32, torch.float16)
        torch.testing.assert_close(half(ones).float(), packed(ones.float()), rtol=4e-3, atol=4e-3)
    assert f"pattern=8:16, bits={bits}, group=32" in repr(packed)
    for one, other in ((packed, NMLinear.from_linear(layer, 8, 16)), (NMLinear.from_linear(layer, 8, 16), packed)):
        with pytest.raises(RuntimeError, match="load the weights into a layer with the same bits"):
            one.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(ArgumentError, match=r"tokens must be \[\.\.\., 96\] torch\.float32"):
        packed(torch.ones(2, 96, dtype=torch.float16))
    assert choose_product(10**6, packed.packed) == "dense"
    assert choose_product(10**6, packed.packed, RowLimits(0, semi_structured=1)) == "dense"


@pytest.mark.usefixtures("default_products")
def test_bench_times_it():
    kinds = kinds_of(small_model(4))
    assert {kind.bits for kind in kinds} == {4}
    assert str(kinds[0]) == "32x32 8:16 float32, 4 bits"
    times = bench_layer(kinds[0], "cpu", rows=(1, 2), seconds=0.01)
    assert times.packed_bytes == 32 * (8 + 4 + 4)
    assert times.refusals.keys() == {"semi_structured"}


def test_bits_are_checked_before_anything_is_packed(tiny_model):
    prune_model(tiny_model, None, "magnitude", "2:4")
    for bits, group in ((5, 128), (8, 48)):
        with pytest.raises(ArgumentError):
            pack_model(tiny_model, bits=bits, group=group)
    assert not any(isinstance(module, NMLinear) for module in tiny_model.modules())


def test_the_commands(command, tiny_checkpoint, some_text, tmp_path):
    text = ("--calibration", some_text, "--samples", 4, "--length", 16)
    few = ("--bits", 4, "--group", 32)
    code, out, errors = command("prune", tiny_checkpoint, tmp_path / "dense", "--method", "wanda", *few, *text)
    assert code == 0, errors
    assert json.loads((tmp_path / "dense" / "ace_triton.json").read_text())["recipe"]["quantize"] == {
        "bits": 4,
        "group": 32,
        "rule": "gptq",
    }
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "one", "--method", "wanda", *few, *text, "--packed")
    assert code == 0, errors
    code, out, errors = command("pack", tmp_path / "dense", tmp_path / "two", *few)
    assert code == 0, errors
    assert "layers packed 2:4, 4 bits" in out
    assert "nearest value" not in errors
    assert same(load(tmp_path / "one"), load(tmp_path / "two"))
    dense = load_dense(str(tmp_path / "dense"), dtype="auto", device="cpu")[0]
    for name, layer in load(tmp_path / "two").named_modules():
        if isinstance(layer, NMLinear):
            assert torch.equal(layer.unpack(), dense.get_submodule(name).weight)
    code, out, _ = command("info", tmp_path / "two")
    assert "2:4, packed, 4 bits" in out
    code, _, errors = command("pack", tmp_path / "dense", tmp_path / "three", "--bits", 8, "--stream")
    assert code == 0
    assert "rounded to the nearest value of 8 bits; ace-triton prune --bits 8 loses less" in errors
    model, _ = load_dense(str(tmp_path / "dense"), dtype="auto", device="cpu")
    pack_model(model, bits=8)
    assert same(load(tmp_path / "three"), model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", "--bits", 5), "bits must be one of 8, 4; got 5"),
        (("prune", "--quantize", "absmax"), "add --bits 8 or --bits 4"),
        (("prune", "--bits", 8, "--group", 40), "multiple of 32 above 0 and at most 1048576; got 40"),
        (("pack", "--bits", 3), "bits must be one of 8, 4; got 3"),
        (("pack", "--bits", 8, "--group", 1), "multiple of 32 above 0 and at most 1048576; got 1"),
    ],
)
def test_invalid_flags_are_one_clear_error(command, tiny_checkpoint, tmp_path, words, message):
    name, *flags = words
    code, _, errors = command(name, tiny_checkpoint, tmp_path / "out", *flags)
    assert code != 0
    assert message in errors
    assert not (tmp_path / "out").exists()
