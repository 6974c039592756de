"""Several processes measure a study together: the results of one, one journal and one page."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ace_triton.errors import StudyError
from ace_triton.processes import Processes
from ace_triton.recipe import Recipe
from ace_triton.study.cells import Cell, Grid
from ace_triton.study.dealing import Dealer, Worker
from ace_triton.study.journal import FILE, Journal, Results, read_results
from ace_triton.study.records import DenseResult
from ace_triton.study.run import run_study
from ace_triton.study.workbench import Workbench

GRID = Grid(tuple(map(Cell, map(Recipe, ("magnitude", "wanda", "ria")))), ("2:4",), (8, 16), (0,))
CELLS = 1 + 2 * 2


def without_times(results: Results) -> dict:
    """What two runs of a study must agree on."""
    return {
        "setting": results.setting,
        "dense": results.dense,
        "cells": {cell: (found.perplexity, found.kept) for cell, found in results.cells.items()},
        "samples": results.samples,
        "norms": results.norms,
    }


def run(bench: Workbench, folder, progress=None) -> None:
    """Run the study, in this process or in those of its group."""
    if not Processes.now().is_first:
        run_study(bench, None, GRID, progress)
        return
    with Journal(folder, bench.setting) as journal:
        run_study(bench, journal, GRID, progress)


def test_the_results_are_those_of_one_process(protocol, together, tmp_path):
    bench = Workbench(protocol)
    run(bench, tmp_path / "one")
    told = tmp_path / "told"
    told.mkdir()

    def measure(rank):
        steps = []
        run(bench, tmp_path / "many", lambda done, total, what: steps.append((done, total, what)))
        assert steps[-1] == (CELLS, CELLS, "")
        (told / str(rank)).write_text("\n".join(what for *_, what in steps[1:-1]))

    assert together(3, measure) == [0] * 3
    assert without_times(read_results(tmp_path / "many")) == without_times(read_results(tmp_path / "one"))
    measured = [word for path in told.iterdir() for word in path.read_text().splitlines()]
    assert sorted(measured) == sorted(map(str, GRID.cells()))
    before = (tmp_path / "many" / FILE).read_bytes()
    assert together(3, lambda _: run(bench, tmp_path / "many")) == [0] * 3
    assert (tmp_path / "many" / FILE).read_bytes() == before


def test_a_stopped_study_keeps_what_each_process_finished(protocol, together, tmp_path):
    bench = Workbench(protocol)
    run(bench, tmp_path / "one")

    def stop_in_the_second_cell(rank):
        started = []

        def stop(_done, _total, what):
            started.append(what)
            if rank == 1 and len(started) == 3:  # The dense model is the first.
                os._exit(9)

        run(bench, tmp_path / "many", stop)

    codes = together(2, stop_in_the_second_cell)
    assert (codes[0] != 0, codes[1]) == (True, 9)
    assert 1 <= len(read_results(tmp_path / "many").cells) < CELLS
    assert together(2, lambda _: run(bench, tmp_path / "many")) == [0, 0]
    found, expected = (without_times(read_results(tmp_path / name)) for name in ("many", "one"))
    assert found == expected


def test_a_record_that_cannot_be_kept_ends_the_first_process(together):
    def keep(_record):
        raise OSError("the disk is full")

    def take_all(dealer):
        with dealer:
            while dealer.take() is not None:
                pass

    def deal(rank):
        processes = Processes.now()
        if rank:
            with Worker(processes) as worker:
                worker.append(DenseResult(1.0))
            return
        with pytest.raises(OSError, match="the disk is full"):
            take_all(Dealer(processes, 3, keep))

    assert together(2, deal) == [0, 0]


def test_processes_with_different_texts_are_refused(protocol, together, tmp_path):
    def measure(rank):
        bench = Workbench(protocol)
        bench.setting = replace(bench.setting, evaluation_sha256=str(rank))
        with pytest.raises(StudyError, match="the processes have different models, texts or settings"):
            run(bench, tmp_path / "many")

    assert together(2, measure) == [0, 0]


def test_the_command_draws_one_page(command_together, tiny_checkpoint, some_text, tmp_path):
    texts = ("--calibration", some_text, "--evaluation", some_text, "--methods", "magnitude,wanda", "--lengths", 8)
    small = ("--samples", 4, "--windows", 2, "--window-length", 16, "--dtype", "float32", "--sparsities", "2:4")
    words = ("study", tiny_checkpoint, tmp_path / "s", *texts, *small, "--seeds", 1)
    (code, shown, errors), other = command_together(2, *words)
    assert code == 0, errors
    assert other == (0, "", "")
    assert shown.count("2 cells; the page is") == 1
    assert len(read_results(tmp_path / "s").cells) == 2
    assert read_results(tmp_path / "s").runs[0].command.startswith("ace-triton study tiny s ")
    assert (tmp_path / "s" / "tiny.html").is_file()
