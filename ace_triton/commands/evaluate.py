"""``ace-triton evaluate``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..agreement import NEIGHBORS
from ..available_memory import available_memory
from ..decoders.batches import check_positions, longest_sequence
from ..decoders.parts_of_logits import PART
from ..errors import ArgumentError
from ..evaluate import perplexity
from ..formats.registry import format_of, load_model
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.model_source import weight_file_bytes
from ..inputs.text import check_text, read_documents, wikitext_rows
from ..planning.memory import logit_bytes
from ..planning.pruning_plan import weights_stay_in_files
from ..planning.skeleton import skeleton
from ..process_memory import resident_bytes
from ..processes import joined, started
from ..progress import progress_bar, stage
from ..provenance import name_of, with_provenance
from ..streaming.fits import fits_in_memory, surely_fits
from ..streaming.streamed_evaluate import opened
from ..task_evaluation import check_tasks_installed, evaluate_tasks, known_tasks
from . import report
from .compare_run import Comparison, agreement_table
from .console import console, print_backend, print_note, progress_bars
from .evaluate_options import TASKS, check_effect, kind_of
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
from .recipe_flags import given_flags
from .sources import check_causal, check_length, check_source, context_length, found_task

WINDOW_LENGTH, SENTENCE_LENGTH, SAMPLES = 2048, 128, 1000
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
"""The evaluation text of the papers."""

LOGIT_BYTES = 12
"""Bytes that a window needs at once for each of its logits: in the model's dtype, in fp32, and as log-likelihood."""


def evaluate(
    context: typer.Context,
    model_dir: AnyModelArgument,
    text: Annotated[
        str, typer.Option(help=f"Evaluation text: {TEXT_SOURCES.format(half='evaluation')} (Python's manual).")
    ] = WIKITEXT,
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
        int, number("Largest number of sentences, images or audio files to compare on, from the start.", least=1)
    ] = SAMPLES,
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
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks of lm-evaluation-harness to measure instead of perplexity, as arc_easy,piqa.",
            show_default="perplexity",
        ),
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder with the YAML files of further tasks.", show_default="no folder")
    ] = None,
    shots: Annotated[
        int | None,
        number("Number of examples before each question of a task.", least=0, show_default="the task's own"),
    ] = None,
    limit: Annotated[
        int | None, number("Number of questions of each task, from the start.", least=1, show_default="all")
    ] = None,
    batch_size: Annotated[int, number("Number of sequences in one call of the model, for tasks.", least=1)] = 1,
    json: JsonOption = None,
) -> None:
    """Measure a model's perplexity on a text, over windows that do not overlap; or its scores on tasks.

    With --dense, or if the model is no causal language model, it is compared with its dense model: both run on the
    sentences of the text (windows for causal language models), on images or on audio. --task embedding compares
    embeddings, other tasks predictions.

    Several processes share the windows: torchrun --nproc-per-node 4 -m ace_triton evaluate DIR.
    With --stream temporary files go to the folder TMPDIR; they hold weights that are converted and, with --offload
    disk, the hidden states.
    """
    check_json(json)
    weights_dtype, where = parse_dtype(dtype), parse_device("cpu" if stream and device == "auto" else device)
    if stream and where != "cpu":
        raise ArgumentError("--stream evaluates on the CPU: leave --device out, or load the model whole (--no-stream)")
    given = given_flags(context)
    if tasks is not None:
        check_effect(given, TASKS)
        if stream:
            raise ArgumentError("--tasks evaluates a model in memory: leave --stream out")
        if started() > 1:
            raise ArgumentError("--tasks runs in one process: run it without torchrun")
        check_tasks_installed()
    check_source(model_dir, any_format=True)
    check_text(text)
    trust = {"trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {"dtype": weights_dtype, "trust_remote_code": trust_remote_code}
    if tasks is not None:
        if task is not None:
            raise ArgumentError("--tasks scores causal language models: leave --task out")
        check_causal(model_dir, "evaluate --tasks", "compare it with its dense model (--dense)", **trust)
        _show_tasks(model_dir, tasks, tasks_folder, shots, limit, batch_size, where, options, json)
        return
    own_task = found_task(model_dir, task, trust_remote_code=trust_remote_code)
    kind = kind_of(own_task, dense=dense is not None, images=images is not None, audio=audio is not None)
    check_effect(given, kind)
    is_sentence = "inputs" in kind.traits
    if length is None:
        longest = context_length(model_dir) if is_sentence else None
        length = WINDOW_LENGTH if not is_sentence else min(SENTENCE_LENGTH, longest or SENTENCE_LENGTH)
    if not is_sentence:
        check_length(model_dir, length, "--length")
    if "comparison" in kind.traits:
        if stream:
            raise ArgumentError(f"--stream measures a perplexity, not {kind.words}: leave it out")
        if started() > 1:
            raise ArgumentError(f"{kind.words} runs in one process: run it without torchrun")
        if is_sentence and "samples" not in given:
            print_note(f"{kind.words}, {samples:,} at most: --samples takes more or fewer")
        loading = {"dtype": weights_dtype, "device": where, "trust_remote_code": trust_remote_code}
        comparison = Comparison(
            model_dir,
            dense,
            own_task.name,
            text,
            images,
            audio,
            samples,
            length,
            windows,
            bos,
            neighbors,
            wikitext,
            loading,
        )
        _compare(comparison, json)
        return
    if stream is None:
        stream = where == "cpu" and not _fits(model_dir, length, options)
    if offload == "disk" and not stream:
        raise ArgumentError("--offload disk needs --stream: in memory no hidden states are kept between blocks")
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    elif text != WIKITEXT and any(part in Path(text).name.lower() for part in ("wikitext", "wiki.test")):
        print_note(f"{name_of(text)} is read as any other text: for a raw file of WikiText-2 add --wikitext")
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
        bar = progress_bar(progress, "evaluate", "steps" if stream else "windows")
        run: dict[str, Any] = {"logits": found.logits(bar)} if stream else {"progress": bar}
        result = perplexity(model, ids, length=length, windows=windows, beginning=beginning, **run)
    if not processes.is_first:
        return
    facts = {
        "protocol": protocol_of(text, wikitext, windows, beginning, Beginning.of(tokenizer, "stream")),
        "text": name_of(text),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if json:
        content = {**result.to_dict(), "wikitext": wikitext, "device": str(model.device), **facts}
        report.write_json(json, with_provenance(content, model=name_of(model_dir)))
    console.print(report.perplexity_table(result, facts))


def protocol_of(text: str, wikitext: bool, windows: int | None, beginning: Beginning, of_stream: Beginning) -> str:
    """Whether a perplexity is measured as in the papers on pruning (Wanda, SparseGPT), or how it differs.

    They cut the whole test split of WikiText-2 into windows. A tokenizer's own beginning precedes the text alone.

    Args:
        text, wikitext, windows: the options of these names.
        beginning: the tokens that windows begin with.
        of_stream: the tokenizer's own beginning, before the text alone.
    """
    differs = []
    if text != WIKITEXT and not wikitext:
        differs.append("text not given with --wikitext")
    if windows is not None:
        differs.append("not the whole text")
    if beginning.of_each:
        differs.append("bos in each window")
    elif of_stream.tokens and beginning != of_stream:
        differs.append("no bos before the text")
    return f"ours: {', '.join(differs)}" if differs else "the papers' (perplexities compare at equal window lengths)"


def _show_tasks(
    model_dir: str,
    names: str,
    folder: Path | None,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    device: str,
    options: dict[str, Any],
    json: Path | None,
) -> None:
    """Score the model on tasks, and print and write the scores."""
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise ArgumentError("--tasks: name one task or more, with commas between them")
    manager = known_tasks(tasks, folder)
    print_backend(device)
    with progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = load_model(model_dir, device=device, **options)
        with stage(progress, "evaluate the tasks"):
            scores = evaluate_tasks(model, tokenizer, tasks, manager, shots=shots, limit=limit, batch_size=batch_size)
    if json:
        content = {"tasks": [score.to_dict() for score in scores], "limit": limit, "batch_size": batch_size}
        dtype = str(model.dtype).removeprefix("torch.")
        report.write_json(
            json, with_provenance(content, model=name_of(model_dir), dtype=dtype, device=str(model.device))
        )
    console.print(report.task_table(scores))


def _compare(comparison: Comparison, json: Path | None) -> None:
    comparison.dense_source()
    print_backend(comparison.loading["device"])
    with progress_bars() as progress:
        compared = comparison.run(progress)
    facts, made = comparison.facts(compared), compared.inputs
    if json:
        inputs = {} if made is None else {"inputs": made.to_dict()}
        report.write_json(json, with_provenance(compared.agreement.to_dict(), **facts, **inputs))
    console.print(agreement_table(compared.agreement, facts))


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
