"""Every tensor that the package makes names its dtype and its device, so that torch's defaults change nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FILES = sorted(
    [*REPOSITORY.glob("kernels/*.py"), *REPOSITORY.glob("ace_triton/*.py"), *REPOSITORY.glob("ace_triton/[!k]*/*.py")]
)

INTEGERS = {"arange", "randint", "randperm"}
"""What makes int64 by itself of the whole numbers that they are given."""

FACTORIES = INTEGERS | {"as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}


def factory_calls(source: str) -> Iterator[tuple[ast.Call, str]]:
    """Calls of torch's factories, and which of dtype and device each leaves out."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES:
            named = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if node.func.attr in INTEGERS else {"dtype", "device"}
            if missing := wanted - named:
                yield node, " and ".join(sorted(missing))


def test_there_is_something_to_look_at():
    assert {"memory.py", "activation.py", "workbench.py"} <= {file.name for file in FILES}
    assert [missing for _, missing in factory_calls("torch.zeros(3)\ntorch.arange(4, device=x)")] == [
        "device and dtype"
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_names_dtype_and_device(file):
    left_out = [f"line {call.lineno}: {missing}" for call, missing in factory_calls(file.read_text())]
    assert not left_out


def test_addresses_are_taken_in_one_place():
    """Elsewhere data_ptr() only compares tensors, or tells how they are aligned."""
    taking = {file.name for file in FILES if file.parent.name == "kernels" and ".data_ptr()" in file.read_text()}
    assert taking == {"memory.py", "launch.py", "select_nm.py"}
