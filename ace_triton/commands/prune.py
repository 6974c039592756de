"""``ace-triton prune``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import checkpoint, report
from ..budgets import check_budgets
from ..calibration import load_calibration
from ..metrics import metric_names
from ..packed_checkpoint import save_packed
from ..progress import progress_bar, stage
from ..prune_model import Sequential, prune_model
from ..request import Request
from ..sparsify import sparsify
from ..sparsity import Sparsity
from .console import console, progress_bars
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    OverwriteOption,
    TrustOption,
    check_json,
    parse_device,
    parse_dtype,
    parse_options,
    parse_update,
)


def prune(
    src: Annotated[str, typer.Argument(help="Checkpoint folder, hub name, .gguf file, or 'smollm2'.")],
    out: Annotated[Path, typer.Argument(help="Folder for the pruned model.")],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(metric_names())}.")] = "ace",
    sparsity: Annotated[str, typer.Option(help="n:m (n of every m kept) or the pruned fraction.")] = "2:4",
    scope: Annotated[str, typer.Option(help="For a fraction: 'row' or 'layer' loses its share.")] = "row",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text or .jsonl file (also .gz), dataset name[:config[:split]], 'pydoc:calibration', or 'self' "
            "(the model writes its own)."
        ),
    ] = "allenai/c4:en",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the calibration crops.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a forward; left out, about 2,048 tokens' worth.")
    ] = None,
    sequential: Annotated[
        Sequential,
        typer.Option(
            help="What is pruned between two looks at the model: 'none' (all at once, in half the time), 'blocks', or "
            "the 'layers' of a block that share an input."
        ),
    ] = "blocks",
    permute: Annotated[
        bool,
        typer.Option(
            "--permute", help="For n:m: first reorder channels, where it costs nothing, so that less is lost."
        ),
    ] = False,
    include: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No layers whose name matches (repeatable).")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, name=value (repeatable).")
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            help="'rescale': give each output the energy it had; 'lstsq': move the kept weights to where they best "
            "reproduce the dense outputs."
        ),
    ] = None,
    update_option: Annotated[
        list[str] | None,
        typer.Option("--update-option", "-u", help="An option of the update, as mask_rounds=12 (repeatable)."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="'outliers' lets blocks with more outlying scores keep more (of n:m one of every m), the total kept."
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Write a packed checkpoint (n:m only), as ace-triton pack does.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Prune SRC and write the result, a dense checkpoint with zeros that transformers loads, to OUT."""
    pattern = Sparsity(sparsity, scope=scope)  # type: ignore[arg-type]
    request = Request.of(method, pattern, parse_update(update, update_option), parse_options(option))
    if packed and pattern.n is None:
        raise ValueError(f"--packed needs groups, as --sparsity 2:4; {sparsity!r} has none")
    check_budgets(budgets, pattern)
    check_json(json)
    checkpoint.check_out(out, overwrite=overwrite)
    with checkpoint.reserved(out, overwrite=overwrite), progress_bars() as progress:
        started = time.perf_counter()
        with stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(
                src,
                dtype=parse_dtype(dtype),
                device=parse_device(device),
                trust_remote_code=trust_remote_code,
                own_memory=packed,
            )
        load_seconds = time.perf_counter() - started
        sequences = None
        if request.needs.tokens or budgets:
            with stage(progress, "calibration text"):
                sequences = load_calibration(
                    calibration, tokenizer, samples=samples, length=length, seed=seed, model=model
                )
        result = prune_model(
            model,
            sequences,
            method,
            pattern,
            sequential=sequential,
            permute=permute,
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
        facts = {**result.to_dict(), "source": str(Path(src).absolute()) if Path(src).exists() else src}
        with stage(progress, "save the model"):
            if packed:
                packing = sparsify(model)
                save_packed(model, tokenizer, out, report=facts, overwrite=overwrite)
            else:
                checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.prune_table(result))
    for line in report.skipped_lines(result):
        console.print(f"left dense: {escape(line)}")
    for line in report.unfolded_lines(result):
        console.print(f"not reordered: {escape(line)}")
    if packed:
        console.print(report.packing_table(packing))
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
