"""``ace-triton study``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from ..errors import ArgumentError, StudyError
from ..inputs.text import check_text
from ..processes import joined
from ..progress import stage
from ..recipe import Recipe
from ..study.cells import Cell, Grid
from ..study.command_line import without_folders
from ..study.journal import Journal, Results, read_results
from ..study.recipes_grid import RecipesGrid
from ..study.run import run_study
from ..study.workbench import Protocol, Workbench
from .console import print_backend, print_line, progress_bars
from .options import (
    DTYPES,
    TEXT_SOURCES,
    BosOption,
    DeviceOption,
    PluginOption,
    TrustOption,
    WikitextOption,
    number,
    parse_device,
    parse_dtype,
    parse_options,
)
from .sources import check_causal, check_length, check_source

PageWriter = Callable[[Results, Path], None]


@dataclass(frozen=True)
class Defaults:
    """Default values of a study's options, as on the command line."""

    methods: str
    sparsities: str
    lengths: str
    seeds: int
    samples: int
    windows: int
    window_lengths: str


PAPER = Defaults("magnitude,wanda,ria,cosp,varp,ace", "0.5,2:4,4:8", "16,32,128,512,2048", 3, 128, 20, "512")
PAPER_QUICK = Defaults(PAPER.methods, "2:4", "16,32", 1, 32, 4, "512")
QUALITY = Defaults("ria,cosp,ace,wanda", "0.5,2:4,4:8", "128", 5, 64, 20, "512,2048")
QUALITY_QUICK = Defaults(QUALITY.methods, "2:4", "32", 1, 32, 4, "512")


def _default(name: str) -> str:
    """An option's default for the help, and its default with ``--quality`` if that is different."""
    paper, quality = (str(getattr(defaults, name)).replace(",", ", ") for defaults in (PAPER, QUALITY))
    return paper if paper == quality else f"{paper}; {quality} with --quality"


def study(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a checkpoint folder, a hub name, a .gguf file, or smollm2.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the results and the page; a study in it resumes.")
    ],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Compare perplexity against time: the metrics alone, and at 2:4 also SparseGPT, and the last of "
            "--methods with permuted channels and weight updates.",
        ),
    ] = False,
    minutes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated minutes of recovery to add to the best recipe, as 5,20; only with --quality.",
            show_default="no recovery",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods; options follow a colon, as in ace:base=wanda+reduce=abs.",
            show_default=_default("methods"),
        ),
    ] = None,
    plugin: PluginOption = None,
    sparsities: Annotated[
        str | None,
        typer.Option(help="Comma-separated patterns n:m or pruned fractions.", show_default=_default("sparsities")),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated lengths of calibration sequences, in tokens.", show_default=_default("lengths")
        ),
    ] = None,
    seeds: Annotated[
        int | None, number("Number of calibration seeds, starting at 0.", least=1, show_default=_default("seeds"))
    ] = None,
    samples: Annotated[
        int | None, number("Number of calibration sequences.", least=1, show_default=_default("samples"))
    ] = None,
    windows: Annotated[
        int | None, number("Number of windows to evaluate.", least=1, show_default=_default("windows"))
    ] = None,
    window_lengths: Annotated[
        str | None,
        typer.Option(
            "--window-lengths",
            "--window-length",
            help="Comma-separated window lengths, in tokens; --windows is for the first, and the others cover the same "
            "tokens.",
            show_default=_default("window_lengths"),
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help=f"Calibration text: {TEXT_SOURCES.format(half='calibration')} (Python's manual).")
    ] = Protocol.calibration,
    evaluation: Annotated[
        str, typer.Option(help=f"Evaluation text: {TEXT_SOURCES.format(half='evaluation')} (Python's manual).")
    ] = Protocol.evaluation,
    wikitext: WikitextOption = False,
    bos: BosOption = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Type of weights and forwards, one of {', '.join(DTYPES)}; statistics are float32.")
    ] = "bfloat16",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Use the defaults of a small study: 2:4, sequences up to 32 tokens, one seed."),
    ] = False,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Draw the page again from the results in OUT, and measure nothing.")
    ] = False,
) -> None:
    """Prune MODEL by many methods, calibration lengths and seeds, and show the results on one page in OUT.

    An interrupted study resumes when the same command is repeated; further --lengths or --seeds add to it. Several
    processes share the cells: torchrun --nproc-per-node 4 -m ace_triton study MODEL OUT.
    """
    write_page = _page_writer()
    if render_only:
        with joined() as processes:
            if processes.is_first:
                _render(write_page, read_results(out), out)
        return
    if minutes and not quality:
        raise ArgumentError("--minutes needs --quality: recovery starts from the best recipe of that comparison")
    defaults = (QUALITY_QUICK if quick else QUALITY) if quality else (PAPER_QUICK if quick else PAPER)
    variants = tuple(_variant(word) for word in _words(methods or defaults.methods))
    patterns = _words(sparsities or defaults.sparsities)
    calibrated = _numbers("--lengths", lengths or defaults.lengths)
    chosen_seeds = tuple(range(seeds if seeds is not None else defaults.seeds))
    grid = (
        RecipesGrid(variants, patterns, calibrated, chosen_seeds, _minutes(minutes))
        if quality
        else Grid(variants, patterns, calibrated, chosen_seeds)
    )
    window_length, *further = _numbers("--window-lengths", window_lengths or defaults.window_lengths)
    where = parse_device(device)
    protocol = Protocol(
        model,
        calibration=calibration,
        evaluation=evaluation,
        wikitext=wikitext,
        samples=samples if samples is not None else defaults.samples,
        windows=windows if windows is not None else defaults.windows,
        window_length=window_length,
        further_window_lengths=tuple(further),
        dtype=parse_dtype(dtype),
        device=where,
        bos=bos,
        trust_remote_code=trust_remote_code,
    )
    _check_places(protocol, out, max(calibrated))
    print_backend(where)
    with joined() as processes, progress_bars() as progress:
        with stage(progress, "load the model and the texts"):
            bench = Workbench(protocol)
        with Journal(out, bench.setting) if processes.is_first else nullcontext() as journal:
            try:
                run_study(bench, journal, grid, _cells_bar(progress), without_folders(["ace-triton", *sys.argv[1:]]))
            except (KeyboardInterrupt, SystemExit) as stop:
                stop.add_note(f"the same command resumes the study in {out}")
                if journal is not None:
                    _render(write_page, journal.results, out)
                raise
            if journal is not None:
                _render(write_page, journal.results, out)


def _cells_bar(progress: Progress) -> Callable[[int, int, str], None]:
    """A bar over the cells with the name of the running one; its time starts without the cells measured before."""
    tasks: list[TaskID] = []

    def move(done: int, total: int, what: str) -> None:
        if not tasks:
            tasks.append(progress.add_task(what or "study", total=total, completed=done, unit="cells"))
        progress.update(tasks[0], completed=done, description=what or "study")

    return move


def _check_places(protocol: Protocol, out: Path, length: int) -> None:
    """Raise an AceError for a model, text or folder that would fail after the model is loaded."""
    check_source(protocol.model)
    for text in (protocol.calibration, protocol.evaluation):
        check_text(text)
    if (out / "config.json").exists():
        raise StudyError(f"{out} is a model's folder: name another one for the study")
    advice = "prune it by each method, and compare the results with 'ace-triton evaluate --dense'"
    check_causal(protocol.model, "study", advice, trust_remote_code=protocol.trust_remote_code)
    check_length(protocol.model, length, "--lengths")
    check_length(protocol.model, max(protocol.window_length, *protocol.further_window_lengths, 0), "--window-lengths")


def _render(write_page: PageWriter, results: Results, out: Path) -> None:
    page = out / f"{results.setting.model.rpartition('/')[2]}.html"
    write_page(results, page)
    print_line(f"{len(results.cells)} cells; the page is {page}")


def _page_writer() -> PageWriter:
    """The function that draws the page. Raises StudyError before hours of measuring if a library is missing."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise StudyError(f"a study needs {' and '.join(missing)} to draw its page: pip install 'ace-triton[study]'")
    from ..study.page import write_page

    return write_page


def _variant(word: str) -> Cell:
    method, _, options = word.partition(":")
    return Cell(Recipe(method, parse_options(method, options.split("+") if options else None)))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise ArgumentError(f"{option} {text!r}: write whole numbers of 2 or more, separated by commas")
    return tuple(map(int, words))


def _minutes(text: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in _words(text or ""))
    except ValueError:
        found = (math.nan,)
    if not all(0 < minutes < math.inf for minutes in found):
        raise ArgumentError(f"--minutes {text!r}: write numbers above 0, separated by commas")
    return found
