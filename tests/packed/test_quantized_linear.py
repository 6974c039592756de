"""Heads, embeddings and layers that are not pruned in 8 and 4 bits: packed, saved, loaded, unpacked and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ace_triton
from ace_triton import ArgumentError, PackedError, QuantizedEmbedding, QuantizedLinear, TiedLinear, load, pack_model
from ace_triton.packed.bench import bench_layer, kinds_of
from ace_triton.packed.checkpoint import save_packed
from ace_triton.packed.manifest import MANIFEST_FILE
from tests.packed.test_checkpoint import copy_of, refuse_or_same, resigned, same, signed

FUZZ = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
IDS = torch.arange(3, 19)[None]
EMBEDDING, HEAD, UP = "model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"


def small_model(*, tied: bool = True, dtype: torch.dtype = torch.float32, vocabulary: int = 41):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ace_triton.prune_model(model, None, "magnitude", "8:16", exclude="*up_proj")
    return model


@pytest.fixture(scope="module", params=[8, 4])
def sound(request, tmp_path_factory):
    """A valid folder with a tied head and a dense layer in few bits, and the tensors of its model."""
    model = small_model()
    pack_model(model, bits=8, group=32, head_bits=request.param, dense_bits=request.param)
    folder = tmp_path_factory.mktemp("dense") / "sound"
    save_packed(model, None, folder)
    return folder, {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_the_same(tied, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model = small_model(tied=tied, dtype=dtype)
    dense = copy.deepcopy(model)
    bits = {"head_bits": 8, "dense_bits": 4} if tied else {"head_bits": 4, "embedding_bits": 8, "dense_bits": 8}
    report = pack_model(model, bits=8, group=32, **bits)
    kinds = {layer.name: (layer.pattern, layer.bits) for layer in report.layers}
    assert kinds[EMBEDDING] == ("dense", 8)
    assert kinds[UP] == ("dense", bits["dense_bits"])
    assert kinds.get(HEAD) == (None if tied else ("dense", 4))
    save_packed(model, None, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert (manifest["version"], manifest["layout"]) == (4, 2)
    fields = {"pattern": "dense", "shape": [41, 32], "bias": False, "group": 32}
    assert manifest["layers"][EMBEDDING] == {**fields, "bits": 8, "embedding": True}
    of_head = {**fields, "bits": 8, "tied": EMBEDDING} if tied else {**fields, "bits": 4}
    assert manifest["layers"][HEAD] == of_head
    again = load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.tie_weights()
    with torch.no_grad():
        expected = model(IDS).logits
        assert all(torch.equal(other(IDS).logits, expected) for other in (again, theirs, copy.deepcopy(model)))
        assert same(model, again)
        assert float((expected - dense(IDS).logits).norm() / expected.norm()) < 0.2
        assert type(again.lm_head) is (TiedLinear if tied else QuantizedLinear)
        ace_triton.unpack_model(again)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(again(IDS).logits, expected, rtol=tolerance, atol=tolerance)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
        again.tie_weights()
        again.save_pretrained(tmp_path / "dense")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
        assert torch.equal(dense(IDS).logits, again(IDS).logits)


def test_a_tied_head_follows_its_embedding():
    model = small_model()
    pack_model(model, bits=8, group=32, embedding_bits=8)
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert copied.lm_head.embedding is copied.model.embed_tokens
    assert (copied.lm_head.dtype, copied.lm_head.values.dtype) == (torch.bfloat16, torch.int8)
    assert model.lm_head.dtype == torch.float32
    assert torch.equal(model.lm_head.weight + 0, model.model.embed_tokens.weight + 0)
    assert "lm_head.values" not in model.state_dict()
    assert copied(IDS).logits.dtype == torch.bfloat16


@FUZZ
@given(
    name=st.sampled_from([EMBEDDING, HEAD, UP]),
    field=st.sampled_from(["bits", "group", "shape", "pattern", "embedding", "tied", "bias"]),
    value=st.sampled_from([8, 4, 0, True, None, "8", 32, 64, 2**70, "dense", "2:4", [], [41, 32], HEAD, EMBEDDING, UP]),
    missing=st.booleans(),
)
def test_a_manifest_that_was_edited_and_signed_again_never_loads_wrong(sound, tmp_path, name, field, value, missing):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    if missing:
        content["layers"][name].pop(field, None)
    else:
        content["layers"][name][field] = value
    (folder / MANIFEST_FILE).write_text(signed(content))
    refuse_or_same(folder, sound[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{EMBEDDING}.values"].view(torch.uint8).fill_(0x80), "a number that no quantization gives"),
        (lambda t: t[f"{UP}.absmax"].neg_(), "NaN, infinity or a negative number"),
        (lambda t: t.pop(f"{EMBEDDING}.absmax"), r"1 missing \(.*absmax\)"),
        (lambda t: t.update({f"{HEAD}.values": torch.ones(2)}), r"1 unexpected \(lm_head\.values\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(sound, tmp_path, change, message):
    with pytest.raises(PackedError, match=message):
        load(resigned(copy_of(sound, tmp_path), change))


def test_an_older_version_has_no_such_layers(sound, tmp_path):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text()) | {"version": 3}
    (folder / MANIFEST_FILE).write_text(signed(content))
    with pytest.raises(PackedError, match=r"version 3 has no layers like .*; version 4 has"):
        load(folder)


def test_what_cannot_be_stored_in_few_bits_changes_nothing():
    model = small_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ArgumentError, match="8 bits for the head and 4 for the embedding: they share a weight"):
        pack_model(model, head_bits=8, embedding_bits=4)
    with pytest.raises(ArgumentError, match="bits must be one of 8, 4; got 5"):
        pack_model(model, head_bits=5)
    for table, words in ((EMBEDDING, {"embedding_bits": 8}), (HEAD, {"head_bits": 8, "dense_bits": 8})):
        broken = small_model(tied=False)
        broken.get_submodule(table).weight.data[3, 3] = float("nan")
        with pytest.raises(ArgumentError, match=f"{table} holds NaN or infinity"):
            pack_model(broken, **words)
        assert type(broken.get_submodule(UP)) is torch.nn.Linear
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match="the output head has hooks"):
        pack_model(model, head_bits=8)
    hook.remove()
    model.other = torch.nn.Linear(32, 41)
    model.other.weight = model.lm_head.weight
    with pytest.raises(ArgumentError, match="other shares its weight"):
        pack_model(model, head_bits=8)
    del model.other
    with pytest.raises(ArgumentError, match="a Sequential has no output head"):
        pack_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), head_bits=8)
    assert [type(module) for module in model.modules()] == before
    embedding = torch.nn.Embedding(3, 4, max_norm=1.0)
    model.set_input_embeddings(embedding)
    with pytest.raises(ArgumentError, match="its max_norm writes to the table"):
        pack_model(model, embedding_bits=8)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_multiplies_casts_and_differentiates(bits):
    torch.manual_seed(0)
    layer = torch.nn.Linear(95, 23)
    packed = QuantizedLinear.from_linear(layer, bits, 32)
    dense = packed.unpack()
    for rows in (1, 3, 100):
        tokens = torch.randn(rows, 95, requires_grad=True)
        outputs = packed(tokens)
        torch.testing.assert_close(outputs, tokens @ dense.t() + layer.bias, rtol=1e-4, atol=2e-4)
        outputs.sum().backward()
        torch.testing.assert_close(tokens.grad, dense.sum(0).expand(rows, -1))
    half = copy.deepcopy(packed).half()
    ones = torch.ones(2, 95, dtype=torch.float16)
    assert (half.values.dtype, half.absmax.dtype) == (packed.values.dtype, torch.float16)
    torch.testing.assert_close(half(ones).float(), packed(ones.float()), rtol=4e-3, atol=4e-3)
    other = QuantizedLinear.from_linear(layer, 12 - bits, 32)
    with pytest.raises(RuntimeError, match="load the weights into a layer with the same bits"):
        packed.load_state_dict(other.state_dict())
    arguments = torch.randn(3, 95), layer.bias.detach(), packed.values, packed.absmax, 32, 95, None, None, False
    torch.library.opcheck(torch.ops.ace_triton.quantized_linear.default, arguments)
    assert f"bits={bits}, group=32" in repr(packed)


def test_an_embedding_looks_up_rounded_rows():
    torch.manual_seed(0)
    table = torch.nn.Embedding(7, 33, padding_idx=2)
    quantized = QuantizedEmbedding.from_embedding(table, 8, 32)
    ids = torch.tensor([[6, 0], [2, 2]])
    assert torch.equal(quantized(ids), quantized.weight[ids])
    assert bool((quantized(ids)[1] == 0).all())
    assert quantized.bfloat16()(ids).dtype == torch.bfloat16
    assert quantized.values.dtype == torch.int8


def test_bench_times_it():
    model = small_model()
    pack_model(model, bits=8, group=32, head_bits=4)
    kind = next(kind for kind in kinds_of(model) if kind.n is None)
    assert str(kind) == "41x32 dense float32, 4 bits"
    assert bench_layer(kind, "cpu", rows=(1,), seconds=0.01).packed_bytes == 41 * (16 + 4)


def test_the_commands(command, tokenizer, tmp_path):
    small_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    few = ("--bits", 8, "--group", 32, "--head-bits", 4, "--dense-bits", 8)
    code, out, errors = command("pack", tmp_path / "pruned", tmp_path / "whole", *few)
    assert code == 0, errors
    assert "layers not pruned, 4 bits" in out
    code, _, errors = command("pack", tmp_path / "pruned", tmp_path / "streamed", *few, "--stream")
    assert code == 0, errors
    assert same(load(tmp_path / "whole"), load(tmp_path / "streamed"))
    code, out, _ = command("info", tmp_path / "whole")
    assert "dense, packed, 4 bits" in out
    assert " not pruned (4 bits)" in out.splitlines()[0]
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "dense, packed" in line]
    assert rows
    assert all(row[4] == "-" for row in rows)
    for decoder in ("compiled", "transformers"):
        words = ("--prompt", "the", "--max-new-tokens", 2, "--decoder", decoder)
        code, _, errors = command("generate", tmp_path / "whole", *words)
        assert code == 0, errors
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten")
    code, out, errors = command("evaluate", tmp_path / "whole", "--text", text, "--length", 8)
    assert code == 0, errors
    assert "perplexity" in out
    code, _, errors = command("pack", tmp_path / "pruned", tmp_path / "no", "--head-bits", 5)
    assert code == 1
    assert "--head-bits: bits must be one of 8, 4; got 5" in errors
