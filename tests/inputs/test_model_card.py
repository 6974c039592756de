"""The model card beside a pruned or packed model."""

import json

import pytest
import torch

import ace_triton
from ace_triton.formats.registry import save_model
from ace_triton.inputs import checkpoint
from ace_triton.inputs.model_card import license_of, write_card
from ace_triton.provenance import source_facts

QUANTIZED = {"bits": 4, "group": 128, "rule": "absmax"}


def front(card):
    """The lines of its metadata."""
    return card.split("---\n")[1].splitlines()


@pytest.fixture
def pruned(command, tiny_checkpoint, tmp_path):
    (tiny_checkpoint / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "magnitude", "--update", "none")[0] == 0
    return tmp_path / "pruned"


def test_a_pruned_model_has_one_that_says_what_was_done(pruned):
    card = (pruned / "README.md").read_text()
    assert "license: apache-2.0" in front(card)
    assert '- "2:4"' in front(card)
    assert "# tiny pruned to 2:4" in card
    for row in ("Source | tiny", "License of the source | apache-2.0", "Method | magnitude", "Pruned layers | 14"):
        assert f"| {row} |" in card
    report = checkpoint.read_report(pruned)
    zeros = sum(layer["parameters"] for layer in report["layers"]) / 2
    assert f"| Zeros | 50.0% of their weights, {zeros / report['account']['model']:.1%} of the model's |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "`ace-triton pack` makes" in card
    assert "repeats the pruning.\n" in card
    recipe = card.partition("```json\n")[2].partition("```")[0]
    assert json.loads(recipe) == report["recipe"]
    assert "README.md" in report["files"]


def test_a_packed_model_has_one_and_both_are_replaced(pruned, command, tmp_path):
    assert command("pack", pruned, tmp_path / "packed")[0] == 0
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "ace_triton.load(" in card
    assert "license: apache-2.0" in front(card)
    assert "| Method | magnitude |" in card
    assert command("pack", pruned, tmp_path / "packed", "--overwrite")[0] == 0
    (tmp_path / "packed" / "README.md").write_text("edited")
    ace_triton.load(tmp_path / "packed")


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_model_saved_from_python_can_be_replaced(make_decoder, tmp_path, format):
    model = make_decoder("llama", attention="sdpa")
    ace_triton.prune_model(model, None, "magnitude")
    if format == "packed":
        ace_triton.pack_model(model)
    for _ in range(2):
        save_model(model, None, tmp_path / "out", format, overwrite=True)
    assert "written by ace-triton" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_recovery_did(tmp_path):
    write_card(tmp_path, {"recovery": {"steps": 4, "tokens": 256, "losses": [3.5, 1.25]}})
    card = (tmp_path / "README.md").read_text()
    assert "| Recovery | 4 optimizer steps, 256 tokens |" in card
    assert "| Loss in the last step of recovery | 1.25 nats per token |" in card
    assert "repeats the pruning" not in card
    assert "## Use" not in card  # No configuration, so it is not known how the folder is loaded.


def test_the_commands_are_those_of_quantized_and_recovered_weights(tmp_path):
    report = {"recipe": {"method": "wanda"}, "recovery": {"settings": {"quantize": QUANTIZED}}}
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, report)
    card = (tmp_path / "README.md").read_text()
    assert "`ace-triton pack --bits 4 --group 128` makes a smaller checkpoint" in card
    assert "`ace-triton prune SOURCE OUT --recipe ace_triton.json` repeats the pruning, not the recovery that" in card


@pytest.mark.parametrize(
    "report",
    [
        {"layers": 5, "recipe": "fast", "update": [], "source": 3},
        {"layers": [{"kept": "half"}], "account": None, "recovery": {"steps": 1, "tokens": 2, "losses": 7}},
        {"layers": [], "sparsity": "2:4\nlicense: mit", "calibration_report": {"perplexity": "high"}},
    ],
)
def test_a_report_of_another_shape_is_no_error(tmp_path, report):
    write_card(tmp_path, report)
    assert "license: mit" not in (tmp_path / "README.md").read_text()


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, {"method": "wanda"})
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_source_of_the_hub_is_the_base_model(tmp_path):
    write_card(tmp_path, {**source_facts("someone/model", tmp_path / "out"), "method": "wanda"})
    assert "base_model: someone/model" in front((tmp_path / "README.md").read_text())


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\r\nlicense: llama3.2\r\n---\r\n", "llama3.2"),
        ("license: mit\n", None),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("Text\n---\nlicense: mit\n---\n", None),
        ("\x00\xff", None),
    ],
)
def test_the_license_is_that_of_the_metadata(tmp_path, text, license):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert license_of(tmp_path) == license
    assert license_of(tmp_path / "nosuch") is None


def test_the_license_of_a_file_is_that_of_its_folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    torch.save({}, tmp_path / "model.gguf")
    assert source_facts(tmp_path / "model.gguf", tmp_path / "out")["source_license"] == "mit"
