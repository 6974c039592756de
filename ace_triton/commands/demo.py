"""``ace-triton demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import report
from ..demo import DemoSettings, demo_json, demo_table, run_demo
from ..sparsity import Sparsity
from .console import console, progress_bars
from .options import DeviceOption, JsonOption, OverwriteOption, check_json, parse_device


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model pruned by the last method.")] = Path("demo-model"),
    sparsity: Annotated[str, typer.Option(help="n:m (n of every m kept) or the pruned fraction.")] = "2:4",
    text: Annotated[str | None, typer.Option(help="A text of yours to evaluate on as well.")] = None,
    calibration: Annotated[str, typer.Option(help="As for prune.")] = "pydoc:calibration",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Prune SmolLM2-135M with magnitude, Wanda, RIA and ACE, and show what each costs and loses."""
    Sparsity(sparsity)
    check_json(json)
    settings = DemoSettings(sparsity=sparsity, text=text, calibration=calibration, device=parse_device(device))
    with progress_bars() as progress:
        rows = run_demo(settings, out, overwrite=overwrite, progress=progress)
    if json:
        report.write_json(json, demo_json(rows, settings))
    console.print(demo_table(rows, settings))
    console.print(f"the {rows[-1].method} model is in {escape(str(out))}", soft_wrap=True)
