"""``ace-triton pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import checkpoint, report
from ..packed_checkpoint import save_packed
from ..packed_manifest import is_packed
from ..progress import stage
from ..sparsify import sparsify
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
)


def pack(
    src: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a model that was pruned to n:m.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed model.")],
    sparsity: Annotated[
        str | None, typer.Option(help="n:m of all layers; left out, every layer's own is found.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No layers whose name matches (repeatable).")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Pack the n:m layers of a pruned checkpoint: a smaller one, which ace_triton.load runs sparse."""
    check_json(json)
    if is_packed(src):
        raise ValueError(f"{src} is packed already")
    checkpoint.check_out(out, overwrite=overwrite)
    with checkpoint.reserved(out, overwrite=overwrite), progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(
                src, dtype=parse_dtype(dtype), device=parse_device(device), trust_remote_code=trust_remote_code
            )
        with stage(progress, "pack"):
            result = sparsify(model, sparsity, include=include or None, exclude=exclude or None)
        with stage(progress, "save the model"):
            save_packed(model, tokenizer, out, report=checkpoint.read_report(src), overwrite=overwrite)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.packing_table(result))
    for line in report.skipped_lines(result):
        console.print(f"left as it is: {escape(line)}")
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
