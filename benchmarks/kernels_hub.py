"""Lay out ``kernels/`` as a repository of Hugging Face's ``kernels`` hub, and import it from there.

    python -m benchmarks.kernels_hub OUT

The hub loads a kernel from a folder that is not on Python's path and under a name of its own choice. So all imports
must be relative, or of the standard library, torch or triton. The kernels are written in Triton and Python alone, so
one variant (noarch) serves every machine; the compiled CPU library is not part of it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import ace_triton

SOURCES = Path(__file__).resolve().parents[1] / "kernels"
NAME = "nm_sparsity"
VARIANT = "torch-cuda"

ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}

PUBLIC = {
    "nm_linear": ["nm_linear"],
    "pack_nm": ["pack_nm"],
    "packed_nm": ["PackedNM"],
    "score_terms": ["ScoreTerms"],
    "select_nm": ["select_nm"],
    "unpack_nm": ["unpack_nm"],
}
"""The public interface: names by module."""

BUILD = """[general]
name = "{name}"
edition = 5
version = 1
license = "apache-2.0"
backends = ["cuda"]

[torch-noarch]
pyext = ["py", "json"]
"""

USE = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("under_another_name", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
module = importlib.util.module_from_spec(spec)
sys.modules["under_another_name"] = module
spec.loader.exec_module(module)
weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
pruned = module.select_nm(weight, module.ScoreTerms(), 2, 4)
packed = module.pack_nm(pruned, 2, 4)
assert torch.equal(module.unpack_nm(packed), pruned)
tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
assert torch.allclose(module.nm_linear(tokens, packed), tokens @ pruned.T, atol=1e-5)
others = [name for name in sys.modules if name.split(".")[0] in ("ace_triton", "kernels")]
assert not others, others
print("imported as", module.__name__)
"""


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    name: Annotated[str, typer.Option(help="Name of the kernel on the hub.")] = NAME,
) -> None:
    """Write the folder, and import it in a process of its own."""
    tree = lay_out(SOURCES, out, name)
    print(try_import(tree))
    print(f"written to {out}; kernel-builder's upload publishes it, from an account of the hub")


def lay_out(sources: Path, out: Path, name: str) -> Path:
    """Write ``build.toml`` and ``build/<variant>`` with the modules and their metadata.

    Args:
        sources: folder of the modules.
        out: folder to write; it must not exist.
        name: name of the kernel.

    Returns:
        The folder of the variant.

    Raises:
        ValueError: if a module imports what the hub does not allow.
    """
    modules = sorted(sources.glob("*.py"))
    wrong = [f"{path.name}: {other}" for path in modules for other in foreign_imports(path.read_text())]
    if wrong:
        raise ValueError(f"imports that the hub does not allow: {'; '.join(wrong)}")
    tree = out / "build" / VARIANT
    tree.mkdir(parents=True)
    for path in modules:
        shutil.copyfile(path, tree / path.name)
    (tree / "__init__.py").write_text(_interface())
    (out / "build.toml").write_text(BUILD.format(name=name))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tree.glob("*.py"))}
    metadata = {
        "name": name,
        "version": 1,
        "license": "apache-2.0",
        "backend": {"type": "cuda"},
        "source": f"ace-triton {ace_triton.__version__}",
        "sha256": files,
    }
    (tree / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return tree


def foreign_imports(text: str) -> list[str]:
    """Modules that a source imports, apart from relative ones and those that the hub allows."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(node.module or "")
    return sorted({name for name in found if name.split(".")[0] not in ALLOWED})


def try_import(tree: Path) -> str:
    """Import the variant under another name, away from this repository, and use it; what the process printed.

    Raises:
        RuntimeError: if that fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-B", "-P", "-c", USE, str(tree.resolve())],
        cwd=tree.resolve().anchor,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the kernel cannot be imported from {tree}: {done.stderr.strip()}")
    return done.stdout.strip()


def _interface() -> str:
    """``__init__.py`` of the kernel."""
    lines = ['"""Kernels for n:m sparse weights: select, pack, unpack and multiply."""', ""]
    lines += [f"from .{module} import {', '.join(names)}" for module, names in PUBLIC.items()]
    public = sorted(name for names in PUBLIC.values() for name in names)
    return "\n".join([*lines, "", f"__all__ = {json.dumps(public)}", ""])


if __name__ == "__main__":
    typer.run(main)
