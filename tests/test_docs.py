"""The documentation: its code runs, its commands and paths are there, and it names the whole public interface."""

from __future__ import annotations

import copy
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer.main

import ace_triton
from ace_triton import metric_names
from ace_triton.commands.cli import app
from ace_triton.formats import registry as formats
from ace_triton.methods import registry as metrics
from ace_triton.packed.products import registry
from ace_triton.statistics import statistic
from benchmarks.reports.readme import PAGES, filled, tables_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted(page for folder in ("guides", "extend", "formats", ".") for page in (DOCS / folder).glob("*.md"))
"""The pages written by hand, and those that commands write."""

README = ROOT / "README.md"
RUN = "<!-- run -->"
MARK = r"<!-- run(?: with (?P<needs>\w+))? -->"
"""``<!-- run with peft -->`` marks code that is run if the package is installed."""

FENCE = re.compile(rf"^(?P<run>{MARK}\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A piece of code on a page; ``run`` if the page marks it so, ``needs`` if the mark names a package."""

    language: str
    code: str
    run: bool
    needs: str | None


def blocks_of(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text())
    return [Block(match["language"], match["code"], match["run"] is not None, match["needs"]) for match in found]


def commands_of(block: Block) -> list[list[str]]:
    """The words of every call of ``ace-triton`` in a shell block, comments left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith("ace-triton ")]
    return [words[1:] for words in calls]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def save_encoder(folder: Path, tokenizer) -> None:
    """A small classifier of text."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=320, **sizes)).save_pretrained(folder)
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    padding.save_pretrained(folder)


@pytest.fixture
def workspace(tmp_path, monkeypatch, tiny_model, tokenizer) -> Iterator[Path]:
    """A folder with what the pages speak of: a model, calibration text, and other text to evaluate on."""
    tiny_model.config.max_position_embeddings = 2048
    tiny_model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    save_encoder(tmp_path / "my-encoder", tokenizer)
    (tmp_path / "calibration.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "held-out.txt").write_text("Pack my box with five dozen liquor jugs. " * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    monkeypatch.setattr(statistic, "_REGISTRY", dict(statistic._REGISTRY))
    monkeypatch.setattr(formats, "_REGISTRY", dict(formats._REGISTRY))
    monkeypatch.setattr(registry, "products", registry.products)
    monkeypatch.setattr(registry, "others", registry.others)
    environment = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("page", [page for page in [*WRITTEN, README] if RUN in page.read_text()], ids=named)
def test_its_code_runs(page, workspace, command):
    """The marked blocks of a page, in order: Python in one namespace, commands in this process."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if not block.run or (block.needs and find_spec(block.needs) is None):
            continue
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), namespace)
            continue
        for words in commands_of(block):
            code, _, errors = command(*words)
            assert code == 0, f"{words}: {errors}"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_all_of_its_python_is_run(page):
    assert [block.code for block in blocks_of(page) if block.language == "python" and not block.run] == []
    assert [path for path in INCLUDED.findall(page.read_text()) if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", [*WRITTEN, README], ids=named)
def test_its_commands_exist(page):
    """Every call of ``ace-triton`` on it names a command and options that there are."""
    group = typer.main.get_command(app)
    for block in blocks_of(page):
        for name, *words in commands_of(block):
            group.commands[name].make_context(name, words)


@pytest.mark.parametrize("page", [*WRITTEN, README, ROOT / "CONTRIBUTING.md"], ids=named)
def test_the_paths_it_names_are_there(page):
    """Those of this repository in inline code."""
    paths = re.findall(r"`((?:ace_triton|kernels|tests|benchmarks|docs)/[\w./-]*\w)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_reference_has_every_public_name_once():
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: ace_triton\.(\w+)$", reference, re.MULTILINE)) == sorted(ace_triton.__all__)


def generated(page: str) -> str:
    """A page of the reference with what the code says filled in, as the site has it."""
    hook = runpy.run_path(str(DOCS / "hooks" / "generated.py"))
    return hook["on_page_markdown"]((DOCS / "reference" / page).read_text())


def test_the_page_of_the_command_line_has_every_command_argument_and_option():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", generated("command-line.md"), re.MULTILINE | re.DOTALL))
    commands = typer.main.get_command(app).commands
    assert list(sections) == list(commands)
    for name, command in commands.items():
        words = [word for parameter in command.params for word in parameter.opts if word.startswith("-")]
        assert [word for word in words if f"`{word}`" not in sections[name]] == []
    assert "| `--samples` | Number of calibration sequences, images or audio files. | `128` |" in sections["prune"]


def test_the_page_of_methods_has_every_method_and_its_options():
    page = generated("methods.md")
    assert re.findall(r"^### ([\w-]+)$", page.partition("## Every method")[2], re.MULTILINE) == metric_names()
    assert "Options: `a=0.5`." in page
    assert ":func:" not in page
    for name in filter(lambda name: metrics.metric(name).is_built_in, metric_names()):
        assert f"| `{name}` |" in page


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [*WRITTEN, *(DOCS / "reference").glob("*.md")]
    assert [str(page) for page in pages if f": {page.relative_to(DOCS)}\n" not in navigation] == []


def test_its_tables_are_those_of_the_records():
    tables = tables_of(DOCS)
    pages = {page: (ROOT / page).read_text() for page in PAGES}
    assert [name for name, page in pages.items() if filled(page, tables) != page] == []
    assert [name for name in tables if not any(f"<!-- {name}: made by " in page for page in pages.values())] == []


def test_a_marker_without_a_table_or_an_end_is_refused():
    with pytest.raises(ValueError, match="no table 'speed'"):
        filled("<!-- speed: made by hand -->\n<!-- /speed -->", {"rows": ["| rows |"]})
    with pytest.raises(ValueError, match="'rows' has 0 pairs"):
        filled("<!-- rows: made by hand -->\n", {"rows": ["| rows |"]})
