"""``ace-triton shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration_report import CalibrationReport
from ..evaluate import check_windows
from ..inputs import checkpoint
from ..inputs.calibration import SELF
from ..inputs.text import check_text
from ..structures.settings import CHOICES, METHODS, UPDATES, ShrinkSettings
from . import report
from .console import console, print_backend, print_line, print_note, print_warning, progress_bars
from .options import (
    TEXT_SOURCES,
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OffloadOption,
    OverwriteOption,
    SeedOption,
    SourceArgument,
    TrustOption,
    WikitextOption,
    check_json,
    number,
    parse_device,
    parse_dtype,
)
from .recipe_file import CalibrationSettings
from .shrink_run import Evaluation, ShrinkRun
from .shrink_settings import ShrinkWords
from .shrink_table import shrink_table
from .sources import check_can_shrink, check_causal, check_length, check_source, print_if_unrecorded

_DEFAULTS, _SETTINGS = CalibrationSettings(), ShrinkSettings()
_METHODS = "; ".join(f"{name}: {method.words}" for name, method in METHODS.items())
_UPDATES = "; ".join(f"'{name}': {words}" for name, words in UPDATES.items())


def shrink(
    context: typer.Context,
    src: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the smaller model.")],
    ratio: Annotated[
        float, number("Least share of the blocks' parameters to remove.", above=0, below=1)
    ] = _SETTINGS.ratio,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Largest size of the checkpoint that is written, as 300MB or 1.5GiB, instead of --ratio.",
            show_default="that of --ratio",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        number(
            "How many times as fast a block must run on one token, measured here, instead of --ratio.",
            above=1,
            show_default="that of --ratio",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"Method that ranks the structures ({_METHODS}).")] = _SETTINGS.method,
    update: Annotated[
        str | None,
        typer.Option(
            help=f"Update of the kept weights, which make up for what is removed ({_UPDATES}).",
            show_default="that of the method's published form; lstsq for saap",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings to repeat: the ace_triton.json beside a model that this command made; other options replace "
            "its parts.",
            show_default="no file",
        ),
    ] = None,
    multiple: Annotated[
        int, number("The feed-forward width that is left is a multiple of this.", least=1)
    ] = _SETTINGS.multiple,
    groups: Annotated[
        int | None,
        number(
            "Number of key-value groups to remove from each block, with their query heads.",
            least=0,
            show_default="the number with the lowest loss on the calibration text",
        ),
    ] = None,
    experts: Annotated[
        str,
        typer.Option(
            help="Part of a mixture that is removed: 'whole' experts, or 'channels' inside all, equally many of each."
        ),
    ] = _SETTINGS.experts,
    widths: Annotated[
        str,
        typer.Option(
            help="Feed-forward widths: 'equal' in all blocks; or 'uneven', by one ranking over all blocks, which "
            "ace-triton loads, and other programs do not."
        ),
    ] = _SETTINGS.widths,
    importance: Annotated[
        str,
        typer.Option(help="Importance for saap: 'activations', or 'taylor' as in the paper, with gradients."),
    ] = _SETTINGS.importance,
    fusion: Annotated[
        str, typer.Option(help=f"Fusion of the two importances for saap, one of {', '.join(CHOICES['fusion'])}.")
    ] = _SETTINGS.fusion,
    stability: Annotated[
        bool, typer.Option(help="For saap, rank structures lower if their importance changes between batches.")
    ] = _SETTINGS.stability,
    terms: Annotated[
        str, typer.Option(help=f"Taylor terms for llm-pruner, one of {', '.join(CHOICES['terms'])}.")
    ] = _SETTINGS.terms,
    calibration: Annotated[
        str,
        typer.Option(
            help=f"Calibration text: {TEXT_SOURCES.format(half='calibration')} (Python's manual), or '{SELF}' for "
            "text that the model writes."
        ),
    ] = _DEFAULTS.text,
    samples: Annotated[int, number("Number of calibration sequences.", least=1)] = _DEFAULTS.samples,
    length: Annotated[int, number("Length of a calibration sequence, in tokens.", least=2)] = _DEFAULTS.length,
    seed: SeedOption = _DEFAULTS.seed,
    bos: BosOption = _DEFAULTS.bos,
    evaluation: Annotated[
        str | None,
        typer.Option(
            help="Text on which to measure the perplexity before and after, as for 'evaluate --text'.",
            show_default="no text",
        ),
    ] = None,
    windows: Annotated[int, number("Number of windows of the evaluation text.", least=1)] = 20,
    window_length: Annotated[int, number("Length of a window, in tokens.", least=2)] = 512,
    wikitext: WikitextOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Keep the weights in files and only one block in memory; if interrupted, the same command resumes. "
            "Runs on the CPU.",
            show_default="if the model does not fit in memory",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted streamed run has left, and start again.")
    ] = False,
    offload: OffloadOption = "memory",
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be removed, and what size, memory and time it would take; load the model, and "
            "write nothing.",
        ),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Remove channels, attention heads, experts or blocks from SRC, and write a smaller dense model to OUT.

    OUT is an ordinary checkpoint with the same widths in every layer, unless --widths uneven is given: transformers
    loads it with from_pretrained, and other engines run it faster. Prune it to n:m afterwards with 'ace-triton prune',
    or train it toward SRC with 'ace-triton recover'.
    """
    words = ShrinkWords.of(context)
    settings = words.settings
    check_json(json)
    check_windows(window_length, windows)
    weights_dtype, where = parse_dtype(dtype), parse_device("cpu" if stream and device == "auto" else device)
    if not dry_run:
        checkpoint.check_out(out, overwrite=overwrite)
    check_source(src)
    if evaluation is not None:
        check_text(evaluation)
    check_causal(src, "shrink", "prune it to n:m with 'ace-triton prune'", trust_remote_code=trust_remote_code)
    check_can_shrink(src, trust_remote_code=trust_remote_code)
    streams = ShrinkRun.streams(
        src,
        out,
        settings,
        weights_dtype,
        where,
        stream=stream,
        restart=restart,
        offload=offload,
        dry_run=dry_run,
    )
    if settings.needs_text:
        check_length(src, words.calibration.length, "--length")
    if evaluation is not None:
        check_length(src, window_length, "--window-length")
    text, documents = words.read_text()
    run = ShrinkRun(
        src,
        out,
        settings,
        text,
        documents,
        None if evaluation is None else Evaluation(evaluation, wikitext, windows, window_length),
        weights_dtype,
        where,
        trust_remote_code,
        overwrite,
        streams,
        restart,
        offload,
        dry_run,
    )
    print_backend(where)
    with progress_bars() as progress:
        results = run.run(progress)
    if json:
        report.write_json(json, results.facts)
    console.print(shrink_table(results.report, results.measured))
    _print_notes(results.report.refused, results.report.notes, results.calibrated)
    run.warn_if_too_large(results.report)
    print_line("nothing was written (--dry-run)" if dry_run else f"written to {out}")
    if not dry_run:
        print_if_unrecorded(results.facts, out)


def _print_notes(refused: Any, notes: Any, calibrated: CalibrationReport | None) -> None:
    for kind, reason in refused.items():
        print_line(f"kept: {kind}: {reason}")
    for note in notes:
        print_note(note)
    if calibrated is not None:
        for line in calibrated.lines():
            print_line(line)
        for warning in calibrated.warnings():
            print_warning(warning)
