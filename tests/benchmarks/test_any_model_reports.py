"""The reports on encoders, on architectures and on input norms, with small models."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ace_triton.decoders.blocks import find_towers
from ace_triton.decoders.calibration_forms import batches_of
from benchmarks.harness import any_models
from benchmarks.harness.any_models import small_any_model
from benchmarks.reports import architectures, encoder_speed, encoders, families, norms, vision
from tests.decoders import small_towers
from tests.inputs.small_checkpoints import KINDS


def test_a_small_encoder_is_reported(tmp_path, monkeypatch):
    KINDS["bert"][0](tmp_path / "model")
    letters = "abcdefghijkl"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{a}b c{b} d e{a}" for a in letters for b in letters[:4]))
    monkeypatch.setattr(encoders, "METHODS", ("wanda", "cosp"))
    monkeypatch.setattr(encoders, "PATTERNS", ("2:4",))
    monkeypatch.setattr(encoders, "RECIPES", {"recovered": {"method": "wanda", "steps": 2}})
    monkeypatch.setattr(encoders, "STEP_SENTENCES", 8)
    monkeypatch.setattr(encoders, "LENGTH", 16)
    monkeypatch.setattr(encoders, "GRID_LENGTH", 16)
    monkeypatch.setattr(encoder_speed, "SPEED_ROUNDS", 1)
    sizes = {"sentences": 24, "grid_sentences": 20, "samples": 8, "grid_samples": 4}
    out = tmp_path / "encoders"
    encoders.main(str(tmp_path / "model"), str(text), str(text), None, **sizes, out=out)
    found = json.loads(out.with_suffix(".json").read_text())
    assert 0.9 < found["grid 2:4 wanda lstsq"]["cosine"] < 1
    assert found["recipe 2:4 recovered"]["inputs"] == 24
    page = out.with_suffix(".md").read_text()
    assert f"| 2:4 | recovered | {found['recipe 2:4 recovered']['cosine']:.3f} |" in page
    assert "CosP is number" in page
    fast = found["sentence not pruned"]["packed, 8 bits, auto"]
    assert f"| not pruned | packed, 8 bits | {fast['file_bytes'] / 1e6:.1f} MB |" in page
    before = dict(found)
    encoders.main(str(tmp_path / "model"), str(text), str(text), None, **sizes, out=out)
    assert json.loads(out.with_suffix(".json").read_text()) == before


def test_an_architecture_is_judged(tmp_path):
    found = architectures.judge("bert", "AutoModelForMaskedLM")
    assert (found["outcome"], found["layers"], found["towers"]) == ("pruned", 12, ["bert.encoder.layer"])
    refused = architectures.judge("resnet", "AutoModelForImageClassification")
    assert refused["outcome"] == "not pruned"
    page = "\n".join(architectures.page({"encoder": {"bert": found}, "vision": {"resnet": refused}}))
    assert re.search(r"\| encoder \| 1 of \d+ \| 1 \| 0 \| 0 \|", page)
    assert re.search(r"\| vision \| 1 of \d+ \| 0 \| 1 \| 0 \|", page)
    failed = {"outcome": "not pruned", "reason": "ValueError: sizes['full']['rotary']=2."}
    page = "\n".join(architectures.page({"encoder": {"bert": failed}}))
    # Markdown would take two indexes in a row for a link.
    assert r"left a wrong result: ValueError: sizes\['full']\['rotary']=2: bert." in page


def test_reasons_are_grouped_and_causal_families_are_counted(tmp_path):
    path = tmp_path / "families.md"
    titles = {"Pruned, block by block": 3, "Pruned, the whole model run for each block": 2, "Not pruned": 1}
    path.write_text(
        "".join(f"- **{title}** ({count}): a, b.\n" for title, count in {**titles, "Not judged": 4}.items())
    )
    without = "the blocks of {} have no linear layers, and only linear layers are pruned; their weights are in Conv2d"
    refused = {name: {"outcome": "not pruned", "reason": without.format(name)} for name in ("resnet", "regnet")}
    page = "\n".join(architectures.page({"vision": refused}, families.Counts.of_page(path)))
    assert "| [causal](families.md) | 10 of 10 | 5 | 1 | 4 |" in page
    assert "their weights are in Conv2d: resnet, regnet." in page


@pytest.mark.parametrize("name", ["gemma4", pytest.param("video_llava", id="an image and a video")])
def test_a_family_with_inputs_of_its_own_runs(name):
    """Whatever the family's forward takes: each tower is reached."""
    model, inputs = small_any_model(name, "AutoModelForImageTextToText")
    towers = find_towers(model, batches_of(model, [inputs], None)[0])
    assert len(towers) > 1
    assert all(tower.is_reached for tower in towers)


def test_sizes_of_parts_in_parts_are_joined_and_left_out(monkeypatch):
    monkeypatch.setitem(any_models.SIZES, "kind", {"depth": ..., "part": {"inner": {"width": 4}, "heads": 2}})
    sizes = {"depth": 2, "part": {"heads": 4, "inner": {"width": 8, "layers": 2}}}
    found = any_models.with_own_sizes("kind", sizes)
    assert found == {"part": {"heads": 2, "inner": {"width": 4, "layers": 2}}}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ImportError: XModel requires the timm library but it was not found", "needs the package timm, which is"),
        ("its smallest configuration here has 91,000,000 parameters", "has 91,000,000 parameters in its smallest"),
        ("StrictDataclassFieldValidationError: Validation error for field 'num_heads':", "none of the small sizes"),
        ("TypeError: X.forward() missing 1 required positional argument: 'state'", "needs an input that is neither"),
        ("AttributeError: 'XOutputWithPast' object has no attribute 'image_outputs'", "ends in an error on any input"),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 2x8)", "none of the inputs that were tried"),
    ],
)
def test_a_family_without_a_small_model_has_a_plain_reason(error, words):
    page = "\n".join(architectures.page({"encoder": {"bert": {"outcome": "not made", "reason": error}}}))
    line = next(line for line in page.splitlines() if line.endswith(": bert."))
    assert words in line
    assert "Error" not in page


def test_the_loss_of_a_vision_model_with_fit_and_recovery_is_stated():
    setting = {"images": 8, "test_images": 4, "epochs": 1, "recovery_epochs": 1, "calibration_images": 2}
    setting |= {"sizes": vision.SIZES, "parameters": 9, "processor": "x", "torch": "y"}
    fit = {"pruned": 0.8, "fine_tuned": 0.9, "recovered": 0.96}
    methods = {"wanda": {"none": {"pruned": 0.5}, "lstsq": fit}, "cosp": {"lstsq": {**fit, "recovered": 0.95}}}
    page = "\n".join(vision.page({"setting": setting, "dense": 0.97, "methods": methods}))
    assert "With fit and recovery 2 methods lose at most 2.0 points (cosp; aim: 2)." in page
    assert "| wanda | 50.0% | 80.0% | - | - | 90.0% | 96.0% |" in page


def test_norms_and_errors_of_a_model(monkeypatch):
    monkeypatch.setattr(norms, "MOST_LAYERS", 4)
    torch.manual_seed(0)
    model = small_towers.bert().eval()
    ids = torch.randint(3, 100, (3, 8))
    found = norms.measure(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found["layers"] == 4
    assert 0 < found["above"] <= 1
    assert all(0 < error < 1 for error in found["errors"].values())
    assert found["errors"]["wanda"] <= found["errors"]["magnitude"] * 1.01
    assert "- kind: " in "\n".join(norms.page({"processor": "x", "torch": "y", "text": "z"}, {"kind": found}))
