"""``ace-triton recover``."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .. import checkpoint, report
from ..calibration import MOST_DOCUMENTS, SELF, load_calibration
from ..packed_manifest import is_packed
from ..progress import stage
from ..provenance import name_of, source_facts, source_of, with_provenance
from ..recover import RecoverySettings
from ..recover import recover as train
from ..recovery_text import TEXT_LENGTH, TEXT_SEQUENCES, WrittenText
from ..sources import check_length, check_source
from ..text import read_documents
from ..written_text import start_token
from .console import console, print_backend, print_line, progress_bars
from .options import (
    LARGEST_SEED,
    TEXT_SOURCES,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    check_json,
    number,
    parse_device,
)

DEFAULT_MINUTES = 5.0


def recover(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ace-triton prune wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the recovered model.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Dense model to learn from, named as SRC of prune.", show_default="what DIR was pruned from"),
    ] = None,
    minutes: Annotated[
        float | None,
        number("Time to train for, in minutes.", above=0, show_default=f"{DEFAULT_MINUTES:g}, unless --steps is given"),
    ] = None,
    steps: Annotated[
        int | None,
        number("Number of optimizer steps, instead of --minutes.", least=1, show_default="as many as --minutes allows"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help=f"Text to train on: {TEXT_SOURCES.format(half='calibration')} (Python's manual), or '{SELF}' for text "
            "that the dense model writes as it is read."
        ),
    ] = "allenai/c4:en",
    samples: Annotated[
        int,
        number(
            f"Largest number of training sequences, which share no token; does not apply to --calibration {SELF}.",
            least=1,
        ),
    ] = TEXT_SEQUENCES,
    length: Annotated[int, number("Length of a training sequence, in tokens.", least=2)] = TEXT_LENGTH,
    tokens_per_step: Annotated[
        int, number("Number of tokens in one optimizer step.", least=1)
    ] = RecoverySettings.tokens_per_step,
    learning_rate: Annotated[
        float, number("Peak learning rate, in units of each weight's root mean square.", above=0)
    ] = RecoverySettings.learning_rate,
    norms: Annotated[bool, typer.Option("--norms", help="Also train norms and biases.")] = False,
    seed: Annotated[
        int, number("Random seed of the training sequences and their order.", least=0, most=LARGEST_SEED)
    ] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Train the kept weights of the pruned model in DIR toward the dense model's predictions, and write it to OUT.

    Weights of 0 stay 0. An interrupted run resumes when the same command is repeated.
    """
    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    settings = RecoverySettings(
        steps, minutes, tokens_per_step=tokens_per_step, learning_rate=learning_rate, norms=norms, seed=seed
    )
    check_json(json)
    if is_packed(model_dir):
        raise ValueError(f"{model_dir} is packed: recover the dense checkpoint with zeros, then pack the result")
    checkpoint.check_out(out, overwrite=overwrite)
    where = parse_device(device)
    check_source(model_dir, hub=False)
    told = checkpoint.read_report(model_dir) or {}
    source = teacher or source_of(told, model_dir)
    if source is None:
        name = f", only that its name was {told['source']}" if "source" in told else ""
        raise checkpoint.CheckpointError(
            f"{model_dir} does not say where the model is that it was pruned from{name}: name it with --teacher"
        )
    check_source(source)
    check_length(model_dir, length, "--length")
    documents = None if calibration == SELF else read_documents(calibration, most=MOST_DOCUMENTS)
    print_backend(where)
    state = out.absolute().parent / f".{out.name}.recovery" / "state.pt"
    with progress_bars() as progress:
        with stage(progress, "load the models"):
            model, tokenizer = checkpoint.load(model_dir, device=where)
            dense, _ = checkpoint.load(source, device=where)
        with stage(progress, "text"):
            text = (
                WrittenText(start_token(dense, tokenizer), length)
                if documents is None
                else load_calibration(documents, tokenizer, samples=samples, length=length, seed=seed, apart=True).ids
            )
        bar = progress.add_task("recover", total=None)

        def move(spent: float, budget: float, loss: float) -> None:
            progress.update(bar, completed=round(spent), total=round(budget), description=f"recover, loss {loss:.3f}")

        result = train(model, dense, text, settings, state=state, progress=move)
        with stage(progress, "save the model"):
            recovery = with_provenance(
                result.to_dict(),
                settings={**asdict(settings), "forward_dtype": str(settings.forward_dtype).removeprefix("torch.")},
                calibration={"text": name_of(calibration), "samples": samples, "length": length, "seed": seed},
                device=where,
            )
            facts = {**told, **source_facts(source, out), "recovery": recovery}
            checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
            shutil.rmtree(state.parent)
    if json:
        report.write_json(json, {**recovery, "model": name_of(model_dir), **source_facts(source, out)})
    console.print(report.recovery_table(result))
    if result.passes > 1:
        print_line(
            "The budget outlasted the text: a second epoch overfits and helps little on other text. Give more text "
            "(--calibration, --samples), or fewer minutes."
        )
    print_line(f"written to {out}")
