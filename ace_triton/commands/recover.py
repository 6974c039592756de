"""``ace-triton recover``."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArgumentError
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning
from ..inputs.calibration import SELF, load_calibration, read_calibration
from ..inputs.written_text import TEXT_LENGTH, text_to_write
from ..packed.manifest import is_packed
from ..progress import stage
from ..provenance import name_of, source_facts, source_of, with_provenance
from ..recovery.state import remove_state
from ..recovery.text import TEXT_SEQUENCES
from ..recovery.train import DEFAULT_MINUTES, RecoverySettings
from ..recovery.train import recover as train
from . import report
from .console import console, print_backend, print_line, progress_bars
from .options import (
    LARGEST_SEED,
    TEXT_SOURCES,
    BosOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    TrustOption,
    check_json,
    number,
    parse_device,
)
from .sources import check_length, check_source


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
    bos: BosOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
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
        raise ArgumentError(f"{model_dir} is packed: recover the dense checkpoint with zeros, then pack the result")
    checkpoint.check_out(out, overwrite=overwrite)
    where = parse_device(device)
    check_source(model_dir, hub=False)
    told = checkpoint.read_report(model_dir) or {}
    source = _teacher(model_dir, teacher, told)
    check_length(model_dir, length, "--length")
    folder = out.absolute().parent / f".{out.name}.recovery"
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        stack.enter_context(checkpoint.reserved(out, overwrite=overwrite))
        documents = read_calibration(calibration)
        print_backend(where)
        progress = stack.enter_context(progress_bars())
        with stage(progress, "load the models"):
            model, tokenizer = checkpoint.load(model_dir, device=where, trust_remote_code=trust_remote_code)
            dense, dense_tokenizer = checkpoint.load(source, device=where, trust_remote_code=trust_remote_code)
        _check_vocabulary(tokenizer, dense_tokenizer)
        with stage(progress, "text"):
            beginning = Beginning.of(tokenizer, bos)
            text = (
                text_to_write(dense, tokenizer, length, beginning)
                if documents == SELF
                else load_calibration(
                    documents, tokenizer, samples=samples, length=length, seed=seed, apart=True, bos=bos
                ).ids
            )
        bar = progress.add_task("recover", total=None)

        def move(spent: float, budget: float, loss: float) -> None:
            progress.update(bar, completed=round(spent), total=round(budget), description=f"recover, loss {loss:.3f}")

        result = train(model, dense, text, settings, state=folder / "state.pt", progress=move)
        with stage(progress, "save the model"):
            recovery = with_provenance(
                result.to_dict(),
                bos=str(beginning),
                settings={**asdict(settings), "forward_dtype": str(settings.forward_dtype).removeprefix("torch.")},
                calibration={"text": name_of(calibration), "samples": samples, "length": length, "seed": seed},
                device=where,
            )
            told.pop("source_path", None)  # A teacher from the hub has none.
            facts = {**told, **source_facts(source, out), "recovery": recovery}
            checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
            remove_state(folder / "state.pt")
    if json:
        report.write_json(json, {**recovery, "model": name_of(model_dir), **source_facts(source, out)})
    console.print(report.recovery_table(result))
    print_line(f"sequences begin with bos: {beginning}")
    if result.passes > 1:
        print_line(
            "The budget outlasted the text: a second epoch overfits, and helps little on other text. Give more text "
            "(--calibration, --samples), or fewer minutes."
        )
    print_line(f"written to {out}")


def _teacher(model_dir: Path, named: str | None, told: dict[str, Any]) -> str:
    """The dense model's name; CheckpointError, before anything is loaded, if it is unknown or not dense."""
    source = source_of(told, model_dir) if named is None else named
    if not source:
        name, what = told.get("source"), "what it was pruned from"
        if isinstance(name, str) and name:
            what = f"where the model is that it was pruned from, only that its name was {name}"
        raise checkpoint.CheckpointError(f"{model_dir} does not say {what}: name it with --teacher")
    check_source(source)
    folder = Path(source)
    if folder.is_dir() and folder.samefile(model_dir):
        why = "that is the pruned model itself" + ("; it replaced the dense one" if named is None else "")
    elif folder.is_dir() and checkpoint.read_report(folder) is not None:
        why = f"that is a pruned model ({checkpoint.REPORT_FILE} lies in it)"
    else:
        return source
    raise checkpoint.CheckpointError(f"the teacher is {source}, but {why}: name the dense model with --teacher")


def _check_vocabulary(tokenizer: Any, teachers: Any) -> None:
    """ValueError if a token id stands for two different tokens."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    its = {index: token for token, index in teachers.get_vocab().items()}
    if differing := [index for index in names.keys() & its.keys() if names[index] != its[index]]:
        first = min(differing)
        raise ArgumentError(
            f"the teacher's vocabulary is another: token {first} is {names[first]!r} in the pruned model and "
            f"{its[first]!r} in the teacher; name the dense model that it was pruned from with --teacher"
        )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
