"""``ace-triton evaluate``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

import typer

from ..decoders.batches import check_positions, longest_sequence
from ..decoders.parts_of_logits import PART
from ..errors import ArgumentError
from ..evaluate import perplexity
from ..formats.registry import format_of, load_model
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.model_source import weight_file_bytes
from ..inputs.text import read_documents, wikitext_rows
from ..planning.memory import logit_bytes
from ..planning.pruning_plan import weights_stay_in_files
from ..planning.skeleton import skeleton
from ..process_memory import resident_bytes
from ..processes import joined
from ..progress import progress_bar, stage
from ..provenance import name_of, with_provenance
from ..streaming.fits import available_memory, fits_in_memory, surely_fits
from ..streaming.streamed_evaluate import opened
from . import report
from .console import console, print_backend, print_note, progress_bars
from .options import (
    TEXT_SOURCES,
    AnyModelArgument,
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OffloadOption,
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
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Keep the weights in files and only one block in memory; runs on the CPU.",
            show_default="if the model does not fit in memory",
        ),
    ] = None,
    offload: OffloadOption = "memory",
    json: JsonOption = None,
) -> None:
    """Measure a model's perplexity on a text, over windows that do not overlap.

    Several processes share the windows: torchrun --nproc-per-node 4 -m ace_triton evaluate DIR.
    With --stream temporary files go to the folder TMPDIR; they hold weights that are converted and, with --offload
    disk, the hidden states.
    """
    check_json(json)
    weights_dtype, where = parse_dtype(dtype), parse_device("cpu" if stream and device == "auto" else device)
    if stream and where != "cpu":
        raise ArgumentError("--stream evaluates on the CPU: leave --device out, or load the model whole (--no-stream)")
    check_source(model_dir, any_format=True)
    check_length(model_dir, length, "--length")
    options: dict[str, Any] = {"dtype": weights_dtype, "trust_remote_code": trust_remote_code}
    if stream is None:
        stream = where == "cpu" and not _fits(model_dir, length, options)
    if offload == "disk" and not stream:
        raise ArgumentError("--offload disk needs --stream: in memory no hidden states are kept between blocks")
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    print_backend(where)
    with joined() as processes, progress_bars() as progress, ExitStack() as until_done:
        with stage(progress, "load the model"):
            if stream:
                found = until_done.enter_context(opened(model_dir, **options, offload=offload))
                model, tokenizer = found.model, found.tokenizer
            else:
                model, tokenizer = load_model(model_dir, device=where, **options)
        check_positions(longest_sequence(model), length)
        beginning = Beginning.of(tokenizer, bos)
        ids = text_ids("\n\n".join(documents), tokenizer, beginning)
        bar = progress_bar(progress, "evaluate")
        run: dict[str, Any] = {"logits": found.logits(bar)} if stream else {"progress": bar}
        result = perplexity(model, ids, length=length, windows=windows, beginning=beginning, **run)
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


def _fits(source: str, length: int, options: dict[str, Any]) -> bool:
    """True if a model fits in memory, or cannot be streamed; a note says if it does not."""
    if format_of(source).name != "dense" or surely_fits(weight_file_bytes(source)):
        return True
    built = skeleton(source, **options)
    weights = sum(parameter.nbytes for parameter in built.model.parameters())
    needed = resident_bytes() + weights + logit_bytes(built.model, length, PART)
    if fits_in_memory(needed):
        return True
    print_note(weights_stay_in_files(needed, available_memory()))
    return False
