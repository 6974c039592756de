"""RowsLinear and its checkpoints: packed layers whose zeros follow no pattern."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ace_triton
from ace_triton import NMLinear, PackedWeightError, RowLimits, RowsLinear, pack_model, prune_model
from ace_triton.errors import PackedError
from ace_triton.packed import products
from ace_triton.packed.checkpoint import load, save_packed
from ace_triton.packed.dispatch import choose_product
from ace_triton.packed.inspect import inspect_packed
from ace_triton.packed.manifest import MANIFEST_FILE
from tests.packed.test_checkpoint import copy_of, refuse_or_same, resigned, same, signed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pair(dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> tuple[nn.Linear, RowsLinear]:
    """A layer with about half of its weight zero at random places, and the same packed."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(75, 23, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight *= torch.rand(23, 75, generator=generator) < 0.5
    return layer, RowsLinear.from_linear(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [None, RowLimits(0), RowLimits(1000)])
def test_the_product_is_the_dense_one(dtype, limits):
    layer, packed = pair(dtype)
    packed.limits = limits
    weight, offset = layer.weight.double(), layer.bias.double()
    for shape in ((75,), (1, 75), (3, 5, 75), (0, 75)):
        tokens = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            outputs = packed(tokens)
        assert (outputs.dtype, outputs.shape) == (dtype, (*shape[:-1], 23))
        truth = tokens.double() @ weight.t() + offset
        torch.testing.assert_close(outputs.double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_it_gives_the_weight_back_and_is_smaller():
    layer, packed = pair()
    assert torch.equal(packed.unpack(), layer.weight)
    assert torch.equal(packed.weight + 0, layer.weight)
    assert packed.packed.packed_bytes < 0.7 * packed.packed.dense_bytes
    with pytest.raises(PackedWeightError):
        packed.weight.zero_()
    assert "kept=" in repr(packed)


def test_gradients_compilation_and_transforms():
    layer, packed = pair()
    tokens = torch.randn(4, 75, requires_grad=True)
    wanted = torch.autograd.grad(layer(tokens).square().sum(), [tokens, layer.bias])
    found = torch.autograd.grad(packed(tokens).square().sum(), [tokens, packed.bias])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    parts = packed.packed.values, packed.packed.meta, packed.packed.starts, 75
    arguments = (tokens, packed.bias, *parts, None, None, False, "")
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.ace_triton.rows_linear, arguments, test_utils=checks)
    outputs = torch.vmap(packed)(tokens.detach()[:, None])
    torch.testing.assert_close(outputs[:, 0], packed(tokens.detach()))


def test_state_dicts_copies_pickles_and_casts():
    _, packed = pair()
    tokens = torch.randn(2, 75)
    stored = io.BytesIO()
    torch.save(packed, stored)
    stored.seek(0)
    _, other = pair(seed=1)  # It has another number of values.
    other.load_state_dict(packed.state_dict())
    with torch.no_grad():
        for again in (copy.deepcopy(packed), torch.load(stored, weights_only=False), other):
            assert torch.equal(again(tokens), packed(tokens))
        half = copy.deepcopy(packed).to(torch.bfloat16)
        assert (half.values.dtype, half.meta.dtype, half.starts.dtype) == (torch.bfloat16, torch.int32, torch.int64)
        assert half(tokens.bfloat16()).dtype == torch.bfloat16
        cast = copy.deepcopy(packed)._apply(lambda tensor: tensor.float())
    assert (cast.meta.dtype, cast.starts.dtype) == (torch.int32, torch.int64)
    assert torch.equal(cast.unpack(), packed.unpack())
    double = copy.deepcopy(packed).double()
    torch.testing.assert_close(double(tokens.double()).float(), packed(tokens))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda starts: starts.flip(0)),
        ("meta", lambda meta: meta ^ 1),
        ("meta", lambda meta: meta.float()),
        ("values", lambda values: values[:-1]),
    ],
)
def test_a_damaged_state_dict_is_refused(name, change):
    _, packed = pair()
    state = packed.state_dict()
    state[name] = change(state[name])
    before = packed.unpack()
    with pytest.raises(RuntimeError, match="meta: "):
        packed.load_state_dict(state)
    assert torch.equal(packed.unpack(), before)


def test_products_of_others_are_asked_only_about_forms_that_they_name(monkeypatch):
    class NMOnly(products.Product):
        name = label = "nm_only"

        def refusal(self, packed, rows):
            return None if packed.n else "n is needed"

        def multiply(self, tokens, packed, bias, limits):
            raise AssertionError

    known = products.registry.products, products.registry.others
    products.register_product(NMOnly())
    try:
        _, packed = pair()
        assert choose_product(1, packed.packed) in ("packed", "dense")
        layer = nn.Linear(8, 4)
        nn.init.zeros_(layer.weight)
        assert choose_product(1, NMLinear.from_linear(layer, 2, 4).packed) == "nm_only"
    finally:
        products.registry.products, products.registry.others = known


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer) -> tuple[Path, dict[str, torch.Tensor]]:
    """A packed folder with layers of both forms, and the tensors of its model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)).eval()
    prune_model(model, None, "magnitude", "2:4", include="*proj", exclude="*up_proj")
    prune_model(model, None, "magnitude", 0.5, include="*up_proj")
    report = pack_model(model)
    assert sorted({layer.pattern for layer in report.layers}) == ["2:4", "unstructured"]
    folder = tmp_path_factory.mktemp("packed") / "sound"
    save_packed(model, tokenizer, folder)
    assert same(model, load(folder))
    return folder, {**model.state_dict(), **dict(model.named_buffers())}


def test_a_folder_with_row_starts_has_the_version_that_knows_them(sound):
    content = json.loads((sound[0] / MANIFEST_FILE).read_text())
    assert content["version"] == 3
    name = "model.layers.0.mlp.up_proj"
    assert content["layers"][name] == {"pattern": "unstructured", "values": 240, "shape": [24, 20], "bias": False}
    found = {tensor.name: (tensor.pattern, tensor.zeros) for tensor in inspect_packed(sound[0])}
    assert found[f"{name}.weight"] == ("unstructured", 0.5)
    assert found["model.layers.0.mlp.gate_proj.weight"] == ("2:4", 0.5)


def test_transformers_loads_it(sound):
    from transformers import AutoModelForCausalLM

    ace_triton.register_quantizer()
    model = AutoModelForCausalLM.from_pretrained(sound[0])
    assert isinstance(model.model.layers[0].mlp.up_proj, RowsLinear)
    assert same(model, load(sound[0]))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("values", lambda x: x[:-1].clone(), "values is"),
        ("values", lambda x: x.int(), "values is"),
        ("starts", lambda x: x[1:].clone(), "starts is"),
        ("starts", lambda x: x.int(), "starts must be torch.int64"),
        ("starts", lambda x: torch.cat((x[:3], x[3:4] + 99, x[4:])), "row 3 starts at value"),
        ("starts", lambda x: x + 1, "row starts go from 1 to 241"),
        ("meta", lambda x: x ^ 3, "but it has 10 values"),
        ("meta", lambda x: x << 12, "marks inputs past the last one"),
    ],
)
def test_damaged_tensors_are_named(sound, tmp_path, part, change, message):
    name = f"model.layers.0.mlp.up_proj.{part}"
    folder = resigned(copy_of(sound, tmp_path), lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(PackedError, match=message):
        load(folder)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    layer=st.sampled_from(["up_proj", "gate_proj"]),
    key=st.sampled_from(["pattern", "values", "shape", "bias"]),
    value=st.sampled_from(["unstructured", "2:4", None, True, -1, 0, 239, 240, 2**70, [24, 20], [20, 24], "x", 1.5]),
)
def test_an_edited_entry_never_loads_wrong(sound, tmp_path, layer, key, value):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["layers"][f"model.layers.0.mlp.{layer}"][key] = value
    (folder / MANIFEST_FILE).write_text(signed(content))
    refuse_or_same(folder, sound[1])


def test_an_older_version_cannot_hold_them(sound, tmp_path):
    folder = copy_of(sound, tmp_path)
    content = {**json.loads((folder / MANIFEST_FILE).read_text()), "version": 2}
    (folder / MANIFEST_FILE).write_text(signed(content))
    with pytest.raises(PackedError, match=r"version 2 has no layers like .*; version 3 has"):
        load(folder)
