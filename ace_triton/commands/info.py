"""``ace-triton info``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .. import report
from ..inspect_checkpoint import inspect_checkpoint
from .console import console
from .options import JsonOption, check_json


def info(
    model_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a saved model.")],
    json: JsonOption = None,
) -> None:
    """Sparsity and pattern of a saved model, layer by layer."""
    check_json(json)
    tensors = inspect_checkpoint(model_dir)
    if json:
        report.write_json(json, {"layers": [dataclasses.asdict(tensor) for tensor in tensors]})
    console.print(report.info_table(tensors))
    console.print(report.info_summary(tensors))
