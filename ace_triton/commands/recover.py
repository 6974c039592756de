"""``ace-triton recover``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import checkpoint, report
from ..calibration import SELF, load_calibration
from ..packed_manifest import is_packed
from ..progress import stage
from ..recover import RecoverySettings
from ..recover import recover as train
from ..recovery_text import TEXT_LENGTH, TEXT_SEQUENCES, WrittenText
from ..written_text import start_token
from .console import console, progress_bars
from .options import DeviceOption, JsonOption, OverwriteOption, TrustOption, check_json, parse_device

DEFAULT_MINUTES = 5.0


def recover(
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ace-triton prune wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the recovered model.")],
    teacher: Annotated[str | None, typer.Option(help="The dense model; left out, what DIR was pruned from.")] = None,
    minutes: Annotated[float | None, typer.Option(help="To train for; 5 where --steps is not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimiser, in place of --minutes.")] = None,
    calibration: Annotated[
        str,
        typer.Option(help="Text to train on, as for prune; of 'self', the dense model writes what the budget reads."),
    ] = "allenai/c4:en",
    samples: Annotated[
        int, typer.Option(help="Sequences of it, at most; no token is in two. Means nothing to 'self'.")
    ] = TEXT_SEQUENCES,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = TEXT_LENGTH,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of one step.")] = RecoverySettings.tokens_per_step,
    learning_rate: Annotated[
        float, typer.Option(help="At its peak, in units of each weight's root mean square.")
    ] = RecoverySettings.learning_rate,
    norms: Annotated[bool, typer.Option("--norms", help="Train norms and biases too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sequences and their order.")] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Train the kept weights of the pruned model in DIR toward the dense model's predictions, and write it to OUT.

    What is zero stays zero. A run that was stopped goes on where it was when it is started again with the same words.
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
    told = checkpoint.read_report(model_dir) or {}
    source = teacher or told.get("source")
    if source is None:
        raise checkpoint.CheckpointError(f"{model_dir} does not say what it was pruned from: name it with --teacher")
    state = out.absolute().parent / f".{out.name}.recovery" / "state.pt"
    with checkpoint.reserved(out, overwrite=overwrite), progress_bars() as progress:
        with stage(progress, "load the models"):
            model, tokenizer = checkpoint.load(model_dir, device=where, trust_remote_code=trust_remote_code)
            dense, _ = checkpoint.load(source, device=where, trust_remote_code=trust_remote_code)
        with stage(progress, "text"):
            text = (
                WrittenText(start_token(dense, tokenizer), length)
                if calibration == SELF
                else load_calibration(calibration, tokenizer, samples=samples, length=length, seed=seed, apart=True).ids
            )
        bar = progress.add_task("recover", total=None)

        def move(spent: float, budget: float, loss: float) -> None:
            progress.update(bar, completed=round(spent), total=round(budget), description=f"recover, loss {loss:.3f}")

        result = train(model, dense, text, settings, state=state, progress=move)
        with stage(progress, "save the model"):
            facts = {**told, "source": source, "recovery": result.to_dict()}
            checkpoint.save(model, tokenizer, out, facts, overwrite=overwrite)
            shutil.rmtree(state.parent)
    if json:
        report.write_json(json, result.to_dict())
    console.print(report.recovery_table(result))
    if result.passes > 1:
        console.print(
            "The budget outlasted the text: what is read again is learnt by heart and helps little on other text. More "
            "text (--calibration, --samples), or fewer minutes, would serve better.",
            soft_wrap=True,
        )
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
