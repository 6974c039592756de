"""Bits of the weights that stay dense: in prune, its recipe's file, its plan, the model card, and all bits at once."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ace_triton import PackedError, Quantization, Recipe, RecipeError, fuse_products, load, pack_model
from ace_triton.commands import pack as pack_command
from ace_triton.commands.recipe_file import SavedRun
from ace_triton.commands.recipe_flags import recipe_from, stored_from
from ace_triton.kernels.packed_dense import quantize_dense
from ace_triton.packed.stored_bits import StoredBits
from ace_triton.planning.disk import _saved_by_bits
from ace_triton.planning.layers import planned

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = ("--method", "magnitude", "--sparsity", "2:4")


@pytest.fixture
def dense(tokenizer, tmp_path):
    """dense(tied): a folder with a Llama, whose embedding is larger than its blocks."""

    def made(tied=False):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=1024, num_hidden_layers=1, tie_word_embeddings=tied, **SIZES)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return made


@pytest.mark.parametrize("tied", [True, False])
def test_prune_stores_what_stays_dense_and_its_recipe_repeats_it(command, dense, tmp_path, tied):
    source, few = dense(tied), ("--bits", 8, "--quantize", "absmax", "--group", 32, "--head-bits", 4, "--dense-bits", 8)
    words = (*SMALL, "--exclude", "*.q_proj", "--packed", *few)
    code, planned, errors = command("plan", source, *words, "--json", tmp_path / "plan.json")
    assert code == 0, errors
    assert "memory of its weights when it is loaded" in planned
    code, _, errors = command("prune", source, tmp_path / "out", *words)
    assert code == 0, errors
    model = load(tmp_path / "out")
    stored = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    disk = json.loads((tmp_path / "plan.json").read_text())["disk"]
    assert disk["weight_bytes"] == pytest.approx(stored, rel=0.03)
    told = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert told["stored_bits"] == {"head_bits": 4, "dense_bits": 8, "group": 32}
    assert told["history"][-1]["did"].endswith("packed: head 4 bits, dense 8 bits")
    embedding = "model.embed_tokens" if tied else "lm_head"
    assert {"pattern": "dense", "bits": 4, "layers": 1, "name": embedding} in told["packed_layers"]
    assert f"{embedding}, not pruned, in 4 bits" in (tmp_path / "out" / "README.md").read_text()
    code, _, errors = command(
        "prune", source, tmp_path / "again", "--recipe", tmp_path / "out" / "ace_triton.json", "--stream"
    )
    assert code == 0, errors
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_bits_ask_for_a_packed_model(command, dense, tmp_path):
    words = ("prune", dense(), tmp_path / "out", *SMALL, "--head-bits")
    code, _, errors = command(*words, 8)
    assert code == 1
    assert "--head-bits is for packed models: add --packed" in errors
    code, _, errors = command(*words, 5, "--packed")
    assert code == 1
    assert "--head-bits: bits must be one of 8, 4; got 5" in errors


def test_pack_says_why_a_source_in_few_bits_is_small(command, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_command, "weight_file_bytes", lambda source: 10)
    code, out, errors = command("pack", dense(), tmp_path / "out", "--all-bits", 8)
    assert code == 0, errors
    assert "weight files: 0.0 KB -> " in out
    assert "the files of dense store the weights in fewer bits than the loaded model has" in " ".join(errors.split())


@pytest.mark.parametrize("tied", [True, False])
def test_all_bits_store_a_dense_model_by_one_option(command, dense, tmp_path, tied):
    source = dense(tied)
    code, out, errors = command("pack", source, tmp_path / "out", "--all-bits", 8)
    assert code == 0, errors
    folders = (source, tmp_path / "out")
    before, after = (sum(file.stat().st_size for file in of.glob("*.safetensors")) / 1e3 for of in folders)
    assert f"weight files: {before:.1f} KB -> {after:.1f} KB" in out
    assert "in fewer bits" not in errors
    assert "loses less" not in errors + out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# dense stored in 8 bits" in card
    assert "- pruned" not in card
    told = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert told["source"] == "dense"
    assert told["packed_layers"] == [{"pattern": "dense", "bits": 8, "layers": 8 if tied else 9}]
    assert fuse_products(load(tmp_path / "out")) == 0
    with pytest.raises(PackedError, match="fuse=True: no packed layers named q_proj, k_proj, v_proj or gate_proj"):
        load(tmp_path / "out", fuse=True)


def test_bits_of_a_dense_model_name_the_option(command, dense, tmp_path):
    code, _, errors = command("pack", dense(), tmp_path / "out", "--bits", 8)
    assert code == 1
    assert "ace-triton pack --all-bits 8" in errors


def test_all_bits_leave_an_embedding_that_scales():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 8 * super().forward(ids)

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=True, **SIZES))
    scaled = Scaled(64, 64)
    scaled.weight = model.lm_head.weight
    model.model.embed_tokens = scaled
    report = pack_model(model, all_bits=8)
    assert [skipped.name for skipped in report.skipped] == ["lm_head"]
    assert "give no bits" not in report.skipped[0].reason
    assert {layer.bits for layer in report.layers} == {8}


def test_the_loaded_products_are_fused(command, dense, tmp_path):
    code, _, errors = command("prune", dense(), tmp_path / "out", *SMALL, "--packed")
    assert code == 0, errors
    ids = torch.tensor([[1, 2, 3]])
    fused = load(tmp_path / "out", fuse=True)
    assert fused.model.layers[0].self_attn.q_proj._fused is not None
    assert torch.equal(fused(ids).logits, load(tmp_path / "out")(ids).logits)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"head": 8}, "stored_bits has no entry 'head'"),
        ({"head_bits": "8"}, "head_bits must be a whole number"),
        ({"head_bits": 5}, "stored_bits: bits must be one of 8, 4; got 5"),
        ([8], "stored_bits must be an object"),
        ({"group": -32}, "must be a multiple of 32 above 0 and at most 1048576; got -32"),
        ({"head_bits": 8, "group": 2**40}, "at most 1048576; got 1099511627776"),
    ],
)
def test_invalid_records(record, message):
    with pytest.raises(RecipeError, match=message):
        StoredBits.from_dict(record)


def test_new_bits_have_the_group_of_the_saved_ones():
    head = SavedRun(Recipe("magnitude"), stored=StoredBits(head_bits=8, group=64))
    kept = SavedRun(Recipe("magnitude", quantize=Quantization(8, 64)))
    for saved, given, group in (
        (head, {"bits": 4}, 64),
        (head, {"bits": 4, "group": 32}, 32),
        (kept, {"packed": True, "head_bits": 8}, 64),
        (kept, {"packed": True, "head_bits": 8, "group": 32}, 32),
    ):
        recipe = recipe_from(given, saved)
        stored = stored_from(given, saved.stored, recipe.quantize)
        assert (recipe.quantize.group, stored.group) == (group, group)


def test_a_file_with_two_groups_is_refused(tmp_path):
    recipe = Recipe("magnitude", quantize=Quantization(8, 64)).to_dict()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"recipe": recipe, "stored_bits": {"head_bits": 8, "group": 128}}))
    with pytest.raises(RecipeError, match="quantize has group 64, stored_bits group 128: a packed model has one group"):
        SavedRun.read(path)


def test_a_group_larger_than_a_row_is_the_row_also_in_a_plan():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, tie_word_embeddings=False, **SIZES))
    weight = model.lm_head.weight.detach()
    stored = quantize_dense(weight, 8, 2**20)
    assert torch.equal(stored.absmax, weight.abs().amax(1, keepdim=True))
    size = sum(tensor.nbytes for tensor in stored.tensors.values())
    assert (
        _saved_by_bits(model, planned(model, Recipe("magnitude")), {"head_bits": 8, "group": 2**20})
        == weight.nbytes - size
    )


def test_a_record_round_trips():
    bits = StoredBits(head_bits=8, dense_bits=4, group=64)
    assert StoredBits.from_dict(json.loads(json.dumps(bits.to_dict()))) == bits
