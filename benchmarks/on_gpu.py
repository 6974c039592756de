"""Runs the kernels' tests on a GPU, then times them, in under ten minutes.

    benchmarks/on_gpu.sh [--out DIR] [--only NAME ...] [--dry-run]

Every section has its own process and time limit, so that a section that fails or hangs does not affect the others.
DIR/on_gpu.json is written again after each. A dry run does the same on a CPU with small inputs and is marked as such;
it says nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from ace_triton.commands.report import write_json

from .harness.gate import ROOT
from .harness.results import installed, load, outcomes
from .reports.report_bench import markdown_table

Status = Literal["passed", "failed", "timed out"]

TAIL_LINES = 40
KERNELS = ("select_nm", "groups", "select_rows", "weight_sums", "moments", "pack_nm", "divergence", "adamw")
RESULTS, TESTS, SPARSE = "results.csv", "tests.xml", "sparse.json"
DRY_RUN_TESTS = "says_what_is_wrong or whole_layer or layout_is"


@dataclass(frozen=True)
class Environment:
    """Hardware and software of the run; "" for parts that are missing.

    Attributes:
        dry_run: True if it ran on a CPU, with small inputs.
        gpu, capability, driver, runtime: the GPU's name, "9.0", the driver's and CUDA's (or ROCm's) version.
        torch, triton, cusparselt, ace_triton, python: versions.
        date: UTC, ISO 8601.
    """

    dry_run: bool
    gpu: str
    capability: str
    driver: str
    runtime: str
    torch: str
    triton: str
    cusparselt: str
    ace_triton: str
    python: str
    date: str

    @classmethod
    def here(cls, dry_run: bool) -> Environment:
        """The present time on this machine."""
        there = torch.cuda.is_available() and not dry_run
        sparse = torch.backends.cusparselt
        return cls(
            dry_run,
            torch.cuda.get_device_name() if there else "",
            ".".join(map(str, torch.cuda.get_device_capability())) if there else "",
            driver_version() if there else "",
            torch.version.cuda or torch.version.hip or "",
            torch.__version__,
            installed("triton"),
            str(sparse.version()) if there and sparse.is_available() else "",
            installed("ace-triton"),
            platform.python_version(),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True)
class Section:
    """One process: its name, the interpreter's arguments, and its limit in seconds."""

    name: str
    arguments: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Finished:
    """Result of a section.

    Attributes:
        name: name of the section.
        status: "failed" for any exit status other than 0.
        seconds: wall-clock seconds.
        tail: the last lines of its output; DIR/NAME.log has all of it.
    """

    name: str
    status: Status
    seconds: float
    tail: tuple[str, ...]


def sections(out: Path, dry_run: bool) -> tuple[Section, ...]:
    """All sections; their limits add up to less than ten minutes."""
    report, results = out / TESTS, out / RESULTS
    workers = ("--numprocesses", "8") if installed("pytest-xdist") and not dry_run else ()

    def timed(name: str, limit: float, *arguments: str) -> Section:
        device = ("--bench-device", "cpu", "--tiny") if dry_run else ("--bench-device", "cuda")
        budget = "0.02" if dry_run else "0.5"  # Nobody reads the times of a dry run.
        options = ("--benchmark-only", "--override-ini", "addopts=--import-mode=importlib", "--budget", budget)
        files = ("--tested", str(report), "--results", str(results))
        return Section(name, ("-m", "pytest", "-q", *arguments, *options, *device, *files), limit)

    which = DRY_RUN_TESTS if dry_run else "cuda"
    alone = (
        "tests/test_cuda.py",
        "tests/packed/test_semi_structured.py",
        "tests/packed/test_sparse_units.py",
        "tests/benchmarks/test_published_baselines.py",
    )
    tests = ("tests/kernels", *alone, "-k", which, "--junitxml", str(report))
    kernels = [f"benchmarks/bench_{name}.py" for name in KERNELS]
    layer = ("--device", "cpu", "--shape", "64x128", "--rows", "1") if dry_run else ("--shape", "4096x11008")
    sparse = ("-m", "ace_triton", "bench", *layer, "--json", str(out / SPARSE))
    return (
        Section("sparse_units", ("-m", "benchmarks.reports.sparse_units", *(("--dry-run",) if dry_run else ())), 65),
        Section("tests", ("-m", "pytest", "-q", *tests, *workers), 155),
        Section("races", ("-m", "benchmarks.harness.races"), 40),
        timed("kernels", 80, *kernels, "-k", "not other_patterns and not masks"),
        Section("sums", ("-m", "benchmarks.reports.sum_warps", *(("--dry-run",) if dry_run else ())), 30),
        timed("layers", 60, "benchmarks/bench_prune_layer.py"),
        timed("model", 60, "benchmarks/bench_prune_model.py", "-k", "score_and_mask or ria"),
        Section("sparse", sparse, 50),
        timed("patterns", 30, kernels[0], "-k", "other_patterns or masks"),
    )


def run_section(section: Section, out: Path) -> Finished:
    """Run a section, and kill it with all its children at its time limit."""
    log = out / f"{section.name}.log"
    start = time.perf_counter()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *section.arguments],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        status: Status
        try:
            status = "passed" if process.wait(section.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    return Finished(section.name, status, round(time.perf_counter() - start, 1), tuple(lines[-TAIL_LINES:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def driver_version() -> str:
    """The NVIDIA driver's version; "" if nvidia-smi does not report one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def write_record(out: Path, environment: Environment, finished: Sequence[Finished]) -> None:
    """Write DIR/on_gpu.json and DIR/on_gpu.md from the sections that have ended."""
    results = load(out / RESULTS)
    record = {
        "environment": asdict(environment),
        "sections": [asdict(one) for one in finished],
        "results": [asdict(result) for result in results],
        "sparse": json.loads((out / SPARSE).read_text()) if (out / SPARSE).is_file() else None,
    }
    write_json(out / "on_gpu.json", record)
    title = "# A dry run on a CPU: it says nothing about a GPU" if environment.dry_run else "# On a GPU"
    facts = [f"| {name} | {value} |" for name, value in asdict(environment).items()]
    ended = [f"| {one.name} | {one.status} | {one.seconds:.0f} s |" for one in finished]
    lines = [title, "", "| | |", "|---|---|", *facts, "", "| section | status | took |", "|---|---|---:|", *ended, ""]
    lines += [*markdown_table(outcomes(results)), ""]
    for one in finished:
        if one.status != "passed" or one.name in ("sparse_units", "races", "sums", "sparse"):
            lines += [f"## {one.name}: {one.status}", "", "```", *one.tail, "```", ""]
    (out / "on_gpu.md").write_text("\n".join(lines))


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results; earlier results in it are replaced.")] = Path(
        "on_gpu"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Name of a section to run; repeatable; default: all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run on a CPU, with small inputs.")] = False,
) -> None:
    """Run the sections in turn; write DIR/on_gpu.json and DIR/on_gpu.md."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter(
            "torch finds no GPU (torch.cuda.is_available() is False); add --dry-run to try this without one"
        )
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    all_sections = sections(out, dry_run)
    unknown = set(only or ()) - {section.name for section in all_sections}
    if unknown:
        names = ", ".join(section.name for section in all_sections)
        raise typer.BadParameter(f"unknown section {', '.join(sorted(unknown))}: use one of {names}")
    for stale in (RESULTS, TESTS, SPARSE):
        (out / stale).unlink(missing_ok=True)
    console = Console()
    environment = Environment.here(dry_run)
    console.print(json.dumps(asdict(environment), indent=2))
    finished: list[Finished] = []
    for section in all_sections:
        if not only or section.name in only:
            console.print(f"{section.name} (at most {section.limit:.0f} s) ...", end=" ")
            finished.append(run_section(section, out))
            console.print(f"{finished[-1].status} after {finished[-1].seconds:.0f} s")
            write_record(out, environment, finished)
    print((out / "on_gpu.md").read_text())
    raise typer.Exit(0 if all(one.status == "passed" for one in finished) else 1)


if __name__ == "__main__":
    typer.run(main)
