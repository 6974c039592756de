"""Help, tables and errors are plain text on every console."""

import os
import re
import subprocess
import sys

import pytest
import torch

from ace_triton import metric_names
from ace_triton.commands.cli import COMMANDS

RUN_ALL = """
import sys
from ace_triton.commands.cli import COMMANDS, main
for command in (None, *COMMANDS):
    words = [] if command is None else [command.__name__]
    sys.argv = ["ace-triton", *words, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
sys.argv = ["ace-triton", "methods"]
try:
    main()
except SystemExit:
    pass
print("caf\\u00e9 \\u24c2")
"""


@pytest.fixture(scope="module")
def printed() -> str:
    """What all commands print as help, and a table, on a narrow console that knows ASCII alone."""
    plain = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    run = subprocess.run([sys.executable, "-c", RUN_ALL], env=plain, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout.decode("ascii")


def test_every_console_can_show_it(printed):
    assert max(map(len, printed.splitlines())) <= 60
    assert printed.endswith("caf\\xe9 \\u24c2\n")
    for command in COMMANDS:
        assert f"Usage: ace-triton {command.__name__} [OPTIONS]" in printed


def test_nothing_is_cut_in_a_narrow_console(printed):
    assert "..." not in printed.replace("[ARGS]...", "")
    flat = re.sub(r"\s+", "", printed)
    assert "name[:config[:split]]" in flat
    assert "pydoc:calibration" in flat
    assert "Salesforce/wikitext:wikitext-2-raw-v1:test" in flat
    for name in metric_names()[:11]:
        assert name in flat


def test_flags_have_no_type_and_codes_stay_text(printed):
    assert "<bool>" not in printed
    assert "n:monly" in re.sub(r"\s+", "", printed)


@pytest.fixture
def helps():
    """Every option's help, by command and flag."""
    import typer

    from ace_triton.commands.cli import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            if parameter.name != "help":
                found[name, parameter.opts[0]] = parameter.help
    return found


def test_every_option_is_explained_in_a_sentence_of_its_own(helps):
    assert len(helps) > 80
    for place, text in helps.items():
        assert text[0].isupper(), place
        assert text.endswith("."), place
        assert text.isascii(), place
        assert len(text.split()) >= 3, place
        assert not re.match(r"(Of|As|What|To|In|At) ", text), place


def test_names_are_printed_as_they_are(command, tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a[/]:m:.weight": torch.ones(4, 4), "[red]x.3.weight": torch.eye(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    code, out, _ = command("info", tmp_path, "--full")
    assert code == 0
    assert "a[/]:m:" in out
    assert "[red]x.3" in out
    code, _, errors = command("info", tmp_path / "[/]:m:")
    assert code == 1
    assert "[/]:m:" in errors


def test_info_names_a_range_of_shapes_once(command, tmp_path):
    from safetensors.torch import save_file

    wide = {f"layers.{i}.up.weight": torch.ones(4 + i, 8) for i in range(6)}
    two = {f"layers.{i}.down.weight": torch.ones(8, 4 + i) for i in range(2)}
    save_file({**wide, **two}, tmp_path / "model.safetensors")
    code, out, _ = command("info", tmp_path)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines() if "layers.*" in line]
    assert sorted(rows) == [
        ["layers.*.down", "8 x 4", "1"],
        ["layers.*.down", "8 x 5", "1"],
        ["layers.*.up", "4 to 9 x 8", "6"],
    ]


def test_info_starts_with_the_summary_and_lists_kinds(command, tiny_checkpoint):
    code, out, _ = command("info", tiny_checkpoint)
    assert code == 0
    assert out.startswith("16 matrices, 0.1% zeros: 16 dense\n")
    assert len(re.findall(r"model\.layers\.\*\.self_attn\.q_proj .* 2 ", out)) == 1
    code, full, _ = command("info", tiny_checkpoint, "--full")
    assert full.splitlines()[0] == out.splitlines()[0]
    assert "model.layers.1.self_attn.q_proj" in full
