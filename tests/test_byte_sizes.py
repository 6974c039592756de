"""Sizes are shown in units that ``--size`` takes, and in no others."""

import ast
from pathlib import Path

import pytest

from ace_triton.byte_sizes import shown_bytes
from ace_triton.commands.options import parse_bytes

PACKAGE = Path(__file__).resolve().parents[1] / "ace_triton"
SHOWN = {
    0: "0.0 KB",
    999: "1.0 KB",
    12_340: "12.3 KB",
    999_949: "999.9 KB",
    999_950: "1.0 MB",
    1_000_000: "1.0 MB",
    344_500_000: "344.5 MB",
    10**9 - 1: "1.00 GB",
    10**9: "1.00 GB",
    1_234_567_890_123: "1,234.57 GB",
}


@pytest.mark.parametrize(("size", "text"), SHOWN.items())
def test_a_size_in_the_unit_that_fits(size, text):
    assert shown_bytes(size) == text


@pytest.mark.parametrize("size", [12_300, 344_500_000, 1_230_000_000])
def test_it_can_be_given_back(size):
    assert parse_bytes(shown_bytes(size), "--size") == size


def test_no_text_of_the_package_has_a_unit_of_its_own():
    """A formatted number before a unit of bytes is made in one place."""
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "byte_sizes.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                firsts = {word.strip(".,;:()") for text in texts for word in text.split()[:1]}
                assert not firsts & {"KB", "MB", "GB", "KiB", "MiB", "GiB"}, f"{path}:{node.lineno}: use shown_bytes"
