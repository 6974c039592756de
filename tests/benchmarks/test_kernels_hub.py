"""The layout for the kernels hub can be imported from outside under another name."""

import hashlib
import json
import tomllib

import pytest

from benchmarks.kernels_hub import SOURCES as KERNELS
from benchmarks.kernels_hub import foreign_imports, lay_out, try_import


def test_it_is_imported_and_used_under_another_name(tmp_path):
    tree = lay_out(KERNELS, tmp_path / "hub", "nm_sparsity")
    assert try_import(tree) == "imported as under_another_name"
    build = tomllib.loads((tmp_path / "hub" / "build.toml").read_text())
    assert build["general"]["name"] == "nm_sparsity"
    assert "torch-noarch" in build
    listed = json.loads((tree / "metadata.json").read_text())["sha256"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tree.iterdir()}
    assert listed == {name: digest for name, digest in found.items() if name != "metadata.json"}
    assert len(listed) == len(list(KERNELS.glob("*.py")))


def test_absolute_imports_are_refused(tmp_path):
    text = "import os, numpy\nfrom . import a\nfrom ace_triton.kernels import b\nimport triton.language as tl\n"
    assert foreign_imports(text) == ["ace_triton.kernels", "numpy"]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=r"bad.py: ace_triton.kernels; bad.py: numpy"):
        lay_out(tmp_path / "kernels", tmp_path / "out", "bad")
    assert not (tmp_path / "out").exists()


def test_an_import_that_fails_is_said(tmp_path):
    (tmp_path / "__init__.py").write_text("from .missing import nothing\n")
    with pytest.raises(RuntimeError, match="missing"):
        try_import(tmp_path)
