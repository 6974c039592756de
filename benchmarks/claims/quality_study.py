"""Perplexity against time on SmolLM2-135M, beside the methods' published forms; fills docs/curve.

    python -m benchmarks.claims.quality_study --calibration c4.jsonl.gz --evaluation wiki.test.raw.gz [--recovery]

An interrupted run resumes when the same command is repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ace_triton.study.command_line import without_folders
from ace_triton.study.journal import Journal
from ace_triton.study.page import write_text
from ace_triton.study.run import run_study
from ace_triton.study.workbench import Protocol

from .pages import page, page_of
from .published_workbench import PublishedWorkbench
from .quality_grid import QualityGrid

COMMAND = "python -m benchmarks.claims.quality_study"
SAMPLES = 64
FURTHER_WINDOW_LENGTHS = (2048,)

console = Console(stderr=True)


def main(
    calibration: Annotated[str, typer.Option(help="Calibration text, as for ace-triton prune.")] = Protocol.calibration,
    evaluation: Annotated[str, typer.Option(help="Evaluation text, as for ace-triton evaluate.")] = Protocol.evaluation,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="Run only the recoveries, which use all threads; default: all the rest.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of results.jsonl and the page.")] = Path("docs/curve"),
) -> None:
    """Measure what OUT does not hold yet, then draw its page."""
    protocol = Protocol(
        "smollm2", calibration, evaluation, samples=SAMPLES, further_window_lengths=FURTHER_WINDOW_LENGTHS
    )
    arguments = without_folders(sys.argv).partition(" ")[2]
    path = measure(protocol, QualityGrid(recovery), out, f"{COMMAND} {arguments}".rstrip())
    console.print(f"the page is {path}", highlight=False)


def measure(protocol: Protocol, grid: QualityGrid, out: Path, command: str) -> Path:
    """Run the cells of a grid that OUT does not hold yet, and draw the page; returns its path."""
    bench = PublishedWorkbench(protocol)
    with Journal(out, bench.setting) as journal:
        run_study(bench, journal, grid, _report, command)
        path = page_of(out, journal.results)
        write_text(path, page(journal.results))
    return path


def _report(done: int, total: int, what: str) -> None:
    console.print(f"{done} of {total}: {what}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
