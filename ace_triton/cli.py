"""The command line: ``ace-triton prune | evaluate | demo | info``."""

from __future__ import annotations

import ast
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import __version__, checkpoint, report
from .calibration import load_calibration
from .demo import DemoSettings, demo_json, demo_table, progress_bar, run_demo
from .evaluate import perplexity
from .inspect_checkpoint import inspect_checkpoint
from .metrics import metric, metric_names
from .prune_model import prune_model
from .sparsity import Sparsity
from .text import TextError, read_documents, wikitext_rows

app = typer.Typer(
    name="ace-triton",
    help="Prune language models to N:M sparsity, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

TRACEBACK_VARIABLE = "ACE_TRITON_TRACEBACK"

DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help=f"Type to load weights in: {', '.join(DTYPES)}.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it is there already.")]


@app.command()
def prune(
    src: Annotated[str, typer.Argument(help="Checkpoint folder, hub name, .gguf file, or 'smollm2'.")],
    out: Annotated[Path, typer.Argument(help="Folder for the pruned model.")],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(metric_names())}.")] = "ace",
    sparsity: Annotated[str, typer.Option(help="n:m (n of every m kept) or the pruned fraction.")] = "2:4",
    scope: Annotated[str, typer.Option(help="For a fraction: 'row' or 'layer' loses its share.")] = "row",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text or .jsonl file (also .gz), dataset name[:config[:split]], 'pydoc:calibration', or 'self' "
            "(the model writes its own)."
        ),
    ] = "allenai/c4:en",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the calibration crops.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a forward; left out, about 2,048 tokens' worth.")
    ] = None,
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="One forward a block: statistics of the dense model.")
    ] = False,
    include: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No layers whose name matches (repeatable).")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method, name=value (repeatable).")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Prune SRC and write the result, a dense checkpoint with zeros that transformers loads, to OUT."""
    pattern = Sparsity(sparsity, scope=scope)  # type: ignore[arg-type]
    options = metric(method).complete(_options(option))
    _check_json(json)
    checkpoint.check_out(out, overwrite=overwrite)
    with _progress() as progress:
        started = time.perf_counter()
        with _stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(src, dtype=_dtype(dtype), device=_device(device))
        load_seconds = time.perf_counter() - started
        sequences = None
        if method != "magnitude":
            with _stage(progress, "calibration text"):
                sequences = load_calibration(
                    calibration, tokenizer, samples=samples, length=length, seed=seed, model=model
                )
        result = prune_model(
            model,
            sequences,
            method,
            pattern,
            one_shot=one_shot,
            batch_size=batch_size,
            include=include or None,
            exclude=exclude or None,
            progress=progress_bar(progress, "prune"),
            **options,
        )
        seconds = dataclasses.replace(result.seconds, load=load_seconds, total=result.seconds.total + load_seconds)
        result = dataclasses.replace(result, seconds=seconds)
        with _stage(progress, "save the model"):
            checkpoint.save(model, tokenizer, out, result.to_dict(), overwrite=overwrite)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.prune_table(result))
    for line in report.skipped_lines(result):
        console.print(f"left dense: {escape(line)}")
    console.print(f"written to {escape(str(out))}", soft_wrap=True)


@app.command()
def evaluate(
    model_dir: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder, hub name or .gguf file.")],
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
    json: JsonOption = None,
) -> None:
    """Perplexity of a model over non-overlapping windows of a text."""
    _check_json(json)
    documents = read_documents(text)
    if wikitext:
        documents = wikitext_rows("".join(documents))
    with _progress() as progress:
        with _stage(progress, "load the model"):
            model, tokenizer = checkpoint.load(model_dir, dtype=_dtype(dtype), device=_device(device))
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest and length > longest:
            raise TextError(f"--length {length} is more than the model's {longest} positions: give a smaller one")
        ids = torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
        bar = progress_bar(progress, "evaluate")
        result = perplexity(model, ids, length=length, windows=windows, progress=bar)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.perplexity_table(result))


@app.command()
def info(
    model_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a saved model.")],
    json: JsonOption = None,
) -> None:
    """Sparsity and pattern of a saved model, layer by layer."""
    _check_json(json)
    tensors = inspect_checkpoint(model_dir)
    if json:
        report.write_json(json, {"layers": [dataclasses.asdict(tensor) for tensor in tensors]})
    console.print(report.info_table(tensors))
    console.print(report.info_summary(tensors))


@app.command()
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
    _check_json(json)
    settings = DemoSettings(sparsity=sparsity, text=text, calibration=calibration, device=_device(device))
    with _progress() as progress:
        rows = run_demo(settings, out, overwrite=overwrite, progress=progress)
    if json:
        report.write_json(json, demo_json(rows, settings))
    console.print(demo_table(rows, settings))
    console.print(f"the {rows[-1].method} model is in {escape(str(out))}", soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        console.print(f"ace-triton {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 1, a wrong call in 2."""
    _quieten_libraries()
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        errors.print(f"[bold red]error:[/] {escape(str(error) or type(error).__name__)}", soft_wrap=True)
        if not isinstance(error, (ValueError, OSError)):
            errors.print(f"(set {TRACEBACK_VARIABLE}=1 for the traceback)")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped; nothing was written")
        sys.exit(130)


def _options(pairs: list[str] | None) -> dict[str, Any]:
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


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} is not to be had here ({str(error).splitlines()[0]})") from error
    return name


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--json {path}: name a file in a folder that exists")


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors)


@contextmanager
def _stage(progress: Progress, name: str) -> Iterator[None]:
    task = progress.add_task(name, total=1)
    yield
    progress.update(task, completed=1)


def _quieten_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
