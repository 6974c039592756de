"""Loading of the compiled CPU library, and what is said if it is missing, broken or built from other sources."""

from __future__ import annotations

import importlib.machinery
from collections.abc import Iterator

import pytest
import torch

from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE, choose_backend
from ace_triton.kernels.errors import BackendError
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm, select_nm_reference
from tests.kernels.every_operation import matrix

pytestmark = pytest.mark.usefixtures("chosen_by_device")
needs_library = pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unload the library before and after the test."""
    cpu_library.load.cache_clear()
    yield
    monkeypatch.undo()
    cpu_library.load.cache_clear()


def test_without_the_library_the_reference_serves(reload, monkeypatch):
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [".not-built"])
    weight = matrix(8, 16, torch.float32)
    assert not cpu_library.available()
    assert "was not built" in cpu_library.why_unavailable()
    assert choose_backend(weight) == "reference"
    assert torch.equal(
        select_nm(weight, ScoreTerms(), 2, 4, output="mask"),
        select_nm_reference(weight, ScoreTerms(), 2, 4, output="mask"),
    )
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(BackendError, match=r"was not built.*install a C\+\+ compiler"):
        choose_backend(weight)


def test_a_broken_library_says_so(reload, monkeypatch, tmp_path):
    (tmp_path / f"_cpu{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
    assert not cpu_library.available()
    assert "does not load" in cpu_library.why_unavailable()


@needs_library
def test_the_instruction_set_can_be_forced(reload, monkeypatch):
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "portable")
    assert cpu_library.isa() == "portable"
    cpu_library.load.cache_clear()
    monkeypatch.setenv(cpu_library.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="ACE_TRITON_CPU_ISA='sse9'"):
        cpu_library.available()
    monkeypatch.delenv(cpu_library.ISA_VARIABLE)
    with pytest.raises(ValueError, match="'sse9' must be one of"):
        cpu_library.use_isa("sse9")


def test_backends_that_cannot_serve_say_why(monkeypatch):
    here, elsewhere = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"on one device.*cpu.*meta"):
        choose_backend(here, elsewhere)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fortran")
    with pytest.raises(BackendError, match="'fortran' is not a backend"):
        choose_backend(here)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(BackendError, match="the tensors are on meta"):
        choose_backend(elsewhere)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose_backend(here) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(BackendError, match=r"the tensors are on the CPU|triton is not installed"):
        choose_backend(here)


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_library, "digest", lambda: "0" * 64)
    with pytest.raises(RuntimeError, match="built from other sources"):
        cpu_library.load.__wrapped__()


@needs_library
def test_an_installed_library_has_no_sources_to_be_compared_with(monkeypatch, tmp_path):
    (tmp_path / "abi.h").write_text("int one;")
    assert cpu_library.digest(tmp_path) == ""
    monkeypatch.setattr(cpu_library, "digest", lambda: "")
    assert not isinstance(cpu_library.load.__wrapped__(), str)


def test_every_change_of_the_sources_shows(tmp_path):
    (tmp_path / "a.cpp").write_text("int one;")
    (tmp_path / "b.h").write_text("int two;")
    before = cpu_library.digest(tmp_path)
    assert cpu_library.digest(tmp_path) == before
    (tmp_path / "b.h").write_text("int three;")
    assert cpu_library.digest(tmp_path) != before
    (tmp_path / "b.h").rename(tmp_path / "c.h")
    (tmp_path / "c.h").write_text("int two;")
    assert cpu_library.digest(tmp_path) != before
