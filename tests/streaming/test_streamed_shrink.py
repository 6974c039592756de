"""Structured pruning in files: the bytes of a run in memory, also after interruptions at any step."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from ace_triton import CheckpointError, ShrinkSettings, shrink_checkpoint, shrink_model
from ace_triton.commands.shrink_run import ShrinkRun
from ace_triton.formats.registry import save_model
from ace_triton.inputs import checkpoint
from ace_triton.streaming.journal import Journal
from ace_triton.streaming.kept_choice import RANKED, KeptChoice
from ace_triton.structures import run
from ace_triton.structures.compensation import Moments
from ace_triton.structures.ranking import ranked
from tests.structures.test_experts import MIXTURES, varied


class Stop(Exception):
    """An interruption."""


def files_of(folder):
    names = ("model.safetensors", "config.json", "generation_config.json")
    return {name: (folder / name).read_bytes() for name in names}


def in_memory(source, out, ids, dtype, **options):
    model, tokenizer = checkpoint.load(source, dtype=dtype, own_memory=True)
    result = shrink_model(model, ids, **options)
    save_model(result.model, tokenizer, out, report={})
    return result.report


def without_times(report):
    return {name: fact for name, fact in report.to_dict().items() if name != "seconds"}


@pytest.fixture
def some_ids():
    return torch.randint(2, 258, (24, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"multiple": 8, "groups": 1}, "auto"),
        ({"method": "flap", "multiple": 8}, torch.bfloat16),
        ({"method": "depth", "ratio": 0.4}, "auto"),
        ({"method": "llm-pruner", "terms": "mixed", "multiple": 8}, "auto"),
        ({"importance": "taylor", "update": "bias", "multiple": 8, "groups": 1}, "auto"),
    ],
)
def test_interrupted_runs_resume_to_the_bytes_of_a_run_in_memory(
    options, dtype, tiny_checkpoint, some_ids, tmp_path, monkeypatch
):
    report = in_memory(tiny_checkpoint, tmp_path / "memory", some_ids, dtype, **options)
    add, left, rankings = Journal.add, [0], []
    monkeypatch.setattr(run, "ranked", lambda *args: rankings.append(args) or ranked(*args))

    def stopping(self, name, result):
        if not left[0]:
            raise Stop(name)
        left[0] -= 1
        add(self, name, result)

    monkeypatch.setattr(Journal, "add", stopping)
    stops, resumed = [], None
    while resumed is None:
        left[0] = 3 if stops else 1
        try:
            resumed = shrink_checkpoint(tiny_checkpoint, tmp_path / "files", some_ids, dtype=dtype, **options)
        except Stop as stop:
            stops.append(str(stop))
    steps = ["choice"] if options.get("method") == "depth" else ["ranking", "choice"]
    assert (stops[0], len(rankings)) == ([*steps, "files"][1], len(steps) - 1)
    assert files_of(tmp_path / "files") == files_of(tmp_path / "memory")
    assert without_times(resumed) == without_times(report)
    facts = json.loads((tmp_path / "files" / "ace_triton.json").read_text())
    assert facts["streamed"]["resumed_units"][:3] == [*steps, "files", "outside"][:3]
    assert not (tmp_path / ".files.ace-triton").exists()


def test_a_run_with_other_settings_does_not_resume(tiny_checkpoint, tmp_path, monkeypatch):
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, name, result: add(self, name, result) or 1 / (name != "files"))
    out, options = tmp_path / "out", {"method": "magnitude", "multiple": 8}
    with pytest.raises(ZeroDivisionError):
        shrink_checkpoint(tiny_checkpoint, out, **options)
    monkeypatch.undo()
    arguments = (tiny_checkpoint, out, ShrinkSettings(**options), "auto", "cpu")
    assert [ShrinkRun.streams(*arguments), ShrinkRun.streams(*arguments, restart=True)] == [True, False]
    with pytest.raises(CheckpointError, match=r"interrupted run had another settings\.ratio"):
        shrink_checkpoint(tiny_checkpoint, out, ratio=0.3, **options)
    report = shrink_checkpoint(tiny_checkpoint, out, ratio=0.3, restart=True, **options)
    assert report.removed >= 0.3


def test_a_damaged_state_is_refused(tmp_path):
    journal, of_run = {}, SimpleNamespace(seconds={})
    first = {"w": torch.arange(4.0)}, {"w": Moments(torch.ones(2), torch.ones(2, 2))}

    def once(name, make):
        if name not in journal:
            journal[name] = make()
        return journal[name]

    kept = KeptChoice(once, tmp_path)
    kept._ranking(of_run, lambda: first)
    again = kept._ranking(of_run, lambda: pytest.fail("the ranking is kept"))
    assert torch.equal(again[0]["w"], first[0]["w"])
    assert torch.equal(again[1]["w"].square, first[1]["w"].square)
    path = tmp_path / RANKED
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"ranking\.safetensors: the state .* is damaged: add --restart"):
            kept._ranking(of_run, lambda: first)
        path.write_bytes(whole)
    journal["ranking"].pop("sha256")
    with pytest.raises(CheckpointError, match="is damaged: add --restart"):
        kept._ranking(of_run, lambda: first)


@pytest.mark.parametrize(
    ("family", "experts"), [("gpt_oss", "channels"), ("deepseek_v3", "whole"), ("deepseek_v3", "channels")]
)
def test_experts_go_in_files(family, experts, make_decoder, tiny_checkpoint, ids, tmp_path, monkeypatch):
    """Biases of routers are hidden, and stacked experts are written, although no weight is in memory as a whole."""
    from tests.conftest import FAMILIES

    monkeypatch.setitem(FAMILIES, family, MIXTURES[family])
    model = varied(make_decoder(family))
    for buffer in model.buffers():
        if buffer.shape == (4,):  # The bias that balances the load.
            buffer.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "source")
    options = {"ratio": 0.1, "method": "wanda-sp", "groups": 0, "multiple": 8, "experts": experts}
    options |= {"update": "lstsq"} if (family, experts) == ("deepseek_v3", "channels") else {}  # Of shared experts.
    in_memory(tmp_path / "source", tmp_path / "memory", ids, "auto", **options)
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, name, result: add(self, name, result) or 1 / (name != "block 2"))
    with pytest.raises(ZeroDivisionError):
        shrink_checkpoint(tmp_path / "source", tmp_path / "files", ids, **options)
    monkeypatch.setattr(Journal, "add", add)
    report = shrink_checkpoint(tmp_path / "source", tmp_path / "files", ids, **options)
    assert report.widths.get("experts", (4, 3)) == (4, 3)
    assert report.widths.get("expert_channels", (16, 8)) == (16, 8)
    assert files_of(tmp_path / "files") == files_of(tmp_path / "memory")
