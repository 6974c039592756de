"""Feed-forwards of uneven widths: one ranking over all blocks, and a checkpoint that our loader reads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_triton import ArgumentError, RecipeError, load, load_model, shrink_checkpoint, shrink_model
from ace_triton.decoding.step import why_not_compiled
from ace_triton.formats.registry import save_model
from ace_triton.structures.uneven import SHAPES, uneven_widths
from tests.streaming.test_streamed_shrink import files_of, in_memory
from tests.structures.test_experts import MIXTURES

REFUSED = (
    "its feed-forward widths differ from block to block (field ace_triton_shapes of its configuration), so it cannot "
    "be shrunk again: shrink the dense model that it was made from, with a larger ratio"
)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_the_least_runs_of_all_blocks_go():
    steep, flat = torch.tensor([9.0, 0.0, 1.0, 1.0, 0.0, 9.0]), torch.tensor([4.0, 4.0, 5.0, 5.0, 6.0, 6.0])
    # Standardized, in order: -0.83 twice, -0.58 twice, 1.41 twice; and -1.22 twice, 0 twice, 1.22 twice.
    assert uneven_widths([steep, 1e3 * flat], 3, 1) == [4, 2]
    assert uneven_widths([steep, flat], 2, 2) == [2, 2]
    assert uneven_widths([steep, flat], 4, 2) == [4, 4]


def test_what_is_left_is_a_multiple():
    importance = [torch.rand(22, generator=torch.Generator().manual_seed(seed)) ** (1 + seed) for seed in range(5)]
    gone = uneven_widths(importance, 10, 4)
    assert sum(gone) == 50
    assert len(set(gone)) > 1
    assert all((22 - number) % 4 == 0 and number <= 18 for number in gone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_computes_what_the_dense_model_computes_without_the_channels(
    family, make_decoder, ids, tiny_checkpoint, tmp_path
):
    model = make_decoder(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".0." in name and parameter.dim() == 2 and min(parameter.shape) > 1:
                parameter.mul_(torch.linspace(0.1, 2, parameter.shape[-1]) ** 2)
    result = shrink_model(model, ids, ratio=0.3, multiple=4, groups=0, widths="uneven", update="none")
    widths = [len(kept) for kept in result.report.kept.values()]
    assert len(set(widths)) > 1
    assert sum(widths) == len(widths) * result.report.widths["channels"][1]
    assert result.report.removed >= 0.3
    assert any(f"widths run from {min(widths)} to {max(widths)}" in note for note in result.report.notes)
    result.model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    if family == "llama":
        assert "the feed-forward width differs from block to block" in why_not_compiled(loaded)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(result.model, ids))
    for name, kept in result.report.kept.items():
        layer = model.get_submodule(name)
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.t()
        weight.data[:, [c for c in range(weight.shape[1]) if c not in kept]] = 0
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-4, atol=1e-5)


def test_all_commands_load_it(command, tiny_checkpoint, some_text, tmp_path):
    source, out, pruned, packed = (tmp_path / name for name in ("source", "smaller", "pruned", "packed"))
    model, tokenizer = load_model(tiny_checkpoint)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data *= torch.linspace(0.1, 2, weight.shape[1]) ** 12
    save_model(model, tokenizer, source)
    small = ("--calibration", some_text, "--samples", "4", "--length", "16", "--multiple", "4")
    code, printed, errors = command("shrink", source, out, *small, "--groups", "0", "--widths", "uneven")
    assert code == 0, errors
    assert "feed-forward width, mean" in printed
    assert "the compiled decoding step does not take it" in " ".join((printed + errors).split())
    shapes = json.loads((out / "config.json").read_text())[SHAPES]
    assert len({tuple(shape) for name, shape in shapes.items() if "down_proj" in name}) > 1
    assert "ace_triton.load_model(" in (out / "README.md").read_text()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)
    code, _, errors = command("prune", out, pruned, "--method", "magnitude", "--dtype", "float32")
    assert code == 0, errors
    code, _, errors = command("pack", pruned, packed)
    assert code == 0, errors
    ids = torch.arange(2, 34)[None]
    expected = logits_of(load_model(pruned)[0], ids)
    for loaded in (load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-4, atol=1e-4)
    code, printed, errors = command("evaluate", out, "--text", some_text, "--windows", "2", "--length", "16")
    assert code == 0, errors
    for words in ((), ("--stream",), ("--dry-run",), ("--method", "depth", "--calibration", some_text)):
        code, _, errors = command("shrink", out, tmp_path / "again", "--method", "magnitude", *words)
        assert (code, errors.splitlines()[-1].removeprefix(f"error: {out}: ")) == (1, REFUSED)
    assert not any(path.name.startswith(("again", ".again")) for path in tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="cannot be shrunk again"):
        shrink_model(load_model(out)[0], None, method="magnitude")
    with pytest.raises(ArgumentError, match="cannot be shrunk again"):
        shrink_checkpoint(out, tmp_path / "again", method="magnitude")


def test_files_have_the_bytes_of_a_run_in_memory(tiny_checkpoint, tmp_path):
    ids = torch.randint(2, 258, (8, 32), generator=torch.Generator().manual_seed(0))
    options = {"multiple": 1, "groups": 0, "widths": "uneven", "method": "wanda-sp", "update": "lstsq"}
    report = in_memory(tiny_checkpoint, tmp_path / "memory", ids, "auto", **options)
    assert len({len(kept) for kept in report.kept.values()}) > 1
    shrink_checkpoint(tiny_checkpoint, tmp_path / "files", ids, **options)
    assert files_of(tmp_path / "files") == files_of(tmp_path / "memory")


def test_what_cannot_be_uneven(make_decoder, ids, monkeypatch):
    from tests.conftest import FAMILIES

    monkeypatch.setitem(FAMILIES, "mixtral", MIXTURES["mixtral"])
    with pytest.raises(ArgumentError, match=r"widths 'uneven': model\.layers\.0: its feed-forward is a mixture"):
        shrink_model(make_decoder("mixtral"), ids, method="magnitude", widths="uneven")
    with pytest.raises(RecipeError, match="method 'depth' removes whole blocks: leave widths out"):
        shrink_model(make_decoder("llama"), ids, method="depth", widths="uneven")
