"""What runs on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from benchmarks.harness import races
from benchmarks.harness.results import load
from benchmarks.on_gpu import Environment, Section, main, run_section, sections, write_record
from benchmarks.reports import sparse_units, sum_warps

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


def test_a_dry_run_takes_the_whole_way(tmp_path, plain_environment):
    environment = {**plain_environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    words = ["--dry-run", "--out", str(tmp_path), "--only", "tests", "--only", "kernels"]
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "on_gpu.json").read_text())
    assert [(one["name"], one["status"]) for one in record["sections"]] == [("tests", "passed"), ("kernels", "passed")]
    assert record["environment"]["dry_run"] is True
    assert {"driver", "torch", "triton", "cusparselt", "gpu"} <= record["environment"].keys()
    results = load(tmp_path / "results.csv")
    ops = {
        "select_nm 2:4, wanda",
        "selection in a block, 2:4, ria",
        "select_rows 50 %, wanda",
        "weight_sums",
        "moments",
    }
    assert ops <= {result.op for result in results}
    assert {result.setting.evidence for result in results} == {"dry run"}
    assert {result.tests for result in results} == {"passed"}
    assert len(record["results"]) == len(results)
    page = (tmp_path / "on_gpu.md").read_text()
    assert page.startswith("# A dry run on a CPU")
    assert page in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(typer.BadParameter, match="--dry-run"):
        main(out=tmp_path / "none", only=None, dry_run=False)
    assert not (tmp_path / "none").exists()


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(
        typer.BadParameter, match="unknown section speed: use one of sparse_units, tests, races, kernels, sums"
    ):
        main(out=tmp_path, only=["speed"], dry_run=True)


@pytest.mark.parametrize("dry_run", [True, False])
def test_all_limits_fit_into_ten_minutes(tmp_path, dry_run):
    assert sum(section.limit for section in sections(tmp_path, dry_run)) <= 570


def test_on_a_gpu_only_tests_on_it_count(tmp_path):
    found = {section.name: section.arguments for section in sections(tmp_path, dry_run=False)}
    assert found["tests"][found["tests"].index("-k") + 1] == "cuda"
    assert {"tests/test_cuda.py", "tests/packed/test_semi_structured.py"} <= set(found["tests"])
    for name in ("kernels", "layers", "model", "patterns"):
        assert found[name][found[name].index("--bench-device") + 1] == "cuda"
        assert "--tiny" not in found[name]


def test_every_file_named_is_there(tmp_path):
    for section in sections(tmp_path, dry_run=False):
        for word in section.arguments:
            if word.startswith(("tests/", "benchmarks/")):
                assert (ROOT / word).exists(), word


def test_warps_of_sums_are_compared(capsys):
    sum_warps.main(dry_run=True)
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert {len(line.split("\t")) for line in (head, *lines)} == {5}


def test_sparse_units_are_checked_first_and_then_timed(capsys, tmp_path, monkeypatch):
    assert sections(tmp_path, dry_run=False)[0].name == "sparse_units"
    sparse_units.main(dry_run=True)
    checked, timed = capsys.readouterr().out.split("shape, bf16")
    lines = [line.split("\t")[2:] for line in checked.splitlines()[1:]]
    assert lines == [["16", "0", "0", "0"], ["8", "0", "0", "0"], ["4", "0", "0", "0"]]
    assert [line.split("\t")[1] for line in timed.splitlines()[1:]] == ["16", "8", "4"]
    assert len(timed.splitlines()[1].split("\t")) == 5
    monkeypatch.setattr(sparse_units, "nm_linear_mma", lambda tokens, *_: torch.full_like(tokens[:, :1], torch.nan))
    with pytest.raises(typer.Exit):
        sparse_units.main(dry_run=True)
    assert "outputs are wrong; no times" in capsys.readouterr().out


def test_what_the_race_detector_runs_runs():
    races.main(run=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_race_detector_is_said(capsys):
    races.main(run=False)
    assert "nothing was checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "status"),
    [("print('fine')", "passed"), ("raise SystemExit('broken')", "failed"), ("import os; os.abort()", "failed")],
)
def test_a_section_that_fails_is_recorded(tmp_path, code, status):
    section = Section("one", ("-c", code), 30)
    finished = run_section(section, tmp_path)
    assert finished.status == status
    if status == "failed" and "broken" in code:
        assert finished.tail == ("broken",)
    write_record(tmp_path, Environment.here(dry_run=True), [finished])
    assert json.loads((tmp_path / "on_gpu.json").read_text())["sections"][0]["status"] == status
    assert f"| one | {status} |" in (tmp_path / "on_gpu.md").read_text()


def test_a_section_that_hangs_ends_with_its_children(tmp_path):
    child = tmp_path / "child"
    sleeper = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    finished = run_section(Section("slow", ("-c", f"print('started', flush=True); {parent}"), 3), tmp_path)
    assert finished.status == "timed out"
    assert finished.seconds < 20
    assert finished.tail == ("started",)
    pid = int(child.read_text())
    for _ in range(50):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid), "a child of the section still runs"


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
