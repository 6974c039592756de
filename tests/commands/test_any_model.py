"""``ace-triton prune`` of encoders, encoder-decoders, and models of images and audio."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ace_triton
from ace_triton import prune_model
from ace_triton.formats.registry import load_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.model_task import task_of
from tests.inputs.small_checkpoints import KINDS, bert_tokenizer, write_images, write_sounds

DOCUMENTS = ["the fox jumps over the dog", "a short one", "words of the last document"]
TOWERS = {"t5": 2, "clip": 2, "llava": 2, "whisper": 2}
CLASSES = {
    "bert": "AutoModel",
    "masked bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "clip": "AutoModelForZeroShotImageClassification",
    "llava": "AutoModelForImageTextToText",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "wav2vec2": "AutoModelForCTC",
}


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return path


@pytest.fixture
def media(tmp_path):
    """The options that name the files for what a kind reads."""
    images, sounds = write_images(tmp_path / "pictures"), write_sounds(tmp_path / "sounds")
    return {"text": (), "images": ("--images", images), "audio": ("--audio", sounds)}


@pytest.fixture
def prune(command, documents, tmp_path):
    def run(source, *words):
        small = ("--calibration", documents, "--samples", 3, "--length", 16, "--method", "wanda")
        return command("prune", source, tmp_path / "out", *small, *words)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pruned_and_loads_with_its_class(kind, prune, media, tmp_path):
    save, reads = KINDS[kind]
    save(tmp_path / "dense")
    code, out, errors = prune(tmp_path / "dense", *media[reads])
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert report["auto_class"] == CLASSES[kind] == task_of(tmp_path / "dense").auto_class
    assert [tower["run"] for tower in report["towers"]] == ["blocks"] * TOWERS.get(kind, 1)
    assert report["account"]["pruned_share"] > 0.97
    assert all(name in out for name in report["outside_layers"][:4])
    loader = getattr(transformers, CLASSES[kind])
    dense, pruned = (loader.from_pretrained(tmp_path / name).state_dict() for name in ("dense", "out"))
    layers = {f"{layer['name']}.weight" for layer in report["layers"]}
    for name, weight in dense.items():
        if name in layers:
            assert torch.equal((pruned[name].reshape(-1, 4) != 0).sum(1), torch.full((weight.numel() // 4,), 2))
        else:
            assert torch.equal(pruned[name], weight), name
    kept = [json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("dense", "out")]
    assert kept[0] == kept[1]
    assert f"{CLASSES[kind]}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    written = {"config.json", "model.safetensors", "generation_config.json"}
    for path in (tmp_path / "dense").iterdir():
        if path.name not in written:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_run_writes_the_same_bytes(kind, prune, media, tmp_path):
    save, reads = KINDS[kind]
    save(tmp_path / "dense")
    assert prune(tmp_path / "dense", *media[reads])[0] == 0
    (tmp_path / "out").rename(tmp_path / "in-memory")
    code, _, errors = prune(tmp_path / "dense", *media[reads], "--stream")
    assert code == 0, errors
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("in-memory", "out"))
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in whole.items())
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("in-memory", "out")]
    assert files[0] == files[1]
    facts = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    assert (facts["auto_class"], facts["streamed"]) == (CLASSES[kind], {"resumed_units": []})


def test_an_interrupted_streamed_run_of_two_towers_resumes(prune, monkeypatch, tmp_path):
    """The run is stopped in the second tower, whose blocks read what the pruned first one returns."""
    KINDS["t5"][0](tmp_path / "dense")
    assert prune(tmp_path / "dense")[0] == 0
    (tmp_path / "out").rename(tmp_path / "in-memory")

    def stopping(progress, label, unit):
        def move(done: int, total: int, *_) -> None:
            if label == "prune" and done == 3:
                raise KeyboardInterrupt

        return move

    with monkeypatch.context() as patch:
        patch.setattr("ace_triton.commands.prune_run.progress_bar", stopping)
        assert prune(tmp_path / "dense", "--stream")[0] != 0
    code, _, errors = prune(tmp_path / "dense", "--stream")
    assert code == 0, errors
    assert "resuming: 3 of 4 blocks are done" in errors
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("in-memory", "out"))
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_plan_is_what_pruning_does(kind, prune, command, media, tmp_path):
    """The plan reads no text, so it does not notice that there is none."""
    save, reads = KINDS[kind]
    save(tmp_path / "dense")
    assert prune(tmp_path / "dense", *media[reads])[0] == 0
    report = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    words = ("--method", "wanda", "--samples", 3, "--length", 16, "--calibration", "some/dataset")
    code, out, errors = command("plan", tmp_path / "dense", *media[reads], *words, "--json", tmp_path / "plan.json")
    assert code == 0, errors
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["layers"] == [layer["name"] for layer in report["layers"]]
    assert plan["account"] == report["account"]
    assert plan["towers"] == {tower["name"]: tower["blocks"] for tower in report["towers"]}
    assert set(plan["memory"]["streamed"]["phases"]) == {"copy the weights", "prune"}
    assert plan["memory"]["in_memory"]["peak_bytes"] > sum(
        path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors")
    )
    assert all(f"tower {tower}" in out for tower in plan["towers"])


def test_a_plan_counts_the_hidden_states_of_images(media, monkeypatch, tmp_path):
    """Four patches and a class token for each image, instead of --length tokens."""
    from ace_triton import plan_pruning

    monkeypatch.setattr("ace_triton.planning.pruning_plan.resident_bytes", lambda: 0)  # It grows between two plans.
    KINDS["vit"][0](tmp_path / "dense")
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    few, many = (
        plan_pruning(tmp_path / "dense", "wanda", samples=count, inputs=batch, task=None).in_memory.phases["prune"]
        for count in (1000, 3000)
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    statistics = 3 * config.hidden_size + config.intermediate_size  # One number for each channel that a layer reads.
    assert many - few == 2000 * 4 * (5 * config.hidden_size + statistics)


def test_an_encoder_sees_special_tokens_and_no_padding(prune, tmp_path):
    """As if the user had tokenized the documents with padding, in any order."""
    KINDS["bert"][0](tmp_path / "dense")
    assert prune(tmp_path / "dense")[0] == 0
    model, _ = checkpoint.load(tmp_path / "dense", task=None)
    made = bert_tokenizer()(DOCUMENTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    prune_model(model, [{name: made[name] for name in ("input_ids", "attention_mask")}], "wanda", "2:4")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(written[name], weight), name


def test_an_encoder_is_packed_and_loads_packed(prune, command, tmp_path):
    KINDS["bert"][0](tmp_path / "dense")
    code, _, errors = prune(tmp_path / "dense", "--packed")
    assert code == 0, errors
    assert prune(tmp_path / "dense", "--overwrite")[0] == 0
    dense, _ = load_model(tmp_path / "out", task=None)
    code, _, errors = command("pack", tmp_path / "out", tmp_path / "packed")
    assert code == 0, errors
    packed, companions = load_model(tmp_path / "packed")
    ids = torch.arange(6, 14)[None]
    assert torch.allclose(packed(ids)[0], dense(ids)[0], atol=1e-6)
    assert companions.tokenizer("ab")["input_ids"] == [1, 6, 7, 2]
    code, _, errors = command("generate", tmp_path / "packed", "--prompt", "ab", "--max-new-tokens", 8)
    assert (code, "is a BertModel (feature-extraction), and generate takes" in errors) == (1, True)
    ace_triton.register_quantizer()
    again = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(ids)[0], packed(ids)[0])


def test_folders_of_sentence_transformers_stay_whole(prune, tmp_path):
    dense = tmp_path / "dense"
    KINDS["bert"][0](dense)
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("{}")
    (dense / "2_Dense").mkdir()
    (dense / "2_Dense" / "model.safetensors").write_bytes(b"weights of a module")
    (dense / "onnx").mkdir()
    (dense / "onnx" / "model.onnx").write_bytes(b"dense weights")
    (dense / "pytorch_model.bin").write_bytes(b"dense weights")
    paths = ["", "1_Pooling", "2_Dense", "../dense", "/tmp"]
    (dense / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    assert prune(dense)[0] == 0
    listed = json.loads((tmp_path / "out" / "ace_triton.json").read_text())["files"]
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json", "tokenizer.json"} <= set(listed)
    assert not {"onnx/model.onnx", "pytorch_model.bin"} & set(listed)
    assert prune(dense, "--overwrite")[0] == 0


def test_a_task_chooses_the_class(prune, tmp_path):
    KINDS["masked bert"][0](tmp_path / "dense")
    code, _, errors = prune(tmp_path / "dense", "--task", "embedding")
    assert code == 0, errors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    code, _, errors = prune(tmp_path / "dense", "--overwrite", "--task", "classification")
    assert code == 1
    assert "classifier.weight" in errors
    assert "was saved as a BertForMaskedLM, not as a BertForSequenceClassification: 4 missing" in errors
    assert "leave --task (task) out" in " ".join(errors.split())
    code, _, errors = prune(tmp_path / "dense", "--overwrite", "--task", "speech")
    assert code == 1
    assert "no bert model for the task 'speech'; it has" in errors


def test_towers_are_excluded_by_name(prune, media, tmp_path):
    KINDS["clip"][0](tmp_path / "dense")
    code, _, errors = prune(tmp_path / "dense", *media["images"], "--exclude", "text_model.*", "--include", "*")
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "ace_triton.json").read_text())
    names = [layer["name"] for layer in report["layers"]]
    assert {name.partition(".")[0] for name in names} == {"vision_model", "visual_projection", "text_projection"}
    assert report["account"]["excluded"] > 0


def test_text_beside_an_image_is_its_caption(prune, media, tmp_path, documents):
    KINDS["clip"][0](tmp_path / "dense")
    for path in (tmp_path / "pictures").glob("*.png"):
        path.with_suffix(".txt").write_text("a caption")
    documents.unlink()
    code, out, errors = prune(tmp_path / "dense", *media["images"])
    assert code == 0, errors
    assert "calibration: 3 images from pictures, 33 tokens without padding" in out


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("vit", (), "a ViTForImageClassification reads more than text: give --images DIR"),
        ("whisper", (), "a WhisperForConditionalGeneration reads more than text: give --audio DIR"),
        ("bert", ("--images", "."), "--images: a BertModel does not read that"),
        ("bert", ("--bos", "each"), "--bos is for causal language models"),
        ("bert", ("--calibration", "self"), "only causal language models write text"),
        ("bert", ("--length", "33"), "--length 33 is more than the model's 32 positions"),
        ("bert", ("--task", "sorting"), "unknown task 'sorting'"),
        ("vit", ("--dry-run",), "a ViTForImageClassification reads more than text: give --images DIR"),
        ("vit", ("--images", "missing"), "--images missing: no such folder"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, words, message, prune, tmp_path):
    KINDS[kind][0](tmp_path / "dense")
    code, _, errors = prune(tmp_path / "dense", *words)
    assert code == 1
    assert message in errors
    assert errors.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_named(prune, tmp_path):
    KINDS["vit"][0](tmp_path / "dense")
    (write_images(tmp_path / "pictures", 1) / "0.png").write_bytes(b"no image")
    code, _, errors = prune(tmp_path / "dense", "--images", tmp_path / "pictures")
    assert code == 1
    assert "0.png: cannot be read as an image" in errors


def test_audio_is_resampled(tmp_path):
    from ace_triton.inputs.media import read_audio

    path = sorted(write_sounds(tmp_path, 1, rate=8000).glob("*.wav"))[0]
    slow, fast = read_audio(path, 8000), read_audio(path, 16000)
    assert len(slow) == 2000
    assert len(fast) == 4000
    assert abs(fast[::2] - slow).max() < 0.2


REFUSED = {
    "generate": ("--prompt", "a"),
    "serve": (),
    "export": ("OUT", "--to", "gguf"),
    "shrink": ("OUT",),
    "study": ("OUT",),
    "pack": ("OUT", "--stream"),
    "evaluate": ("--tasks", "arc_easy"),
}


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_commands_for_text_decoders_say_what_a_model_is_and_what_takes_it(kind, command, monkeypatch, tmp_path):
    monkeypatch.setattr("ace_triton.commands.evaluate.check_tasks_installed", lambda: None)
    KINDS[kind][0](tmp_path / "dense")
    (tmp_path / "dense" / "ace_triton.json").write_text(json.dumps({"source": "hub/name"}))
    what = {"bert": "a BertModel (feature-extraction)", "vit": "a ViTForImageClassification (image-classification)"}
    for name, words in REFUSED.items():
        words = [tmp_path / "out" if word == "OUT" else word for word in words]
        code, _, errors = command(name, tmp_path / "dense", *words)
        start = f"error: {tmp_path / 'dense'}: is {what[kind]}, and {name}"
        last = errors.splitlines()[-1]
        assert (code, last.startswith(start)) == (1, True), (name, errors)
        assert " takes causal language models only: " in last
        assert not (tmp_path / "out").exists()


def test_a_recipe_repeats_the_task(prune, command, documents, tmp_path):
    """The masked model is pruned without its head, as the first run was told."""
    KINDS["masked bert"][0](tmp_path / "dense")
    assert prune(tmp_path / "dense", "--task", "embedding")[0] == 0
    recipe = tmp_path / "out" / "ace_triton.json"
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "again", "--recipe", recipe)
    assert code == 0, errors
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    words = ("--recipe", recipe, "--task", "fill-mask")
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "third", *words)
    assert f"task embedding of {recipe} is replaced by fill-mask" in errors
    documents.write_text(json.dumps({"text": "other words"}))
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "fourth", "--recipe", recipe)
    assert (code, "documents.jsonl is not the text that the recipe was used with" in errors) == (1, True)


def test_a_recipe_of_images_needs_the_same_images(prune, command, media, tmp_path):
    KINDS["vit"][0](tmp_path / "dense")
    assert prune(tmp_path / "dense", *media["images"])[0] == 0
    recipe, folder = tmp_path / "out" / "ace_triton.json", tmp_path / "pictures"
    chosen = sorted(folder.glob("*.png"))
    for path in chosen:
        path.write_bytes(chosen[0].read_bytes())
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "again", "--recipe", recipe)
    assert (code, "pictures does not hold the files that the recipe was used with" in errors) == (1, True)
    folder.rename(tmp_path / "elsewhere")
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "again", "--recipe", recipe)
    assert (code, "the folder pictures was not found here or near the recipe: give it with" in errors) == (1, True)
    words = ("--recipe", recipe, "--images", tmp_path / "elsewhere")
    assert command("prune", tmp_path / "dense", tmp_path / "again", *words)[0] == 0


def test_a_recipe_repeats_images_beside_it(prune, command, media, tmp_path):
    KINDS["vit"][0](tmp_path / "dense")
    assert prune(tmp_path / "dense", *media["images"])[0] == 0
    recipe = tmp_path / "out" / "ace_triton.json"
    code, _, errors = command("prune", tmp_path / "dense", tmp_path / "again", "--recipe", recipe)
    assert code == 0, errors
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
