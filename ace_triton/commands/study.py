"""``ace-triton study``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..study.cells import Grid, Variant
from ..study.journal import Journal, Results, StudyError, read_results
from ..study.run import run_study
from ..study.workbench import Protocol, Workbench
from .console import console, progress_bars
from .options import DeviceOption, parse_device, parse_dtype, parse_options

METHODS = "magnitude,wanda,ria,cosp,varp,ace"


def study(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub name, .gguf file or smollm2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the results and the page; resumed if there.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated; with options as ace:base=wanda+reduce=abs.", show_default=METHODS)
    ] = METHODS,
    sparsities: Annotated[str | None, typer.Option(help="Comma-separated.", show_default="0.5,2:4,4:8")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a calibration sequence.", show_default="16,32,128,512,2048")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many calibration seeds.", show_default="3")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of the evaluation.", show_default="20")] = None,
    window_length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    calibration: Annotated[str, typer.Option(help="As for prune.")] = Protocol.calibration,
    evaluation: Annotated[str, typer.Option(help="As --text of evaluate.")] = Protocol.evaluation,
    wikitext: Annotated[bool, typer.Option("--wikitext", help="As for evaluate.")] = False,
    dtype: Annotated[str, typer.Option(help="Of weights and forwards; statistics are float32.")] = "bfloat16",
    device: DeviceOption = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A small study where nothing else is said: 2:4, L 16 and 32, one seed.")
    ] = False,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Only draw the page anew from the results in OUT.")
    ] = False,
) -> None:
    """Prune MODEL by many methods, calibration lengths and seeds, and show it all on one page in OUT.

    What OUT holds already is not run again: a stopped study goes on where it was, and other --lengths or
    --seeds add to it.
    """
    _check_installed()
    if render_only:
        _render(read_results(out), out)
        return
    grid = Grid(
        variants=tuple(_variant(word) for word in _words(methods)),
        sparsities=_words(sparsities or ("2:4" if quick else "0.5,2:4,4:8")),
        lengths=_numbers("--lengths", lengths or ("16,32" if quick else "16,32,128,512,2048")),
        seeds=tuple(range(seeds if seeds is not None else 1 if quick else 3)),
    )
    protocol = Protocol(
        model,
        calibration=calibration,
        evaluation=evaluation,
        wikitext=wikitext,
        samples=samples if samples is not None else 32 if quick else 128,
        windows=windows if windows is not None else 4 if quick else 20,
        window_length=window_length,
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
                )
            except KeyboardInterrupt:
                console.print("stopped; the same command goes on from here", highlight=False)
            _render(journal.results, out)


def _render(results: Results, out: Path) -> None:
    from ..study.page import write_page

    page = out / f"{results.setting.model.rpartition('/')[2]}.html"
    write_page(results, page)
    console.print(f"{len(results.cells)} cells; the page is {escape(str(page))}", soft_wrap=True, highlight=False)


def _check_installed() -> None:
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise StudyError(f"a study draws its page with {' and '.join(missing)}: pip install 'ace-triton[study]'")


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
