"""``ace-triton evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..decoders.batches import check_positions, longest_sequence
from ..evaluate import perplexity
from ..formats.registry import load_model
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.text import read_documents, wikitext_rows
from ..processes import joined
from ..progress import progress_bar, stage
from ..provenance import name_of, with_provenance
from . import report
from .console import console, print_backend, progress_bars
from .options import (
    TEXT_SOURCES,
    AnyModelArgument,
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    TrustOption,
    WikitextOption,
    check_json,
    number,
    parse_device,
    parse_dtype,
)
from .sources import check_length, check_source


def evaluate(
    model_dir: AnyModelArgument,
    text: Annotated[
        str, typer.Option(help=f"Evaluation text: {TEXT_SOURCES.format(half='evaluation')} (Python's manual).")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    length: Annotated[int, number("Length of a window, in tokens.", least=2)] = 2048,
    windows: Annotated[
        int | None, number("Number of windows to evaluate, from the start.", least=1, show_default="all of the text")
    ] = None,
    wikitext: WikitextOption = False,
    bos: BosOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Measure a model's perplexity on a text, over windows that do not overlap.

    Several processes share the windows: torchrun --nproc-per-node 4 -m ace_triton evaluate DIR.
    """
    check_json(json)
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    check_source(model_dir, any_format=True)
    check_length(model_dir, length, "--length")
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    print_backend(where)
    with joined() as processes, progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = load_model(
                model_dir, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code
            )
        check_positions(longest_sequence(model), length)
        beginning = Beginning.of(tokenizer, bos)
        ids = text_ids("\n\n".join(documents), tokenizer, beginning)
        bar = progress_bar(progress, "evaluate")
        result = perplexity(model, ids, length=length, windows=windows, beginning=beginning, progress=bar)
    if not processes.is_first:
        return
    if json:
        facts = with_provenance(
            result.to_dict(),
            model=name_of(model_dir),
            text=name_of(text),
            wikitext=wikitext,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )
        report.write_json(json, facts)
    console.print(report.perplexity_table(result))
