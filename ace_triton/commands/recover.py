"""``ace-triton recover``."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import checkpoint, report
from ..batches import check_positions
from ..beginnings import Beginning
from ..calibration import MOST_DOCUMENTS, SELF, check_sizes, load_calibration
from ..packed_manifest import is_packed
from ..progress import stage
from ..recover import DEFAULT_MINUTES, RecoverySettings
from ..recover import recover as train
from ..recovery_state import remove_state
from ..recovery_text import TEXT_SEQUENCES
from ..text import read_documents
from ..written_text import TEXT_LENGTH, text_to_write
from .console import console, progress_bars
from .options import BosOption, DeviceOption, JsonOption, OverwriteOption, check_json, parse_device


def recover(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ace-triton prune wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the recovered model.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense model; default: the model that DIR was pruned from.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help=f"Minutes to train for; {DEFAULT_MINUTES:g} if --steps is not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps (instead of --minutes).")] = None,
    calibration: Annotated[
        str,
        typer.Option(help="Text to train on, as for prune; with 'self', the dense model writes it as it is read."),
    ] = "allenai/c4:en",
    samples: Annotated[
        int, typer.Option(help="Largest number of sequences; no token is in two of them. Not used with 'self'.")
    ] = TEXT_SEQUENCES,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = TEXT_LENGTH,
    tokens_per_step: Annotated[
        int, typer.Option(help="Tokens in an optimizer step.")
    ] = RecoverySettings.tokens_per_step,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate, in units of each weight's root mean square.")
    ] = RecoverySettings.learning_rate,
    norms: Annotated[bool, typer.Option("--norms", help="Train norms and biases too.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed for the sequences and their order.")] = 0,
    bos: BosOption = "auto",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Train the kept weights of the pruned model in DIR toward the dense model's predictions, and write it to OUT.

    Weights of zero stay zero. An interrupted run resumes when the same command is repeated.
    """
    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    settings = RecoverySettings(
        steps, minutes, tokens_per_step=tokens_per_step, learning_rate=learning_rate, norms=norms, seed=seed
    )
    check_json(json)
    check_sizes(samples, length)
    if is_packed(model_dir):
        raise ValueError(f"{model_dir} is packed: recover the dense checkpoint with zeros, then pack the result")
    checkpoint.check_out(out, overwrite=overwrite)
    where = parse_device(device)
    told = checkpoint.read_report(model_dir) or {}
    source = _teacher(model_dir, teacher, told.get("source"))
    folder = out.absolute().parent / f".{out.name}.recovery"
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, folder)
        stack.enter_context(checkpoint.reserved(out, overwrite=overwrite))
        progress = stack.enter_context(progress_bars())
        documents = None if calibration == SELF else read_documents(calibration, most=MOST_DOCUMENTS)
        with stage(progress, "load the models"):
            model, tokenizer = checkpoint.load(model_dir, device=where)
            dense, dense_tokenizer = checkpoint.load(source, device=where)
        _check_vocabulary(tokenizer, dense_tokenizer)
        check_positions(model, length)
        with stage(progress, "text"):
            beginning = Beginning.of(tokenizer, bos)
            text = (
                text_to_write(dense, tokenizer, length, beginning)
                if documents is None
                else load_calibration(
                    documents, tokenizer, samples=samples, length=length, seed=seed, apart=True, bos=bos
                ).ids
            )
        bar = progress.add_task("recover", total=None)

        def move(spent: float, budget: float, loss: float) -> None:
            progress.update(bar, completed=round(spent), total=round(budget), description=f"recover, loss {loss:.3f}")

        result = train(model, dense, text, settings, state=folder / "state.pt", progress=move)
        found = {**result.to_dict(), "bos": str(beginning)}
        with stage(progress, "save the model"):
            facts = {**told, "source": source, "recovery": found}
            checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
            remove_state(folder / "state.pt")
    if json:
        report.write_json(json, found)
    console.print(report.recovery_table(result))
    console.print(f"sequences begin with bos: {beginning}", highlight=False)
    if result.passes > 1:
        console.print(
            "The budget outlasted the text: a second epoch overfits, and helps little on other text. Give more text "
            "(--calibration, --samples), or fewer minutes.",
            soft_wrap=True,
        )
    console.print(f"written to {escape(str(out))}", soft_wrap=True)


def _teacher(model_dir: Path, named: str | None, recorded: Any) -> str:
    """The dense model's name; CheckpointError, before anything is loaded, if it is unknown or not dense."""
    source = recorded if named is None else named
    if not isinstance(source, str) or not source:
        raise checkpoint.CheckpointError(
            f"{model_dir} does not say what it was pruned from: name the dense model with --teacher"
        )
    folder = Path(source)
    if folder.is_dir() and model_dir.is_dir() and folder.samefile(model_dir):
        why = "that is the pruned model itself" + ("; it replaced the dense one" if named is None else "")
    elif folder.is_dir() and is_packed(folder):
        why = "that is a packed model"
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
        raise ValueError(
            f"the teacher's vocabulary is another: token {first} is {names[first]!r} in the pruned model and "
            f"{its[first]!r} in the teacher; name the dense model that it was pruned from with --teacher"
        )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
