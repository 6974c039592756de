"""``ace-triton info``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from ..formats.registry import inspect_checkpoint
from ..inputs.checkpoint import read_report
from ..inputs.model_task import task_of
from ..packed.keep_dense import DenseCopies, copies_of, generates
from ..packed.manifest import Manifest, is_packed
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
    if (copies := _copies(model_dir)) is not None and copies.layers:
        print_line(
            f"loading it on this CPU keeps dense copies of {copies.layers} packed weights for speed, "
            f'{copies.bytes / 1e6:.1f} MB; load(..., keep="packed") keeps none'
        )
    console.print(report.info_table(tensors) if full else report.info_groups(tensors))
    if history:
        console.print(report.history_table(history))


def _copies(model_dir: str) -> DenseCopies | None:
    """The dense copies that a packed model gets if it is loaded; None if that cannot be told."""
    if not is_packed(model_dir):
        return None
    try:
        known: Any = task_of(model_dir).model_class
    except CheckpointError:  # It needs its own Python code, for example.
        return None
    return None if known is None else copies_of(Manifest.read(model_dir), generating=generates(known))
