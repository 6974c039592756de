"""``ace-triton evaluate``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..agreement import NEIGHBORS
from ..decoders.batches import check_positions, longest_sequence
from ..decoders.parts_of_logits import PART
from ..errors import ArgumentError
from ..evaluate import perplexity
from ..formats.registry import format_of, load_model
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.model_source import weight_file_bytes
from ..inputs.model_task import TEXT_GENERATION
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
from .compare_run import Comparison, agreement_table, device_facts, found_task
from .console import console, print_backend, print_note, progress_bars
from .options import (
    TEXT_SOURCES,
    AnyModelArgument,
    AudioOption,
    BosOption,
    DeviceOption,
    DtypeOption,
    ImagesOption,
    JsonOption,
    OffloadOption,
    TaskOption,
    TrustOption,
    WikitextOption,
    check_json,
    number,
    parse_device,
    parse_dtype,
)
from .sources import check_length, check_source, context_length

WINDOW_LENGTH, SENTENCE_LENGTH = 2048, 128


def evaluate(
    model_dir: AnyModelArgument,
    text: Annotated[
        str, typer.Option(help=f"Evaluation text: {TEXT_SOURCES.format(half='evaluation')} (Python's manual).")
    ] = "Salesforce/wikitext:wikitext-2-raw-v1:test",
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Dense model to compare with, in place of a perplexity: by cosine and nearest neighbors of "
            "embeddings, or by choices and divergence of predictions.",
            show_default="the model's source, if the task has no perplexity",
        ),
    ] = None,
    task: TaskOption = None,
    images: ImagesOption = None,
    audio: AudioOption = None,
    samples: Annotated[
        int, number("Number of sentences, images or audio files to compare on, from the start.", least=1)
    ] = 3000,
    neighbors: Annotated[int, number("Number of nearest neighbors of an embedding.", least=1)] = NEIGHBORS,
    length: Annotated[
        int | None,
        number(
            "Length of a window, or most tokens of a sentence.",
            least=2,
            show_default=f"{WINDOW_LENGTH}; of a sentence {SENTENCE_LENGTH}, or the model's longest if that is less",
        ),
    ] = None,
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
    """Measure a model's perplexity on a text, over windows that do not overlap; or compare it with its dense model.

    With --dense, or if the model is no causal language model, both models run on the sentences of the text (windows for
    causal language models), on images or on audio: --task embedding compares embeddings, other tasks predictions.

    Several processes share the windows: torchrun --nproc-per-node 4 -m ace_triton evaluate DIR.
    With --stream temporary files go to the folder TMPDIR; they hold weights that transformers converts and, with
    --offload disk, the hidden states.
    """
    check_json(json)
    weights_dtype, where = parse_dtype(dtype), parse_device("cpu" if stream and device == "auto" else device)
    if stream and where != "cpu":
        raise ArgumentError("--stream evaluates on the CPU: leave --device out, or load the model whole (--no-stream)")
    check_source(model_dir, any_format=True)
    own_task = found_task(model_dir, task, trust_remote_code=trust_remote_code)
    compares = dense is not None or own_task.name != TEXT_GENERATION or images is not None or audio is not None
    is_sentence = compares and own_task.name != TEXT_GENERATION
    if length is None:
        longest = context_length(model_dir) if is_sentence else None
        length = WINDOW_LENGTH if not is_sentence else min(SENTENCE_LENGTH, longest or SENTENCE_LENGTH)
    if not is_sentence:
        check_length(model_dir, length, "--length")
    if compares:
        if stream:
            raise ArgumentError("--stream measures a perplexity: leave it out, or leave --dense out")
        loading = {"dtype": weights_dtype, "device": where, "trust_remote_code": trust_remote_code}
        comparison = Comparison(
            model_dir, dense, task, text, images, audio, samples, length, windows, bos, neighbors, loading
        )
        _compare(comparison, json)
        return
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


def _compare(comparison: Comparison, json: Path | None) -> None:
    source = comparison.dense_source()
    print_backend(comparison.loading["device"])
    with progress_bars() as progress:
        result, made = comparison.run(progress)
    inputs = {} if made is None else {"inputs": made.to_dict()}
    if json:
        facts = device_facts(comparison.model, source, comparison.loading)
        report.write_json(json, with_provenance(result.to_dict(), **facts, **inputs, text=name_of(comparison.text)))
    console.print(agreement_table(result))


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
