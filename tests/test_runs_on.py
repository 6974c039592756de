"""What operations run on is said, and warned of once if it is slow."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from ace_triton import prune_linear
from ace_triton.kernels import cpu, cpu_library, cpu_sources
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE, warn_of_slow_backend
from ace_triton.runs_on import SlowBackendWarning, describe_backend, warn_if_slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def chosen_by_device(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [".not-built"])
    cpu_library.load.cache_clear()
    warn_of_slow_backend.cache_clear()
    yield
    monkeypatch.undo()
    cpu_library.load.cache_clear()
    warn_of_slow_backend.cache_clear()


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
def test_with_the_library_its_instruction_set_and_threads_are_said(recwarn):
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    products = ", bf16 products" if cpu.has_gram_product() else ""
    assert describe_backend() == f"compiled CPU library ({cpu_library.isa()}{products}), {threads} thread{plural}"
    warn_if_slow()
    assert not recwarn.list


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
def test_arm_extensions_are_said(monkeypatch):
    monkeypatch.setattr(cpu_library, "isa", lambda: "neon_dotprod")
    monkeypatch.setattr(cpu, "has_gram_product", lambda: True)
    assert describe_backend().startswith("compiled CPU library (neon_dotprod, bf16 products), ")


def test_without_the_library_it_is_said_why_and_warned_once(no_library, recwarn):
    prune_linear(torch.nn.Linear(16, 8), torch.randn(4, 16), "wanda")
    warn_if_slow()
    message = str(recwarn.pop(SlowBackendWarning).message)
    assert not recwarn.list
    assert "no C++ compiler was found" in message
    assert "Install a C++ compiler (g++ or clang++) and reinstall ace_triton" in message
    assert describe_backend().startswith("plain torch, slow (no compiled CPU library: it was not built")


def test_a_backend_that_is_asked_for_is_no_surprise(monkeypatch, recwarn, no_library):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    warn_if_slow()
    warn_if_slow("meta")
    assert not recwarn.list


def test_a_build_without_a_compiler_goes_on_and_says_what_is_missing(tmp_path):
    pytest.importorskip("setuptools")
    environment = {**os.environ, "CC": str(tmp_path / "cc"), "CXX": str(tmp_path / "c++")}
    build = ["setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    done = subprocess.run([sys.executable, *build], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the compiled CPU library of ace_triton was not built" in done.stderr
    assert "install a C++17 compiler (g++ or clang++; on Debian: apt install g++)" in done.stderr
    assert not list(tmp_path.rglob("_cpu*"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (None, None),
        (lambda library: library[: library.index(cpu_sources.digest().encode()) + 100], "it cannot be loaded here"),
        (lambda library: library.replace(cpu_sources.digest().encode(), b"0" * 64), "it was built from other sources"),
    ],
)
def test_a_build_takes_a_library_of_the_same_sources(tmp_path, change, fault):
    pytest.importorskip("setuptools")
    built = tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiled = ROOT / "kernels" / built.name
    if not compiled.is_file():
        pytest.skip("the CPU library is not compiled")
    built.write_bytes(change(compiled.read_bytes()) if change else compiled.read_bytes())
    environment = {**os.environ, "ACE_TRITON_CPU_LIBRARY": str(built), "CXX": str(tmp_path / "c++")}
    build = ["setup.py", "build_ext", "--build-lib", tmp_path / "lib"]
    done = subprocess.run([sys.executable, *build], cwd=ROOT, env=environment, capture_output=True, text=True)
    taken = tmp_path / "lib" / "ace_triton" / "kernels" / built.name
    if fault:
        assert f"={built}: {fault}" in done.stderr
        assert done.stderr.endswith("; unset the variable to compile the library\n")
        assert not taken.exists()
    else:
        assert taken.read_bytes() == built.read_bytes(), done.stderr
