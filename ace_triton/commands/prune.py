"""``ace-triton prune``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..budgets import check_budgets
from ..calibration_report import report_on
from ..errors import ArgumentError
from ..inputs import checkpoint
from ..inputs.calibration import SELF, load_calibration, read_calibration
from ..methods.registry import metric_names
from ..model_report import Sequential
from ..packed.checkpoint import save_packed
from ..packed.manifest import DTYPES as PACKED_DTYPES
from ..packed.pack_model import sparsify
from ..presets import DEFAULT_PRESET, PRESETS, Preset
from ..progress import progress_bar, stage
from ..provenance import option_facts, source_facts, with_provenance
from ..prune_blocks import prune_model, rehearse
from ..recipe import Request
from ..solvers.update import Update
from ..sparsity import Sparsity
from . import report
from .console import console, print_backend, print_line, print_warning, progress_bars
from .options import (
    NO_UPDATE,
    TEXT_SOURCES,
    BosOption,
    DeviceOption,
    DtypeOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    OverwriteOption,
    PluginOption,
    SeedOption,
    SourceArgument,
    TrustOption,
    check_json,
    number,
    parse_device,
    parse_dtype,
    parse_options,
    parse_update,
)
from .sources import check_length, check_source

_PRESETS = "; ".join(f"{name}: {preset.words}" for name, preset in PRESETS.items())
_UPDATE_OPTIONS = ", ".join(Update.types())


def prune(
    src: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned model.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Recipe ({_PRESETS}, with more rounds, layer by layer); other options replace its parts.",
            show_default=f"{DEFAULT_PRESET}; with --method, that method alone",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"Metric that scores the weights, one of {', '.join(metric_names())}; alone unless you add to it.",
            show_default=f"{PRESETS[DEFAULT_PRESET].method}, as part of the preset",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Option of the method; 'ace-triton methods' lists them all; repeatable.",
            show_default="the method's defaults",
        ),
    ] = None,
    plugin: PluginOption = None,
    sparsity: Annotated[
        str, typer.Option(help="Pattern n:m, which keeps n of every m weights, or the pruned fraction, as 0.5.")
    ] = "2:4",
    scope: Annotated[
        str, typer.Option(help="Where a fraction holds: in every 'row' of a weight, or in the 'layer' as a whole.")
    ] = "row",
    permute: Annotated[
        bool | None,
        typer.Option(
            "--permute/--no-permute",
            help="Reorder channels first, at no cost when the model runs; for n:m only.",
            show_default="the preset's",
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            help="Update of the kept weights: 'lstsq' fits them to the dense outputs by least squares, 'rescale' "
            f"restores the energy of each output, '{NO_UPDATE}' leaves them.",
            show_default="the preset's",
        ),
    ] = None,
    update_option: Annotated[
        list[str] | None,
        typer.Option(
            "--update-option",
            "-u",
            metavar="NAME=VALUE",
            help=f"Option of the update 'lstsq', one of {_UPDATE_OPTIONS}; repeatable.",
            show_default="the update's defaults",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Let blocks keep different shares, with the same total: 'outliers' gives more to blocks with more "
            "outlying scores.",
            show_default="the same share in all blocks",
        ),
    ] = None,
    sequential: Annotated[
        Sequential | None,
        typer.Option(
            help="Unit to prune before the model runs again on its pruned weights: 'blocks', one block; 'layers', the "
            "layers of a block that share an input; 'none', the whole model at once, in about half the time.",
            show_default="the preset's",
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help=f"Calibration text: {TEXT_SOURCES.format(half='calibration')} (Python's manual), or '{SELF}' for "
            "text that the model writes."
        ),
    ] = "allenai/c4:en",
    samples: Annotated[int, number("Number of calibration sequences.", least=1)] = 128,
    length: Annotated[int, number("Length of a calibration sequence, in tokens.", least=2)] = 128,
    seed: SeedOption = 0,
    bos: BosOption = "auto",
    batch_size: Annotated[
        int | None,
        number("Number of sequences in one forward.", least=1, show_default="as many as make about 2,048 tokens"),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Write a packed checkpoint, as 'ace-triton pack' does; for n:m only."),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Prune SRC and write it to OUT: a dense checkpoint with zeros that transformers loads, or a packed one.

    Without options this is wanda with channels permuted and weights updated by least squares, which measures best for
    its time. A method that you name runs alone; --preset, --permute and --update add to it.
    """
    pattern = Sparsity(sparsity, scope=scope)  # type: ignore[arg-type]
    recipe = _recipe(
        preset,
        method,
        pattern,
        permute=permute,
        update=update,
        update_option=update_option,
        sequential=sequential,
    )
    request = Request.of(recipe.method, pattern, recipe.update, parse_options(recipe.method, option))
    request.check_permute(recipe.permute, recipe.sequential)
    check_budgets(budgets, pattern)
    needs_text = request.needs.tokens or budgets is not None
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    if packed:
        _check_packed(pattern, torch.float32 if dtype == "auto" else weights_dtype)
    rehearse(request)
    check_json(json)
    checkpoint.check_out(out, overwrite=overwrite)
    check_source(src)
    if needs_text:
        check_length(src, length, "--length")
    documents = read_calibration(calibration) if needs_text else None
    print_backend(where)
    with checkpoint.reserved(out, overwrite=overwrite), progress_bars() as progress:
        started = time.perf_counter()
        with stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(
                src, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code, own_memory=packed
            )
        load_seconds = time.perf_counter() - started
        if packed:
            _check_packed(pattern, model.dtype)
        sequences = calibrated = None
        if documents is not None:
            sequences = load_calibration(
                documents,
                tokenizer,
                samples=samples,
                length=length,
                seed=seed,
                model=model,
                bos=bos,
                progress=progress_bar(progress, "calibration text"),
            )
            with stage(progress, "check the calibration text"):
                calibrated = report_on(sequences, model, calibration)
        result = prune_model(
            model,
            sequences,
            recipe.method,
            pattern,
            sequential=recipe.sequential,
            permute=recipe.permute,
            update=request.update,
            budgets=budgets,
            batch_size=batch_size,
            include=include or None,
            exclude=exclude or None,
            progress=progress_bar(progress, "prune"),
            **request.options,
        )
        seconds = dataclasses.replace(result.seconds, load=load_seconds, total=result.seconds.total + load_seconds)
        result = dataclasses.replace(result, seconds=seconds)
        found = {} if calibrated is None else {"calibration_report": {**calibrated.to_dict(), "seed": seed}}
        facts = with_provenance(
            result.to_dict(),
            **source_facts(src, out),
            **found,
            options=option_facts(request.options),
            scope=pattern.scope,
            permute=recipe.permute,
            include=include or None,
            exclude=exclude or None,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )
        with stage(progress, "save the model"):
            if packed:
                packing = sparsify(model)
                save_packed(model, tokenizer, out, report=facts, overwrite=overwrite)
            else:
                checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
    if json:
        report.write_json(json, facts)
    console.print(report.prune_table(result))
    if calibrated is not None:
        for line in calibrated.lines():
            print_line(line)
        for line in calibrated.warnings():
            print_warning(line)
    for line in report.skipped_lines(result):
        print_line(f"left dense: {line}")
    for line in report.unfolded_lines(result):
        print_line(f"not reordered: {line}")
    if packed:
        console.print(report.packing_table(packing))
    print_line(f"written to {out}")


def _recipe(
    preset: str | None,
    method: str | None,
    pattern: Sparsity,
    *,
    permute: bool | None,
    update: str | None,
    update_option: list[str] | None,
    sequential: Sequential | None,
) -> Preset:
    """The preset that is asked for, with the parts that other options replace.

    A method that is named without a preset runs alone; a preset's permutation holds for n:m only.
    """
    if preset not in (None, *PRESETS):
        raise ArgumentError(f"--preset {preset!r}: use one of {', '.join(PRESETS)}")
    usual = Preset(method) if method is not None and preset is None else PRESETS[preset or DEFAULT_PRESET]
    return Preset(
        method or usual.method,
        permute=usual.permute and pattern.n is not None if permute is None else permute,
        update=parse_update(update, update_option, usual.update),
        sequential=sequential or usual.sequential,
    )


def _check_packed(pattern: Sparsity, dtype: Any) -> None:
    """ValueError if a model pruned so could not be packed."""
    if pattern.n is None or pattern.m is None:
        raise ArgumentError(f"--packed needs groups, as --sparsity 2:4; {pattern} has none")
    if dtype not in PACKED_DTYPES.values():
        raise ArgumentError(f"--packed: packed checkpoints hold {', '.join(PACKED_DTYPES)}, the model is {dtype}")
    # Layout 1 holds n values and a bit for each of the m weights.
    if pattern.n * dtype.itemsize + pattern.m / 8 >= pattern.m * dtype.itemsize:
        raise ArgumentError(f"--packed: {pattern} packed is no smaller than dense; keep fewer of every {pattern.m}")
