"""``ace-triton shrink``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from ..calibration_report import CalibrationReport, report_on
from ..errors import ArgumentError
from ..evaluate import Perplexity, check_windows, perplexity
from ..formats.registry import save_model
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.calibration import SELF, load_calibration
from ..inputs.text import check_text, read_documents, wikitext_rows
from ..planning.pruning_plan import gib
from ..progress import progress_bar, stage
from ..provenance import history_with, source_facts, with_provenance
from ..streaming.fits import LARGEST_SHARE, available_memory
from ..structures.report import ShrinkReport
from ..structures.settings import CHOICES, METHODS, UPDATES, ShrinkSettings
from ..structures.shrink import shrink_model
from . import report
from .console import console, print_backend, print_line, print_note, print_warning, progress_bars
from .options import (
    TEXT_SOURCES,
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
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
from .shrink_settings import ShrinkWords
from .shrink_table import shrink_table
from .sources import check_causal, check_length, check_memory, check_source

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

    OUT is an ordinary checkpoint with the same widths in every layer: transformers loads it with from_pretrained, and
    other engines run it faster. Prune it to n:m afterwards with 'ace-triton prune', or train it toward SRC with
    'ace-triton recover'.
    """
    words = ShrinkWords.of(context)
    settings = words.settings
    check_json(json)
    check_windows(window_length, windows)
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    if not dry_run:
        checkpoint.check_out(out, overwrite=overwrite)
    check_source(src)
    check_causal(src, "shrink", "prune it to n:m with 'ace-triton prune'", trust_remote_code=trust_remote_code)
    if (pattern := (checkpoint.read_report(src) or {}).get("sparsity")) is not None:
        raise ArgumentError(
            f"{src} is pruned to {pattern}, which does not outlive the removal of channels: shrink the dense model, "
            "then prune the result"
        )
    check_memory(src, _times_the_weights(settings, dry_run=dry_run), "shrink", weights_dtype)
    if settings.needs_text:
        check_length(src, words.calibration.length, "--length")
    if evaluation is not None:
        check_length(src, window_length, "--window-length")
        check_text(evaluation)
    text, documents = words.read_text()
    print_backend(where)
    with ExitStack() as running:
        if not dry_run:
            running.enter_context(checkpoint.reserved(out, overwrite=overwrite))
        progress = running.enter_context(progress_bars())
        with stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(
                src, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code, own_memory=True
            )
        beginning = Beginning.of(tokenizer, text.bos)
        ids = None if evaluation is None else _evaluation_ids(evaluation, wikitext, tokenizer, beginning)
        sequences, calibrated = None, None
        if documents is not None:
            sequences = load_calibration(
                documents,
                tokenizer,
                samples=text.samples,
                length=text.length,
                seed=text.seed,
                model=model,
                bos=text.bos,
                progress=progress_bar(progress, "calibration text"),
            )
            with stage(progress, "check the calibration text"):
                calibrated = report_on(sequences, model, text.text)
        result = shrink_model(model, sequences, settings=settings, dry_run=dry_run, progress=_bars(progress))
        measured = {}
        for which, of in (("before", model), ("after", result.model)) if result.model is not None else ():
            if ids is not None:
                bar = progress_bar(progress, f"evaluate {which}")
                measured[which] = perplexity(
                    of, ids, length=window_length, windows=windows, beginning=beginning, progress=bar
                )
        facts = with_provenance(
            {"shrink": result.report.to_dict()},
            **source_facts(src, out),
            calibration=None if calibrated is None else text.to_dict(),
            calibration_report=None if calibrated is None else {**calibrated.to_dict(), "seed": text.seed},
            perplexity={which: found.to_dict() for which, found in measured.items()} or None,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            history=history_with(checkpoint.read_report(src), "shrink", **_step(result.report, measured)),
        )
        if result.model is not None:
            with stage(progress, "save the model"):
                save_model(result.model, tokenizer, out, report=facts, overwrite=overwrite)
    if json:
        report.write_json(json, facts)
    console.print(shrink_table(result.report, measured))
    _print_notes(result.report.refused, result.report.notes, calibrated)
    if (estimate := result.report.estimate) is not None:
        more, available = estimate.peak_bytes - estimate.weight_bytes, available_memory()
        if more > LARGEST_SHARE * available:
            print_warning(
                f"the run needs about {gib(more)} beside the loaded model, {gib(available)} are available, and it does "
                "not stream: use a machine with more memory"
            )
    print_line("nothing was written (--dry-run)" if dry_run else f"written to {out}")


def _times_the_weights(settings: ShrinkSettings, *, dry_run: bool) -> float:
    """Bytes that a run needs for each byte of the weights, at most."""
    if settings.needs_gradients:
        return 8
    if dry_run:
        return 2
    return 3 if settings.chosen_update == "none" else 4


def _step(report: ShrinkReport, measured: Mapping[str, Perplexity]) -> dict[str, Any]:
    """What a run did, cost and brought, for the history."""
    settings = report.settings
    return {
        "did": ", ".join([settings.method, *([settings.chosen_update] * (settings.chosen_update != "none"))]),
        "seconds": sum(report.seconds.values()),
        "parameters": [report.model_before, report.model_after],
        "bytes": [report.bytes_before, report.bytes_after],
        "perplexity": [measured[which].perplexity for which in ("before", "after")] if measured else None,
    }


def _bars(progress: Progress) -> Callable[[str, int, int], None]:
    """A function that shows a stage's progress, with one bar for each stage."""
    bars: dict[str, Callable[..., None]] = {}

    def move(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = progress_bar(progress, name)
        bars[name](done, total)

    return move


def _evaluation_ids(source: str, wikitext: bool, tokenizer: Any, beginning: Beginning) -> Any:
    documents = read_documents(source)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    return text_ids("\n\n".join(documents), tokenizer, beginning)


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
