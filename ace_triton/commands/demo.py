"""``ace-triton demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ArgumentError
from ..inputs import checkpoint
from ..inputs.calibration import SELF
from ..inputs.text import check_text
from ..provenance import with_provenance
from ..sparsity import Sparsity
from . import report
from .console import console, print_backend, print_line, progress_bars
from .demo_run import DemoSettings, demo_json, demo_table, run_demo
from .options import TEXT_SOURCES, DeviceOption, JsonOption, OverwriteOption, check_json, parse_device
from .sources import check_source


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the recovered model.")] = Path("demo-model"),
    sparsity: Annotated[str, typer.Option(help="Pattern n:m: keep n of every m weights.")] = "2:4",
    text: Annotated[str | None, typer.Option(help="Another text to evaluate on.", show_default="no other text")] = None,
    calibration: Annotated[
        str, typer.Option(help=f"Calibration text: {TEXT_SOURCES.format(half='calibration')} (Python's manual).")
    ] = DemoSettings.calibration,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Prune SmolLM2-135M by a metric alone and by the default recipe, recover it for a minute, pack it, and show the
    time and perplexity of each step.

    Takes under four minutes on two CPU cores, and needs no network.
    """
    if Sparsity(sparsity).n is None:
        raise ArgumentError(f"--sparsity {sparsity!r}: the demo packs the pruned model, so give a pattern n:m, as 2:4")
    if calibration == SELF:
        raise ArgumentError(f"--calibration {SELF}: the demo calibrates on text; name a file or a dataset")
    check_json(json)
    where = parse_device(device)
    checkpoint.check_out(out, overwrite=overwrite)
    settings = DemoSettings(sparsity=sparsity, text=text, calibration=calibration, device=where)
    check_source(settings.source)
    for source in (calibration, text):
        if source is not None:
            check_text(source)
    print_backend(where)
    with progress_bars() as progress:
        rows = run_demo(settings, out, overwrite=overwrite, progress=progress)
    if json:
        report.write_json(json, with_provenance(demo_json(rows, settings)))
    console.print(demo_table(rows, settings))
    print_line(f"\n{settings.prompt} ...")
    for row in rows:
        print_line(f"  {row.model}: {' '.join(row.written.split())}")
    print_line(f"\nThe recovered model is in {out}, as a dense model with zeros. Next:")
    print_line(f"  ace-triton pack {out} {out}-packed")
    print_line(f'  ace-triton generate {out}-packed --prompt "{settings.prompt}"')
    print_line("  ace-triton prune YOUR-MODEL OUT --calibration YOUR-TEXT")
