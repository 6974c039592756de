"""``ace-triton export``."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..exporters.registry import PROMPTS, check_export, export_model, exporter_names
from ..inputs import checkpoint
from ..progress import stage
from ..provenance import name_of, with_provenance
from . import report
from .console import console, print_line, progress_bars
from .options import AnyModelArgument, JsonOption, OverwriteOption, TrustOption, check_json, number
from .sources import check_causal, check_source


def export(
    model_dir: AnyModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the exported model.")],
    to: Annotated[str, typer.Option(help=f"Engine to export to, one of {', '.join(exporter_names())}.")],
    weight_type: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights in the files: float32 or float16 for onnx and openvino; f16, bf16, f32, q8_0 or "
            "q4_0 for gguf.",
            show_default="the first of these",
        ),
    ] = None,
    prompts: Annotated[int, number("Number of prompts on which the files are compared with the model.", least=1)] = (
        PROMPTS
    ),
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Export a model, dense or packed, to the files of another engine, as dense weights with zeros.

    The files are read back and compared with the model, weight by weight and by logits, before OUT is written.
    """
    check_json(json)
    check_export(to, weight_type)
    checkpoint.check_out(out, overwrite=overwrite)
    check_source(model_dir, any_format=True)
    advice = "pack it, or load its folder with transformers and export it from there"
    check_causal(model_dir, "export", advice, trust_remote_code=trust_remote_code)
    with progress_bars() as progress:
        result = export_model(
            model_dir,
            out,
            to,
            weight_type=weight_type,
            prompts=prompts,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            stage=partial(stage, progress),
        )
    if json:
        report.write_json(json, with_provenance(result.to_dict(), model=name_of(model_dir)))
    table = report.headed_table("pattern", "layers", title=f"weights of {result.engine}, {result.weight_type}")
    for pattern, count in Counter(matrix.pattern for matrix in result.matrices).most_common():
        table.add_row(pattern, str(count))
    console.print(table)
    print_line(
        f"logits of {result.prompts} prompts differ by at most {result.largest_difference:.2g} "
        f"(largest logit {result.largest_logit:.3g})"
    )
    for line in result.advice:
        print_line(line)
    print_line(f"written to {out}")
