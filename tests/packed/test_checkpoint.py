import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ace_triton
from ace_triton import NMLinear, prune_model
from ace_triton.errors import PackedError
from ace_triton.formats.registry import load_model
from ace_triton.inputs.checkpoint import CheckpointError
from ace_triton.packed.checkpoint import load, save_packed
from ace_triton.packed.manifest import MANIFEST_FILE, TENSORS_FILE
from ace_triton.packed.pack_model import pack_model

FUZZ = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def sparse_model(make_decoder, family="llama", sparsity="2:4", dtype=torch.float32):
    model = make_decoder(family, attention="sdpa", dtype=dtype)
    assert model.dtype == dtype
    prune_model(model, torch.arange(3, 35).reshape(2, 16), "magnitude", sparsity)
    pack_model(model)
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    def tensors(model):
        return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_every_family_comes_back_the_same(family, make_decoder, ids, tmp_path):
    model = sparse_model(make_decoder, family, dtype=torch.bfloat16)
    save_packed(model, None, tmp_path / "out")
    again = ace_triton.load(tmp_path / "out")
    assert same(model, again)
    assert not again.training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in again.parameters()]
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is table.weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.54), (torch.float16, 0.60), (torch.bfloat16, 0.60)])
def test_the_file_is_smaller_and_the_dtype_its_own(make_decoder, tmp_path, dtype, most):
    model = sparse_model(make_decoder, dtype=dtype)
    save_packed(model, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / TENSORS_FILE)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, NMLinear)]
    packed = sum(stored[f"{name}.{part}"].nbytes for name, _ in layers for part in ("values", "meta"))
    assert packed <= most * sum(layer.packed.dense_bytes for _, layer in layers)
    assert all(type(tensor) is torch.Tensor for tensor in stored.values())
    assert load(tmp_path / "out").dtype == dtype
    assert load(tmp_path / "out", dtype=torch.float32).model.layers[0].mlp.up_proj.values.dtype == torch.float32


def test_the_dense_weights_are_never_built(make_decoder, tmp_path):
    save_packed(sparse_model(make_decoder), None, tmp_path / "out")
    largest = 0
    reset = torch.nn.Linear.reset_parameters

    def watch(layer):
        nonlocal largest
        largest = max(largest, 0 if layer.weight.is_meta else layer.weight.numel())
        return reset(layer)

    torch.nn.Linear.reset_parameters = watch
    try:
        load(tmp_path / "out")
    finally:
        torch.nn.Linear.reset_parameters = reset
    assert largest == 0


@pytest.mark.parametrize("sparsity", ["1:4", "4:8", "2:16"])
def test_other_patterns(make_decoder, tmp_path, sparsity):
    model = sparse_model(make_decoder, sparsity=sparsity)
    save_packed(model, None, tmp_path / "out")
    assert same(model, load(tmp_path / "out"))


def test_what_lies_beside_it(make_decoder, tokenizer, tmp_path):
    model = sparse_model(make_decoder)
    model.generation_config.max_new_tokens = 7
    save_packed(model, tokenizer, tmp_path / "out", report={"method": "ace"})
    again, words = load_model(tmp_path / "out")
    assert words("fox")["input_ids"] == tokenizer("fox")["input_ids"]
    assert again.generation_config.max_new_tokens == 7
    assert json.loads((tmp_path / "out" / "ace_triton.json").read_text())["method"] == "ace"


def test_what_cannot_be_saved_or_is_no_packed_folder(make_decoder, tiny_checkpoint, tmp_path):
    model = make_decoder("llama")
    with pytest.raises(CheckpointError, match="no packed layer"):
        save_packed(model, None, tmp_path / "out")
    model = sparse_model(make_decoder)
    with pytest.raises(CheckpointError, match="--overwrite"):
        save_packed(model, None, tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"the model is torch\.float64"):
        save_packed(model.double(), None, tmp_path / "out")
    with pytest.raises(PackedError, match="name a folder that ace-triton pack wrote"):
        load(tiny_checkpoint)
    assert not (tmp_path / "out").exists()
    assert load_model(tiny_checkpoint)[0].dtype == torch.float32


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer) -> tuple[Path, dict[str, torch.Tensor]]:
    """A valid packed folder, and the tensors of its model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)).eval()
    prune_model(model, None, "magnitude", "2:4")
    pack_model(model)
    folder = tmp_path_factory.mktemp("packed") / "sound"
    save_packed(model, tokenizer, folder)
    return folder, {**model.state_dict(), **dict(model.named_buffers())}


def copy_of(sound: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[0], folder)
    return folder


def refuse_or_same(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """True if loading the folder is refused. Otherwise asserts that the loaded model equals the saved one."""
    try:
        model = load(folder)
    except CheckpointError:
        return True
    loaded = {**model.state_dict(), **dict(model.named_buffers())}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    return False


@FUZZ
@given(
    name=st.sampled_from([TENSORS_FILE, MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer.json"]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_changed_byte_is_found(sound, tmp_path, name, where, flip):
    folder = copy_of(sound, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= flip
    (folder / name).write_bytes(content)
    refused = refuse_or_same(folder, sound[1])
    assert refused or name == MANIFEST_FILE, "only spacing in the manifest may change unseen"


@FUZZ
@given(
    name=st.sampled_from([TENSORS_FILE, MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer.json"]),
    cut=st.floats(0, 1, exclude_max=True),
    more=st.binary(max_size=3),
)
def test_a_cut_or_longer_file_is_found(sound, tmp_path, name, cut, more):
    folder = copy_of(sound, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(cut * len(content))] + more)
    assert refuse_or_same(folder, sound[1])
    (folder / name).write_bytes(content + b"\0" + more)
    assert refuse_or_same(folder, sound[1])
    (folder / name).unlink()
    assert refuse_or_same(folder, sound[1])


def signed(content) -> str:
    """A manifest with any content and a correct checksum."""
    if isinstance(content, dict):
        content.pop("sha256", None)
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content)


LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})
)


@FUZZ
@given(data=st.data())
def test_a_manifest_that_was_edited_and_signed_again_never_loads_wrong(sound, tmp_path, data):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    place, parent, key = content, None, None
    while isinstance(place, dict) and place and (parent is None or data.draw(st.integers(0, 4))):
        parent, key = place, data.draw(st.sampled_from(sorted(place)))
        place = place[key]
    if data.draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = data.draw(
            LEAVES | st.sampled_from(["1:4", "4:8", [24, 16], [16, 16], "float16", "lm_head.weight"])
        )
    (folder / MANIFEST_FILE).write_text(signed(content))
    refuse_or_same(folder, sound[1])


@FUZZ
@given(content=st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)))
def test_any_json_at_all_is_refused(sound, tmp_path, content):
    folder = copy_of(sound, tmp_path)
    (folder / MANIFEST_FILE).write_text(signed(content))
    assert refuse_or_same(folder, sound[1])


def resigned(folder: Path, change) -> Path:
    """The folder with changed tensors and correct checksums."""
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors)
    save_file(tensors, folder / TENSORS_FILE)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    stored = (folder / TENSORS_FILE).read_bytes()
    content["files"][TENSORS_FILE] = {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    (folder / MANIFEST_FILE).write_text(signed(content))
    return folder


GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{GATE}.meta"][3].bitwise_xor_(1 << 5), rf"{GATE}: the metadata of row 3, group 1 keeps [13] of"),
        (lambda t: t[f"{GATE}.meta"][2].bitwise_or_(1 << 20), rf"{GATE}: the metadata of row 2 marks inputs past"),
        (lambda t: t.update({f"{GATE}.meta": t[f"{GATE}.meta"].float()}), r"gate_proj\.meta is torch\.float32"),
        (lambda t: t.update({f"{GATE}.values": t[f"{GATE}.values"][:, :6].clone()}), r"values is .* \(24, 6\)"),
        (lambda t: t.pop(f"{GATE}.values"), rf"1 missing \({GATE}\.values\)"),
        (lambda t: t.update({"more": torch.ones(1)}), r"1 unexpected \(more\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(sound, tmp_path, change, message):
    with pytest.raises(PackedError, match=message):
        load(resigned(copy_of(sound, tmp_path), change))


def test_every_file_has_a_checksum(sound, tmp_path):
    folder = copy_of(sound, tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert set(json.loads((folder / MANIFEST_FILE).read_text())["files"]) == names - {MANIFEST_FILE, "README.md"}
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"].update(a=words["model"]["vocab"]["b"], b=words["model"]["vocab"]["a"])
    for name, content in (("tokenizer.json", words), ("generation_config.json", {"eos_token_id": 3})):
        folder = copy_of(sound, tmp_path)
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(PackedError, match=rf"{name}: (has \d+ bytes instead|does not match)"):
            load(folder)
    folder = copy_of(sound, tmp_path)
    (folder / "README.md").write_text("A model card that was added later.")
    assert not refuse_or_same(folder, sound[1])


def test_an_older_folder_loads_and_its_gap_is_named(sound, tmp_path):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["version"] = 1
    content["files"] = {name: content["files"][name] for name in (TENSORS_FILE, "config.json")}
    (folder / MANIFEST_FILE).write_text(signed(content))
    message = "without checksums of the tokenizer and the generation config; pack the model again"
    with pytest.warns(UserWarning, match=message):
        assert not refuse_or_same(folder, sound[1])


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_never_leads_out_of_its_folder(sound, tmp_path, name):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / MANIFEST_FILE).write_text(signed(content))
    with pytest.raises(PackedError, match=f"'{name}' is not a file in the folder"):
        load(folder)


@pytest.mark.parametrize(("field", "known"), [("version", 4), ("layout", 2)])
def test_a_newer_file_says_so(sound, tmp_path, field, known):
    folder = copy_of(sound, tmp_path)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content[field] = known + 1
    (folder / MANIFEST_FILE).write_text(signed(content))
    with pytest.raises(PackedError, match=f"{field} {known + 1} is newer than {known}, .* upgrade ace-triton"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 32}, r"gate_proj: packed as a linear layer \(24, 16\)"),
        ({"num_hidden_layers": 10**6}, r"config\.json asks for 1,000,000 layers, .* holds only 19 tensors"),
        ({"architectures": None, "model_type": "clip"}, "is a clip model, not a causal language model"),
    ],
)
def test_a_sealed_config_of_another_model_is_refused(sound, tmp_path, changes, message):
    folder = copy_of(sound, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    content = json.loads((folder / MANIFEST_FILE).read_text())
    stored = (folder / "config.json").read_bytes()
    content["files"]["config.json"] = {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    (folder / MANIFEST_FILE).write_text(signed(content))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_what_load_cannot_give(sound, tmp_path):
    with pytest.raises(CheckpointError, match=r"dtype torch\.float64: packed checkpoints can be loaded as float32, "):
        load(sound[0], dtype=torch.float64)
    with pytest.raises(CheckpointError, match="device 'nosuch' is not available here"):
        load(sound[0], device="nosuch")
    with pytest.raises(PackedError, match="no such folder"):
        load(tmp_path / "nosuch")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = copy_of(sound, tmp_path)
        (folder / name).unlink()
        with pytest.raises(PackedError, match=f"{name}: is missing"):
            load_model(folder)
