import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace_triton import prune_model
from ace_triton.errors import StudyError
from ace_triton.evaluate import perplexity
from ace_triton.inputs.calibration import crop, token_stream
from ace_triton.inputs.checkpoint import load
from ace_triton.inputs.text import read_documents
from ace_triton.methods.registry import metric
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell, Grid
from ace_triton.study.journal import FILE, Journal, Results, read_results
from ace_triton.study.norms import model_norms
from ace_triton.study.notes import longer_calibration
from ace_triton.study.page import page, shared_words
from ace_triton.study.records import CellResult, DenseResult, Sample, Setting, StageSeconds
from ace_triton.study.run import run_study
from ace_triton.study.samples import next_token_divergence
from ace_triton.study.tally import Tally
from ace_triton.study.workbench import Workbench

METHODS = ("magnitude", "wanda", "ria", "ace")
GRID = Grid(tuple(map(Cell, map(Recipe, METHODS))), ("50%", "2:4"), (8, 16), (0, 1))
CELLS = 2 * 1 + 2 * 3 * 2 * 2
FEW = Grid(tuple(map(Cell, map(Recipe, ("magnitude", "wanda")))), ("50%", "2:4"), (8, 16), (0,))
FEW_CELLS = 2 * 1 + 2 * 2
SETTING = Setting("tiny", "w", "float32", "c", "cs", "e", "es", 4, 2, 16)


def without_times(results: Results) -> dict:
    """What two runs of a study must agree on."""
    return {
        "setting": results.setting,
        "dense": results.dense,
        "cells": {cell: (found.perplexity, found.kept) for cell, found in results.cells.items()},
        "samples": results.samples,
        "norms": results.norms,
    }


@given(
    st.lists(st.sampled_from(METHODS), min_size=1, unique=True),
    st.lists(st.integers(2, 99), min_size=1, max_size=4, unique=True),
    st.integers(1, 4),
)
def test_every_cell_once_and_cheap_ones_first(methods, lengths, seeds):
    grid = Grid(tuple(map(Cell, map(Recipe, methods))), ("0.5", "2:4"), tuple(lengths), tuple(range(seeds)))
    cells = grid.cells()
    drawn = len([method for method in methods if method != "magnitude"])
    assert len(cells) == len(set(cells)) == 2 * (len(methods) - drawn) + 2 * drawn * len(lengths) * seeds
    costs = [0 if cell.length is None else cell.length * (cell.seed + 1) for cell in cells]
    assert costs == sorted(costs)
    assert all((cell.length is None) == (cell.recipe.method == "magnitude") for cell in cells)
    assert all(Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell for cell in cells)


def test_a_grid_that_is_none():
    with pytest.raises(ValueError, match="at least one of its seeds"):
        Grid((Cell(Recipe("ace")),), ("2:4",), (16,), ())
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Grid((Cell(Recipe("ace")),), ("2:4",), (1, 16), (0,))


def test_a_result_keeps_its_meaning_when_a_default_changes(monkeypatch):
    written = json.loads(json.dumps(Cell(Recipe("ace"), 16, 0).to_dict()))
    base, other = metric("ace").options["base"], "wanda"
    assert Recipe("ace", {"base": base}) == Recipe("ace")
    assert written["options"]["base"] == base
    monkeypatch.setitem(metric("ace").options, "base", other)
    assert Cell.from_dict(written).variant.label == f"ace:base={base}"
    assert Cell.from_dict(written).variant != Cell(Recipe("ace"))


def test_divergence_against_the_formula():
    generator = torch.Generator().manual_seed(0)
    dense, pruned = torch.randn(2, 7, 33, generator=generator).double()
    p, q = dense.softmax(-1), pruned.softmax(-1)
    divergence, same = next_token_divergence(dense, pruned)
    torch.testing.assert_close(divergence.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))
    divergence, same = next_token_divergence(dense, dense + 5)
    assert float(divergence.max()) < 1e-5
    assert bool(same.all())


def test_norms_against_the_layers_own_inputs(tiny_model):
    ids = torch.randint(0, 320, (5, 12), generator=torch.Generator().manual_seed(3))
    seen = {}
    names = {"q_proj": 3, "o_proj": 1, "gate_proj": 2, "down_proj": 1}
    hooks = [
        module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].double()}))
        for name, module in tiny_model.named_modules()
        if name.rpartition(".")[2] in names
    ]
    with torch.no_grad():
        tiny_model(ids)
    for hook in hooks:
        hook.remove()
    norms = model_norms(tiny_model, ids)
    assert norms.length == 12
    assert len(norms.inputs) == 2 * 4
    for entry in norms.inputs:
        tokens = seen[f"model.layers.{entry.block}.{entry.layers[0]}"]
        assert len(entry.layers) == names[entry.layers[0].rpartition(".")[2]]
        n = (tokens.square().sum((0, 1)) / 5).sqrt()
        assert entry.channels == sum(entry.histogram) == tokens.shape[-1]
        assert entry.largest == pytest.approx(float(n.max()), rel=1e-5)
        squares = tokens.square().sum(1)
        shares = {"max_layer": squares / squares.max(), "channel": squares / squares.amax(0)}
        for pole in entry.poles:
            if pole.norm in shares:
                factor = (1 / (1 - 0.99 * shares[pole.norm])).mean(0)
                assert pole.largest == pytest.approx(float(factor.max()), rel=1e-3)
                assert pole.channels == int((factor >= 10).sum())


def test_a_study_end_to_end(study, protocol, tmp_path):
    words = ("--methods", "magnitude,wanda,ria,ace:base=wanda+reduce=abs+norm=max_layer", "--sparsities", "50%,2:4")
    code, out, errors = study(tmp_path / "s", *words, "--lengths", "8,16", "--seeds", 2)
    assert code == 0, errors
    results = read_results(tmp_path / "s")
    assert len(results.cells) == CELLS
    assert f"{CELLS} cells" in out
    model, tokenizer = load(protocol.model, dtype=torch.float32)
    text = read_documents(protocol.calibration)
    ids = torch.tensor(tokenizer("\n\n".join(text))["input_ids"])
    dense = perplexity(model, ids, length=16, windows=2).perplexity
    assert results.dense == DenseResult(dense)
    options = {"base": "wanda", "reduce": "abs", "norm": "max_layer"}
    cell = Cell(Recipe("ace", options), 16, 1)
    prune_model(model, crop(token_stream(text, tokenizer), 4, 16, 1), "ace", "2:4", **options)
    found = results.cells[cell]
    assert found.perplexity == perplexity(model, ids, length=16, windows=2).perplexity
    assert found.kept == 0.5
    assert 0 < found.seconds.select < found.seconds.total
    assert found.cpu_seconds > 0
    shown = [cell for cell in results.samples if cell is not None]
    assert {(cell.length, cell.seed) for cell in shown} == {(None, None), (16, 0)}
    assert len(shown) == 8
    assert all(results.samples[cell].divergence.mean > 0 for cell in shown)

    html = (tmp_path / "s" / "tiny.html").read_text()
    tally = Tally(results)
    for sparsity in ("0.5", "2:4"):
        for variant in tally.variants:
            for length in (8, 16):
                assert f"{tally.perplexity(variant, sparsity, length).mean:,.1f}" in html
    assert f"{dense:.1f}" in html
    assert "ACE (base=wanda, reduce=abs, norm=max_layer)" in html
    assert str(tmp_path) not in html + (tmp_path / "s" / FILE).read_text()
    assert not re.search(r"<script|<link|@import|(src|href)=.https?:|url\(.?https?:", html)
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    assert html.count('role="img" aria-label="') == html.count("<svg") >= 2 * 3 + 4 + 4
    assert page(results) == html
    assert "Perplexity against time" not in html
    assert '"recipe"' not in (tmp_path / "s" / FILE).read_text()


def test_a_stopped_study_goes_on_to_the_same_end(protocol, tmp_path):
    bench = Workbench(protocol)
    with Journal(tmp_path / "whole", bench.setting) as journal:
        run_study(bench, journal, FEW)
    whole = read_results(tmp_path / "whole")
    assert len(whole.cells) == FEW_CELLS
    data = (tmp_path / "whole" / FILE).read_bytes()
    for share in (0.01, 0.4, 0.7, 0.999):
        folder = tmp_path / str(share)
        folder.mkdir()
        cut = int(len(data) * share)
        (folder / FILE).write_bytes(data[:cut]) if cut > data.index(b"\n") else None
        with Journal(folder, bench.setting) as journal:
            before = len(journal.results.cells)
            steps = []
            run_study(bench, journal, FEW, lambda done, total, _, steps=steps: steps.append((done, total)))
        assert without_times(read_results(folder)) == without_times(whole)
        assert (folder / FILE).read_bytes().startswith(data[: data.rindex(b"\n", 0, cut) + 1] if before else b"{")
        assert steps[-1] == (FEW_CELLS, FEW_CELLS)
    with Journal(tmp_path / "whole", bench.setting) as journal:
        run_study(bench, journal, FEW)
    assert (tmp_path / "whole" / FILE).read_bytes() == data


def test_a_line_cut_inside_a_character_is_cut_off(tmp_path):
    with Journal(tmp_path, SETTING) as journal:
        journal.append(DenseResult(10.0))
        whole = (tmp_path / FILE).read_bytes()
        journal.append(Sample(None, ("a",), ("é 漢",), None))
    data = (tmp_path / FILE).read_bytes()
    assert len(data.decode()) < len(data)
    for cut in range(len(whole), len(data)):
        (tmp_path / FILE).write_bytes(data[:cut])
        with Journal(tmp_path, SETTING) as journal:
            assert journal.results.dense == DenseResult(10.0)
            assert not journal.results.samples
        assert (tmp_path / FILE).read_bytes() == whole


def test_an_interrupt_keeps_what_is_done_and_leaves_the_model_dense(protocol, tmp_path):
    bench = Workbench(protocol)
    dense = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}

    def stop_at_five(done: int, *_: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with Journal(tmp_path, bench.setting) as journal, pytest.raises(KeyboardInterrupt):
        run_study(bench, journal, GRID, stop_at_five)
    assert list(read_results(tmp_path).cells) == GRID.cells()[:5]
    assert all(torch.equal(dense[name], tensor) for name, tensor in bench.model.state_dict().items())


def test_another_setting_or_model_is_refused(study, tmp_path, tiny_checkpoint, tiny_model):
    words = ("--methods", "magnitude", "--sparsities", "2:4", "--lengths", 8, "--seeds", 1)
    assert study(tmp_path / "s", *words)[0] == 0
    before = (tmp_path / "s" / FILE).read_bytes()
    code, _, errors = study(tmp_path / "s", *words, "--samples", 5)
    assert code == 1
    assert "samples was 4, is 5" in errors
    Journal(tmp_path / "s", replace(read_results(tmp_path / "s").setting, model="moved")).close()
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight[3, 4] += 1
    tiny_model.save_pretrained(tiny_checkpoint)
    code, _, errors = study(tmp_path / "s", *words)
    assert code == 1
    assert "weights_sha256 was" in errors
    assert "Name another folder" in errors.replace("\n", " ")
    assert (tmp_path / "s" / FILE).read_bytes() == before


def test_one_process_at_a_time_and_no_file_but_ours(tmp_path):
    with Journal(tmp_path / "s", SETTING), pytest.raises(StudyError, match="another process"):
        Journal(tmp_path / "s", SETTING)
    Journal(tmp_path / "s", SETTING).close()
    for content in ("precious", '{"precious": 1}\n', "[]\n"):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(StudyError, match="results of a study"):
            Journal(tmp_path, SETTING)
        assert (tmp_path / FILE).read_text() == content
    with pytest.raises(StudyError, match="cannot be read"):
        read_results(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "wnada"), "use one of magnitude, wanda"),
        (("--methods", "ace:bsae=ria"), "no option 'bsae'"),
        (("--lengths", "16,many"), "write whole numbers"),
        (("--lengths", "16,256"), "128 positions"),
        (("--sparsities", "2:3"), "n:m needs m in"),
        (("--calibration", "self"), "calibrates on text"),
        (("--window-length", "256"), "128 positions"),
        (("--render-only",), "cannot be read as the results of a study"),
    ],
)
def test_a_mistake_is_one_line(study, tmp_path, words, message):
    code, _, errors = study(tmp_path / "s", *words)
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_what_is_missing_is_said_before_anything_runs(study, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, _, errors = study(tmp_path / "s")
    assert code == 1
    assert name in errors
    assert "pip install 'ace-triton[study]'" in errors.replace("\n", " ")
    assert not os.path.exists(tmp_path / "s")


def test_a_page_of_nothing_yet():
    html = page(Results(SETTING))
    assert "Nothing is measured yet" in html
    assert "<figure>" not in html


def test_text_is_escaped_and_compared_by_words():
    assert shared_words("the old town", "the older town") == len("the ")
    assert shared_words("the old town", "the old") == len("the old")
    assert shared_words("a", "b") == 0
    html = page(Results(Setting("<b>tiny</b>", *list(SETTING.to_dict().values())[1:])))
    assert "<b>tiny" not in html


def test_what_longer_sequences_change():
    results = Results(SETTING, DenseResult(10.0))
    for length, value in ((8, 40.0), (16, 36.0)):
        cell = Cell(Recipe("wanda"), length, 0)
        results.add(CellResult(cell, value, 0.5, StageSeconds(1, 1, 1, 3), 1.0, "a processor", 1))
    assert longer_calibration(Tally(results)) == "Change of perplexity from L=8 to L=16: at 2:4 Wanda -10%."
