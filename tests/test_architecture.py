"""Imports between the parts of the package go one way: each part imports only parts listed before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = [
    "kernels",
    "errors",
    "command_environment",
    "timing",
    "processes",
    "out_of_memory",
    "process_memory",
    "available_memory",
    "runs_on",
    "threads",
    "option_types",
    "byte_sizes",
    "terminal",
    "sparsity",
    "linears",
    "tied",
    "computed_weight",
    "weight_checks",
    "statistics",
    "solvers",
    "methods",
    "recipe",
    "presets",
    "checked_terms",
    "prune",
    "prune_together",
    "decoders",
    "dispatched",
    "budgets",
    "reordering",
    "block_fit",
    "model_report",
    "selection",
    "tower_pass",
    "prune_blocks",
    "structures",
    "progress",
    "inputs",
    "evaluate",
    "agreement",
    "calibration_report",
    "task_evaluation",
    "provenance",
    "packed",
    "decoding",
    "generation",
    "batch_generation",
    "decoding_times",
    "formats",
    "exporters",
    "streaming",
    "planning",
    "recovery",
    "study",
    "serving",
    "commands",
]


def part_of(path: Path) -> str:
    """The package or module directly below ``ace_triton`` that a file belongs to."""
    inside = path.relative_to(ROOT / "ace_triton")
    return inside.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts that a file imports, also inside functions; imports for type checking are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ["ace_triton", *path.relative_to(ROOT / "ace_triton").parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = [*base, *(node.module.split(".") if node.module else [])]
            if whole[:1] == ["ace_triton"]:
                found |= {whole[1]} if len(whole) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


FILES = sorted(p for p in (ROOT / "ace_triton").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)


def test_every_part_has_a_place_in_the_order():
    parts = {part_of(path) for path in FILES} - {"__init__", "__main__"}
    assert parts <= set(ORDER), f"add to ORDER: {sorted(parts - set(ORDER))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    if part in {"__init__", "__main__"}:
        return
    allowed = {*ORDER[: ORDER.index(part)], part}
    assert imported_parts(path) <= allowed
