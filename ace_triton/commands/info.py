"""``ace-triton info``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ..byte_sizes import shown_bytes
from ..formats.registry import inspect_checkpoint
from ..inputs.checkpoint import read_report
from ..packed.keep_dense import copies_of_folder
from ..provenance import history_of, name_of, with_provenance
from . import report
from .console import console, print_line
from .options import JsonOption, check_json


def info(
    model_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a saved model, dense or packed.")],
    full: Annotated[bool, typer.Option("--full", help="List every layer instead of each kind of layer.")] = False,
    json: JsonOption = None,
) -> None:
    """Show the sparsity and pattern of a saved model's layers, and what each step that led to it cost and brought."""
    check_json(json)
    tensors = inspect_checkpoint(model_dir)
    history = history_of(read_report(model_dir))
    if json:
        layers = [dataclasses.asdict(tensor) for tensor in tensors]
        report.write_json(json, with_provenance({"layers": layers}, model=name_of(model_dir), history=history))
    print_line(report.info_summary(tensors))
    if (copies := copies_of_folder(model_dir)) is not None and copies.layers:
        print_line(
            f"loading it on this CPU keeps dense copies of {copies.layers} packed weights for speed, "
            f'{shown_bytes(copies.bytes)}; load(..., keep="packed") keeps none'
        )
    console.print(report.info_table(tensors) if full else report.info_groups(tensors))
    if history:
        console.print(report.history_table(history))
