"""What several commands take, and how it is checked."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..report import check_json_target
from ..update import Update

DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help=f"Type to load weights in: {', '.join(DTYPES)}.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model; never without this.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it is there already.")]


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """``["a=0.5", "base=ria"]`` as ``{"a": 0.5, "base": "ria"}``; ValueError for one without ``=``."""
    options = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r}: write name=value")
        try:
            options[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.strip()] = value
    return options


def parse_update(kind: str | None, pairs: list[str] | None) -> Update | None:
    """``--update`` with its ``--update-option`` pairs; ValueError for a name or value that will not do."""
    options = parse_options(pairs)
    if kind is None:
        if options:
            raise ValueError("--update-option without --update: say which update it is for (--update lstsq)")
        return None
    known = [field.name for field in dataclasses.fields(Update) if field.name != "kind"]
    for name in options:
        if name not in known:
            raise ValueError(f"--update has no option {name!r}; its options: {', '.join(known)}")
    return Update(kind, **options)  # type: ignore[arg-type]


def parse_dtype(name: str) -> Any:
    """What transformers takes as ``dtype``; ValueError for a name that is none."""
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(name: str) -> str:
    """A device that is there; ValueError where it is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} is not to be had here ({str(error).splitlines()[0]})") from error
    return name


def check_json(path: Path | None) -> None:
    """ValueError for a ``--json`` that could not be written, before any work is done."""
    if path is not None:
        check_json_target(path)
