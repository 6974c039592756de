"""Modules of the kernels import each other in one direction, also for type checking."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "kernels"


def imported_modules(path: Path) -> set[str]:
    """The modules of the same folder that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_have_no_cycle():
    graph = {path.stem: imported_modules(path) for path in FOLDER.glob("*.py")}
    assert "cpu_library" in graph["cpu"]
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)
