"""``ace-triton study``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..study.cells import Grid, Variant
from ..study.command_line import without_folders
from ..study.journal import Journal, Results, StudyError, read_results
from ..study.recipes_grid import RecipesGrid
from ..study.run import run_study
from ..study.workbench import Protocol, Workbench
from .console import console, progress_bars
from .options import DeviceOption, parse_device, parse_dtype, parse_options

PageWriter = Callable[[Results, Path], None]


@dataclass(frozen=True)
class Defaults:
    """What a study takes where nothing else is said, as on the command line."""

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
    """For a help page: the default, and that of ``--quality`` where it is another."""
    paper, quality = getattr(PAPER, name), getattr(QUALITY, name)
    return str(paper) if paper == quality else f"{paper}; {quality} with --quality"


def study(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, .gguf file or smollm2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results and the page; resumed if there.")],
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Compare perplexity with time instead: the metrics alone, and at 2:4 also SparseGPT, and the last of "
            "--methods with channels permuted and weights updated.",
        ),
    ] = False,
    minutes: Annotated[
        str | None,
        typer.Option(
            help="With --quality: also recovery for so many minutes, as 5,20, on top of the best.", show_default="none"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; with options as ace:base=wanda+reduce=abs.", show_default=_default("methods")
        ),
    ] = None,
    sparsities: Annotated[
        str | None, typer.Option(help="Comma-separated.", show_default=_default("sparsities"))
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a calibration sequence.", show_default=_default("lengths"))
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many calibration seeds.", show_default=_default("seeds"))
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences.", show_default=_default("samples"))
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows of the evaluation.", show_default=_default("windows"))
    ] = None,
    window_lengths: Annotated[
        str | None,
        typer.Option(
            "--window-lengths",
            "--window-length",
            help="Tokens of each; of a list the first counts --windows, further ones are run over the same tokens.",
            show_default=_default("window_lengths"),
        ),
    ] = None,
    calibration: Annotated[str, typer.Option(help="As for prune.")] = Protocol.calibration,
    evaluation: Annotated[str, typer.Option(help="As --text of evaluate.")] = Protocol.evaluation,
    wikitext: Annotated[bool, typer.Option("--wikitext", help="As for evaluate.")] = False,
    dtype: Annotated[str, typer.Option(help="Of weights and forwards; statistics are float32.")] = "bfloat16",
    device: DeviceOption = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small study where nothing else is said: 2:4, L up to 32, one seed.")
    ] = False,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Only draw the page anew from the results in OUT.")
    ] = False,
) -> None:
    """Prune MODEL by many methods, calibration lengths and seeds, and show it all on one page in OUT.

    What OUT holds already is not run again: a stopped study goes on where it was, and other --lengths or
    --seeds add to it.
    """
    write_page = _page_writer()
    if render_only:
        _render(write_page, read_results(out), out)
        return
    if minutes and not quality:
        raise ValueError("--minutes is for --quality: recovery goes on from what that measures")
    usual = (QUALITY_QUICK if quick else QUALITY) if quality else (PAPER_QUICK if quick else PAPER)
    variants = tuple(_variant(word) for word in _words(methods or usual.methods))
    patterns = _words(sparsities or usual.sparsities)
    calibrated = _numbers("--lengths", lengths or usual.lengths)
    drawn = tuple(range(seeds if seeds is not None else usual.seeds))
    grid = (
        RecipesGrid(variants, patterns, calibrated, drawn, _floats("--minutes", minutes or ""))
        if quality
        else Grid(variants, patterns, calibrated, drawn)
    )
    window_length, *further = _numbers("--window-lengths", window_lengths or usual.window_lengths)
    protocol = Protocol(
        model,
        calibration=calibration,
        evaluation=evaluation,
        wikitext=wikitext,
        samples=samples if samples is not None else usual.samples,
        windows=windows if windows is not None else usual.windows,
        window_length=window_length,
        further_window_lengths=tuple(further),
        dtype=parse_dtype(dtype),
        device=parse_device(device),
    )
    with progress_bars() as progress:
        task = progress.add_task("load the model", total=None)
        bench = Workbench(protocol)
        with Journal(out, bench.setting) as journal:
            try:
                run_study(
                    bench,
                    journal,
                    grid,
                    lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
                    without_folders(sys.argv),
                )
            except KeyboardInterrupt:
                console.print("stopped; the same command goes on from here", highlight=False)
            _render(write_page, journal.results, out)


def _render(write_page: PageWriter, results: Results, out: Path) -> None:
    page = out / f"{results.setting.model.rpartition('/')[2]}.html"
    write_page(results, page)
    console.print(f"{len(results.cells)} cells; the page is {escape(str(page))}", soft_wrap=True, highlight=False)


def _page_writer() -> PageWriter:
    """What draws the page, loaded before hours of measuring begin; StudyError where what it draws with is missing."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise StudyError(f"a study draws its page with {' and '.join(missing)}: pip install 'ace-triton[study]'")
    from ..study.page import write_page

    return write_page


def _variant(word: str) -> Variant:
    method, _, options = word.partition(":")
    return Variant(method, tuple(parse_options(options.split("+") if options else None).items()))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise ValueError(f"{option} {text!r}: write whole numbers with commas between them") from None


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers with commas between them") from None
