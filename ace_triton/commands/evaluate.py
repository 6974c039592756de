"""``ace-triton evaluate``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import report
from ..evaluate import perplexity
from ..packed_checkpoint import load_model
from ..progress import progress_bar, stage
from ..text import TextError, read_documents, wikitext_rows
from .console import console, progress_bars
from .options import DeviceOption, DtypeOption, JsonOption, TrustOption, check_json, parse_device, parse_dtype


def evaluate(
    model_dir: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint folder, dense or packed, hub name or .gguf file.")
    ],
    text: Annotated[
        str, typer.Option(help="Text or .jsonl file (also .gz), or dataset name[:config[:split]].")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    wikitext: Annotated[
        bool, typer.Option("--wikitext", help="The text is a raw WikiText file: join its lines as its dataset's rows.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Perplexity of a model over non-overlapping windows of a text."""
    check_json(json)
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    with progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = load_model(
                model_dir, dtype=parse_dtype(dtype), device=parse_device(device), trust_remote_code=trust_remote_code
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest and length > longest:
            raise TextError(f"--length {length} is more than the model's {longest} positions: give a smaller one")
        ids = torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
        bar = progress_bar(progress, "evaluate")
        result = perplexity(model, ids, length=length, windows=windows, progress=bar)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.perplexity_table(result))
