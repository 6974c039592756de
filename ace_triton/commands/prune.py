"""``ace-triton prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..inputs.calibration import SELF
from ..methods.registry import metric_names
from ..presets import DEFAULT_PRESET, PRESETS
from ..processes import joined
from ..recipe import Sequential
from ..solvers.quantize import GROUP, Rule
from ..solvers.update import Update
from . import report
from .console import console, print_backend, print_line, print_note, print_warning, progress_bars
from .options import (
    NO_UPDATE,
    TEXT_SOURCES,
    AllBitsOption,
    AudioOption,
    BitsOption,
    BosOption,
    DenseBitsOption,
    DeviceOption,
    DtypeOption,
    EmbeddingBitsOption,
    ExcludeOption,
    GroupOption,
    HeadBitsOption,
    ImagesOption,
    IncludeOption,
    JsonOption,
    OffloadOption,
    OverwriteOption,
    PluginOption,
    SeedOption,
    SourceArgument,
    TaskOption,
    TrustOption,
    number,
    parse_device,
)
from .plan_run import run_from, show_plan
from .prune_run import PruneResults
from .recipe_file import CalibrationSettings
from .recipe_flags import replaced_lines
from .sources import print_if_unrecorded

_PRESETS = "; ".join(f"{name}: {preset.words}" for name, preset in PRESETS.items())
_DEFAULTS = CalibrationSettings()
_UPDATE_OPTIONS = ", ".join(Update.types())


def prune(
    context: typer.Context,
    src: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned model.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Recipe by name ({_PRESETS}); other options replace its parts.",
            show_default=f"{DEFAULT_PRESET}; with --method, that method alone",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recipe to repeat: a recipe's JSON file, or the ace_triton.json beside a pruned model, whose "
            "calibration, --dtype and --task are repeated too; other options replace its parts.",
            show_default="no file",
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
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Rotate the values of attention heads first, so that less importance is pruned, at no cost when the "
            "model runs.",
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
    bits: BitsOption = None,
    group: GroupOption = GROUP,
    quantize: Annotated[
        Rule | None,
        typer.Option(
            help="Rule for --bits: 'gptq' changes weights to make up for the rounding of others, by the calibration "
            "text; 'absmax' rounds each weight alone.",
            show_default="gptq",
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
    ] = _DEFAULTS.text,
    images: ImagesOption = None,
    audio: AudioOption = None,
    task: TaskOption = None,
    samples: Annotated[
        int, number("Number of calibration sequences, images or audio files.", least=1)
    ] = _DEFAULTS.samples,
    length: Annotated[int, number("Length of a calibration sequence, in tokens.", least=2)] = _DEFAULTS.length,
    seed: SeedOption = _DEFAULTS.seed,
    bos: BosOption = _DEFAULTS.bos,
    batch_size: Annotated[
        int | None,
        number(
            "Number of sequences in one forward.",
            least=1,
            show_default="as many as make about 2,048 tokens, or 16,384 on a GPU",
        ),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    packed: Annotated[
        bool | None,
        typer.Option(
            "--packed/--no-packed",
            help="Write a packed checkpoint, as 'ace-triton pack' does; for n:m, or a fraction of at least 0.44.",
            show_default="packed if the file of --recipe names bits for --packed, else dense",
        ),
    ] = None,
    head_bits: HeadBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    dense_bits: DenseBitsOption = None,
    all_bits: AllBitsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Keep the weights in files and only one block in memory; if interrupted, the same command resumes.",
            show_default="if the model does not fit in memory",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted streamed run has left, and start again.")
    ] = False,
    offload: OffloadOption = "memory",
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, as 'ace-triton plan' does; write nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Prune SRC and write it to OUT: a dense checkpoint with zeros that transformers loads, or a packed one.

    Without options this is wanda with channels permuted and weights updated by least squares, which measures best for
    its time. A method that you name runs alone; --preset, --rotate, --permute and --update add to it. SRC may be any
    model that an AutoModel class of transformers loads; OUT loads with the same class. OUT/ace_triton.json holds the
    recipe, the calibration settings and the bits of a packed model, which --recipe repeats. --packed takes the bits of
    weights that stay dense, as --head-bits 8. Several processes share the work, and write the same
    bytes as one: torchrun --nproc-per-node 4 -m ace_triton prune SRC OUT.
    """
    if dry_run:
        show_plan(context)
        return
    run, saved = run_from(context)
    settings, documents = run.read_text()
    if recipe is not None and saved is not None:
        for line in replaced_lines(recipe, saved, run, settings):
            print_note(line)
    print_backend(parse_device(device))
    with joined() as processes, progress_bars() as progress:
        results = run.run(progress, settings, documents)
    if not processes.is_first:
        return
    if json:
        packing = {} if results.packing is None else {"packing": results.packing.to_dict()}
        report.write_json(json, {**results.facts, **packing})
    _print(results)
    print_line(f"written to {out}")
    print_if_unrecorded(results.facts, out)


def _print(results: PruneResults) -> None:
    console.print(report.prune_table(results.report))
    if results.calibration is not None:
        for line in results.calibration.lines():
            print_line(line)
        for line in results.calibration.warnings():
            print_warning(line)
    for line in report.skipped_lines(results.report.skipped):
        print_line(f"left dense: {line}")
    for line in report.tower_lines(results.report):
        print_line(line)
    if results.outside:
        print_line(f"left dense: {report.outside_line(results.outside)}")
    for line in report.unrotated_lines(results.report):
        print_line(f"not rotated: {line}")
    for line in report.unfolded_lines(results.report):
        print_line(f"not reordered: {line}")
    if results.packing is not None:
        console.print(report.packing_table(results.packing))
        pruned = {layer.name for layer in results.report.layers}
        for line in report.skipped_lines(results.packing.skipped_of(pruned)):
            print_line(f"pruned, but not packed: {line}")
