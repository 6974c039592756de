"""``ace-triton evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import report
from ..batches import check_positions
from ..beginnings import Beginning, text_ids
from ..evaluate import check_windows, perplexity
from ..packed_checkpoint import load_model
from ..progress import progress_bar, stage
from ..text import read_documents, wikitext_rows
from .console import console, progress_bars
from .options import BosOption, DeviceOption, DtypeOption, JsonOption, check_json, parse_device, parse_dtype


def evaluate(
    model_dir: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint folder, dense or packed, hub name or .gguf file.")
    ],
    text: Annotated[
        str, typer.Option(help="Text, .jsonl or .json file (also .gz), or dataset name[:config[:split]].")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Evaluate only the first windows; default: all.")] = None,
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="The text is a raw WikiText file: join its lines as its dataset's rows.")
    ] = False,
    bos: BosOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure a model's perplexity over non-overlapping windows of a text."""
    check_json(json)
    check_windows(length, windows)
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    with progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = load_model(model_dir, dtype=parse_dtype(dtype), device=parse_device(device))
        check_positions(model, length)
        beginning = Beginning.of(tokenizer, bos)
        ids = text_ids("\n\n".join(documents), tokenizer, beginning)
        bar = progress_bar(progress, "evaluate")
        result = perplexity(model, ids, length=length, windows=windows, beginning=beginning, progress=bar)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.perplexity_table(result))
