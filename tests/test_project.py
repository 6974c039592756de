"""The project around the code: what the wheel holds, and what its files say of each other."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import ace_triton

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def files_below(folder: Path) -> set[str]:
    """Modules and data in a folder, links followed."""
    found = set()
    for place, _, names in os.walk(folder, followlinks=True):
        found |= {str((Path(place) / name).relative_to(folder)) for name in names if not name.endswith((".pyc", ".so"))}
    return found


def test_the_built_package_holds_every_module_and_its_data(tmp_path):
    """Also those of a package that setup.py must name; of the CPU library's sources only the C header is in it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    built = files_below(tmp_path / "ace_triton")
    header = "kernels/cpu/abi.h"
    sources = {name for name in files_below(ROOT / "ace_triton") if name.startswith("kernels/cpu/")} - {header}
    assert built == files_below(ROOT / "ace_triton") - sources
    assert {"py.typed", header} <= built


def test_the_version_is_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == ace_triton.__version__
    assert version == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_is_there(workflow):
    """Its targets of make, its scripts, and the workflows that it calls."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = workflow.read_text()
    assert [target for target in re.findall(r"run: make ([\w-]+)", text) if target not in targets] == []
    assert [job["uses"] for job in jobs.values() if "uses" in job and not (ROOT / job["uses"]).is_file()] == []
    scripts = re.findall(r"(?<=run: )\.ci/\w+|tests/\w+\.py", text)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    for job in jobs.values():
        assert all(("uses" in step) != ("run" in step) for step in job.get("steps", ()))


def test_the_matrix_has_every_python_that_is_promised():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = [match[1] for line in classifiers if (match := re.search(r"Python :: (3\.\d+)$", line))]
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "matrix.yml").read_text())
    assert matrix["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
