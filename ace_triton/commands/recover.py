"""``ace-triton recover``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from ..errors import ArgumentError
from ..formats.registry import format_of, save_model
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning
from ..inputs.calibration import SELF, load_calibration, read_calibration
from ..inputs.text import check_text
from ..inputs.written_text import TEXT_LENGTH, text_to_write
from ..processes import joined
from ..progress import stage
from ..provenance import history_with, name_of, source_facts, with_provenance
from ..recovery.settings import DEFAULT_MINUTES, GroupTuning, RecoverySettings
from ..recovery.sharing import whole_models
from ..recovery.state import remove_state
from ..recovery.stopping import saved_steps_noted
from ..recovery.text import TEXT_SEQUENCES
from ..recovery.train import recover as train
from ..solvers.quantize import GROUP
from . import report
from .console import console, note_slow_training, print_backend, print_line, progress_bars
from .options import (
    LARGEST_SEED,
    TEXT_SOURCES,
    AudioOption,
    BosOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    OverwriteOption,
    TaskOption,
    TrustOption,
    check_json,
    number,
    parse_device,
    parse_dtype,
)
from .recipe_flags import given_flags
from .recover_models import (
    check_vocabulary,
    quantization_from,
    remove_if_empty,
    rounded_to,
    rounding_note,
    teacher_of,
    was_pruned,
    zeros_note,
)
from .recover_other import (
    INPUTS_PER_STEP,
    OTHER_LENGTH,
    OTHER_RATE,
    OTHER_SAMPLES,
    OtherRecovery,
    TrainingInputs,
    check_effect,
    is_causal,
)
from .recovery_report import after_training, gain_note, recovery_bar, recovery_table
from .sources import check_length, check_source


def recover(
    context: typer.Context,
    model_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ace-triton prune wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the recovered model.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Dense model to learn from, as SRC of prune.", show_default="the one DIR was pruned from"),
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
            "that the dense model writes."
        ),
    ] = "allenai/c4:en",
    samples: Annotated[
        int | None,
        number(
            f"Largest number of training sequences, which do not overlap, images or audio files; unused with "
            f"--calibration {SELF}.",
            least=1,
            show_default=f"{TEXT_SEQUENCES}; {OTHER_SAMPLES} for other models",
        ),
    ] = None,
    length: Annotated[
        int | None,
        number(
            "Length of a training sequence, in tokens; for other models the largest length.",
            least=2,
            show_default=f"{TEXT_LENGTH}; {OTHER_LENGTH} for other models",
        ),
    ] = None,
    task: TaskOption = None,
    images: ImagesOption = None,
    audio: AudioOption = None,
    pieces: Annotated[
        Literal["sentences", "documents"],
        typer.Option(
            help="For other models that read text: train on sentences, or on pieces of documents of --length tokens."
        ),
    ] = "sentences",
    inputs_per_step: Annotated[
        int, number("For other models: sequences, images or audio files in one optimizer step.", least=1)
    ] = INPUTS_PER_STEP,
    tokens_per_step: Annotated[
        int, number("Number of tokens in one optimizer step.", least=1)
    ] = RecoverySettings.tokens_per_step,
    learning_rate: Annotated[
        float | None,
        number(
            "Peak learning rate, in units of each weight's root mean square.",
            above=0,
            show_default=f"{RecoverySettings.learning_rate:g}; {OTHER_RATE:g} for other models",
        ),
    ] = None,
    norms: Annotated[bool, typer.Option("--norms", help="Also train norms and biases.")] = False,
    hidden_states: Annotated[
        float,
        number(
            "Weight of the distance of the blocks' outputs from the dense model's in the loss; 0 trains on predictions "
            "alone.",
            least=0,
        ),
    ] = RecoverySettings.hidden_states,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Round the weights to 8 or 4 bits at the start and after each optimizer step, so that they are "
            "trained for it; OUT has the rounded weights, and pack --bits keeps them.",
            show_default="not rounded",
            metavar="8|4",
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="For --bits: number of inputs that share a scale, a multiple of 32.",
            show_default=f"that of DIR if it is rounded to these bits, else {GROUP}",
            metavar="INPUTS",
        ),
    ] = None,
    tune: Annotated[
        Literal["weights", "groups"],
        typer.Option(
            help="Train all kept weights; or groups, which quantizes groups of columns of a model that shrink wrote, "
            "and trains low-rank adapters on top, as SAAP does.",
        ),
    ] = "weights",
    tune_bits: Annotated[
        int, number("For --tune groups: bits of a value in a group.", least=2, most=8)
    ] = GroupTuning.bits,
    tune_group: Annotated[int, number("For --tune groups: columns of a group.", least=2)] = GroupTuning.group,
    rank: Annotated[int, number("For --tune groups: rank of the adapters.", least=1)] = GroupTuning.rank,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Spread the weights of both models over the processes of torchrun, instead of a copy in each.",
        ),
    ] = False,
    seed: Annotated[
        int, number("Random seed of the training sequences and their order.", least=0, most=LARGEST_SEED)
    ] = 0,
    bos: BosOption = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the weights of both models, of OUT and of the forwards, auto or float32; auto keeps the "
            "weights' own and runs forwards in bfloat16, which is slow on a CPU without instructions for it."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Train the kept weights of the pruned model in DIR toward the dense model's predictions, and write OUT.

    Weights of 0 stay 0. An interrupted run resumes when the same command is repeated: at Ctrl-C, SIGTERM and SIGHUP the
    step ends and is saved, and a second one stops at once. Several processes share the sequences of each step: torchrun
    --nproc-per-node 4 -m ace_triton recover DIR OUT --tokens-per-step 1024.

    Other models than causal language models (encoders, vision, speech) learn what the dense model's blocks return, and
    its predictions, or its embeddings if it has no predictions. They run in one process.
    """
    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    groups = GroupTuning(tune_bits, tune_group, rank)
    if tune == "weights" and groups != GroupTuning():
        raise ArgumentError("--tune-bits, --tune-group and --rank are for --tune groups: add it, or leave them out")
    if dtype not in ("auto", "float32"):
        raise ArgumentError(f"--dtype {dtype!r}: use auto or float32")
    weights_dtype = parse_dtype(dtype)
    if (name := format_of(model_dir).name) != "dense":
        raise ArgumentError(f"{model_dir} is {name}: recover the dense checkpoint with zeros, then pack the result")
    check_source(model_dir, hub=False)
    pruning = checkpoint.read_report(model_dir) or {}
    settings = RecoverySettings(
        steps,
        minutes,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate or RecoverySettings.learning_rate,
        norms=norms,
        hidden_states=hidden_states,
        seed=seed,
        groups=groups if tune == "groups" else None,
        quantize=quantization_from(bits, group, pruning),
        forward_dtype=torch.float32 if dtype == "float32" else RecoverySettings.forward_dtype,
    )
    check_json(json)
    checkpoint.check_out(out, overwrite=overwrite)
    where = parse_device(device)
    if tune == "groups" and not pruning:
        raise ArgumentError(f"--tune groups is for a model that shrink wrote, and {model_dir} is none: shrink it first")
    source = teacher_of(model_dir, teacher, pruning)
    if calibration != SELF:
        check_text(calibration)
    causal = images is None and audio is None and is_causal(model_dir, task, trust_remote_code=trust_remote_code)
    check_effect(given_flags(context), causal=causal)
    if not causal and learning_rate is None:
        settings = replace(settings, learning_rate=OTHER_RATE)
    trained = "adapter values" if tune == "groups" else "weights, norms and biases" if norms else "weights"
    if not causal:
        texts = TrainingInputs(calibration, samples or OTHER_SAMPLES, length, pieces, images, audio, inputs_per_step)
        loading = {"dtype": weights_dtype, "device": where, "trust_remote_code": trust_remote_code}
        run = OtherRecovery(model_dir, source, out, task, texts, settings, loading, overwrite=overwrite)
        result = run.run(json)
        console.print(recovery_table(result, trained, of_text=False))
        if (note := gain_note(result)) is not None:
            print_line(note)
        if (note := rounding_note(settings.quantization, pruning)) is not None:
            print_line(note)
        print_line(f"written to {out}")
        return
    samples, length = samples or TEXT_SEQUENCES, length or TEXT_LENGTH
    check_length(model_dir, length, "--length")
    folder = out.absolute().parent / f".{out.name}.recovery"
    state = folder / "state.pt"
    with ExitStack() as stack:
        processes = stack.enter_context(joined())
        if processes.is_first:
            stack.callback(remove_if_empty, folder)
            stack.enter_context(checkpoint.reserved(out, overwrite=overwrite))
            stack.enter_context(saved_steps_noted(state))
        documents = read_calibration(calibration)
        print_backend(where)
        note_slow_training(dtype, where)
        progress = stack.enter_context(progress_bars())
        with stage(progress, "load the models"), whole_models(processes, shard=shard):
            first = "cpu" if shard else where
            model, tokenizer = checkpoint.load(
                model_dir, dtype=weights_dtype, device=first, trust_remote_code=trust_remote_code
            )
            dense, dense_tokenizer = checkpoint.load(
                source, dtype=weights_dtype, device=first, trust_remote_code=trust_remote_code
            )
        check_vocabulary(tokenizer, dense_tokenizer)
        about_zeros = zeros_note(model, dense, pruning) if processes.is_first else None
        with stage(progress, "text"):
            beginning = Beginning.of(tokenizer, bos)
            text = (
                text_to_write(dense, tokenizer, length, beginning)
                if documents == SELF
                else load_calibration(
                    documents, tokenizer, samples=samples, length=length, seed=seed, apart=True, bos=bos
                ).ids
            )
        move = recovery_bar(progress, settings, state)
        spread = where if shard else None
        pruned = was_pruned(pruning)
        result = train(model, dense, text, settings, shard=spread, pruned=pruned, state=state, progress=move)
        recovery = with_provenance(
            result.to_dict(),
            bos=str(beginning),
            settings={**asdict(settings), "forward_dtype": str(settings.forward_dtype).removeprefix("torch.")},
            calibration={"text": name_of(calibration), "samples": samples, "length": length, "seed": seed},
            device=where,
            processes=processes.size,
            sharded=shard,
        )
        if processes.is_first:
            with stage(progress, "save the model"):
                pruning.pop("source_path", None)  # A teacher from the hub has no path.
                facts = {
                    **after_training(pruning, settings.quantization),
                    **source_facts(source, out),
                    "recovery": recovery,
                }
                facts["history"] = history_with(
                    pruning,
                    "recover",
                    f"{result.steps} optimizer steps, {result.tokens} tokens" + rounded_to(settings.quantization),
                    seconds=result.seconds,
                    mean_loss=list(result.mean_losses),
                )
                save_model(model, tokenizer, out, report=facts, overwrite=overwrite)
                remove_state(state)
        processes.wait()
    if not processes.is_first:
        return
    if json:
        report.write_json(json, {**recovery, "model": name_of(model_dir), **source_facts(source, out)})
    console.print(recovery_table(result, trained, hidden_states=bool(settings.hidden_states)))
    if (note := gain_note(result)) is not None:
        print_line(note)
    print_line(f"sequences begin with bos: {beginning}")
    if result.passes > 1:
        print_line(
            "The text was read more than once. A second epoch overfits: give more text (--calibration, --samples), or "
            "fewer minutes."
        )
    if about_zeros is not None:
        print_line(about_zeros)
    if (note := rounding_note(settings.quantization, pruning)) is not None:
        print_line(note)
    print_line(f"written to {out}")
