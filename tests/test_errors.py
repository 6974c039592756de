"""Every error about a user's input derives from AceError; what a program gets from Python's own protocols does not."""

import ast
import builtins
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "ace_triton"

PROTOCOLS = {"AttributeError", "IndexError", "KeyError", "NotImplementedError", "StopIteration"}
"""Raised where Python or torch asks an object for something that it does not have."""

SYSTEM = {"OSError", "FileNotFoundError", "MemoryError", "SystemExit", "KeyboardInterrupt"}

NO_MISTAKE = {
    "decoders/account.py": "RuntimeError",  # A bug of ours.
    "recovery/checks.py": "RuntimeError",  # A bug of ours.
    "inputs/gguf_metadata.py": "ValueError",  # As in the package gguf; errors name the file where it is loaded.
    "kernels/memory.py": "ValueError",  # Caught in the same function.
    "packed/manifest.py": "TypeError",  # Caught where the manifest is read.
    "packed/expert_stack.py": "TypeError",  # The class of torch's own error for an operation that a type does not have.
    "packed/packed_linear.py": "RuntimeError",  # The class of autograd's own error.
    "packed/weight.py": "RuntimeError",  # The class of torch's own error for a tensor that cannot be written.
}
"""Files that raise an exception of Python's, and which."""


@cache
def statements(path: Path) -> tuple[ast.Raise | ast.ClassDef, ...]:
    """The ``raise`` statements and the classes of a file."""
    return tuple(node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise | ast.ClassDef))


def raised_builtins(path: Path) -> set[str]:
    """Names of Python's exceptions in the ``raise`` statements of a file."""
    found = set()
    for node in statements(path):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and isinstance(getattr(builtins, error.id, None), type):
                found.add(error.id)
    return found - PROTOCOLS - SYSTEM


def test_mistakes_of_a_user_raise_errors_of_ours():
    files = sorted(ROOT.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        assert raised_builtins(path) <= {NO_MISTAKE.get(name)}, name


def test_public_exceptions_derive_from_ours():
    for path in [*ROOT.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in statements(path):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                bases = {ast.unparse(base) for base in node.bases}
                ours = any(base.endswith("Error") and not hasattr(builtins, base) for base in bases)
                assert ours or node.name == "AceError", f"{path}: {node.name}"
