"""One run of ``ace-triton recover`` on a model that is no causal language model."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, TextError
from ..formats.registry import save_model
from ..inputs import checkpoint
from ..inputs.calibration import SELF, read_calibration
from ..inputs.companions import Companions
from ..inputs.masked_text import with_masked_tokens
from ..inputs.model_inputs import Reads, Sources, model_inputs, sources_of
from ..inputs.model_source import ModelSource
from ..inputs.model_task import FEATURE_EXTRACTION, TEXT_GENERATION, ModelTask, task_of
from ..inputs.sentences import sentences_of, shuffled_by_length
from ..processes import started
from ..progress import progress_bar, stage
from ..provenance import history_with, name_of, source_facts, with_provenance
from ..recovery.any_model import recover_model
from ..recovery.settings import RecoveryReport, RecoverySettings
from ..recovery.state import remove_state
from ..recovery.stopping import saved_steps_noted
from . import report
from .compare_run import pooling_of
from .console import note_slow_training, print_backend, print_line, progress_bars
from .recover_models import check_vocabulary, remove_if_empty, rounded_to, was_pruned, zeros_note
from .recovery_report import after_training, recovery_bar
from .sources import context_length, kind_beside_causal

OTHER_SAMPLES, OTHER_LENGTH, INPUTS_PER_STEP = 50_000, 128, 32
OTHER_RATE = 3e-3
"""Defaults for models that are no causal language models; RecoverySettings has those of the others."""

ONLY_CAUSAL = ("tokens_per_step", "hidden_states", "tune", "tune_bits", "tune_group", "rank", "shard", "bos")
ONLY_OTHER = ("pieces", "inputs_per_step")
MASKED = "fill-mask"


def is_causal(source: Path, task: str | None, *, trust_remote_code: bool) -> bool:
    """True if a model is trained as a causal language model on text.

    Raises:
        CheckpointError: if a task is named, and no AutoModel class loads the model so.
    """
    if task is not None:
        return task_of(source, task, trust_remote_code=trust_remote_code).name == TEXT_GENERATION
    return kind_beside_causal(source, trust_remote_code=trust_remote_code) is None


def check_effect(given: Collection[str], *, causal: bool) -> None:
    """ArgumentError if an option that was given is for the other kind of model."""
    idle = [name for name in (ONLY_OTHER if causal else ONLY_CAUSAL) if name in given]
    if idle:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ArgumentError(
            f"{options}: not for causal language models on text; leave it out"
            if causal
            else f"{options}: for causal language models on text only; leave it out"
        )


@dataclass(frozen=True)
class TrainingInputs:
    """What a recovery trains on.

    Attributes:
        text: name of the text.
        samples: largest number of inputs.
        length: most tokens of a sequence; None for the default, or the model's longest if that is less.
        pieces: "sentences", or "documents" for pieces of documents.
        images, audio: folders, or None.
        inputs_per_step: inputs of an optimizer step.
    """

    text: str
    samples: int
    length: int | None
    pieces: str
    images: Path | None
    audio: Path | None
    inputs_per_step: int

    def sources(self, task: ModelTask, model_dir: Path, seed: int) -> Sources:
        """The text and files; the model is not loaded.

        Raises:
            AceError: if the model does not read what is given or needs more, or a text or a folder cannot be used.
        """
        if self.text == SELF:
            raise ArgumentError(f"--calibration {SELF}: only causal language models write text; name a text")
        known = task.model_class
        reads = Reads(frozenset({"input_ids"})) if known is None else Reads.of(known.forward, task.name)  # type: ignore[attr-defined]
        media = self.images is not None or self.audio is not None
        length = self.length or min(OTHER_LENGTH, context_length(model_dir) or OTHER_LENGTH)
        in_order = self.pieces == "sentences" and not media

        def read() -> list[str]:
            documents = list(read_calibration(self.text))
            if not in_order:
                return documents
            found = sentences_of(documents)
            if not found:
                raise TextError(f"{self.text}: has no sentences of 4 to 60 words; give prose, or --pieces documents")
            return shuffled_by_length(found, self.inputs_per_step, seed, self.samples)

        return sources_of(
            reads,
            task.auto_class if known is None else known.__name__,
            read,
            text=self.text,
            images=self.images,
            audio=self.audio,
            samples=self.samples,
            length=length,
            seed=None if in_order else seed,
            batch_size=self.inputs_per_step,
        )


@dataclass(frozen=True)
class OtherRecovery:
    """What to train and how.

    Attributes:
        model_dir: folder of the pruned model.
        teacher: the dense model.
        out: folder for the recovered model.
        task: what both are loaded for; None to find it.
        inputs: what to train on.
        settings: how it is trained.
        loading: dtype, device and trust_remote_code of both models.
        overwrite: replace ``out`` if it exists.
    """

    model_dir: Path
    teacher: str
    out: Path
    task: str | None
    inputs: TrainingInputs
    settings: RecoverySettings
    loading: dict[str, Any]
    overwrite: bool

    def run(self, json: Path | None) -> RecoveryReport:
        """Load both models, train, and write ``out`` and the JSON report.

        Raises:
            AceError: if a model cannot be loaded or trained, or the inputs do not fit.
        """
        if started() > 1:
            raise ArgumentError("recover of a model that is no causal language model runs in one process, not torchrun")
        trusted = bool(self.loading["trust_remote_code"])
        task = task_of(self.model_dir, self.task, trust_remote_code=trusted)
        sources = self.inputs.sources(task, self.model_dir, self.settings.seed)
        pruning = checkpoint.read_report(self.model_dir) or {}
        folder = self.out.absolute().parent / f".{self.out.name}.recovery"
        state = folder / "state.pt"
        with ExitStack() as stack:
            stack.callback(remove_if_empty, folder)
            stack.enter_context(checkpoint.reserved(self.out, overwrite=self.overwrite))
            stack.enter_context(saved_steps_noted(state))
            print_backend(self.loading["device"])
            note_slow_training(self.loading["dtype"], self.loading["device"])
            progress = stack.enter_context(progress_bars())
            with stage(progress, "load the models"):
                model, companions = checkpoint.load(self.model_dir, task=task.name, **self.loading)
                dense, _ = checkpoint.load(self.teacher, task=task.name, **self.loading)
                if not isinstance(companions, Companions):  # A causal language model that is trained on images.
                    companions = Companions(ModelSource.find(self.model_dir), trusted)
            reads = Reads.of(model.forward, task.name)
            if reads.text:
                check_vocabulary(companions.tokenizer, Companions(ModelSource.find(self.teacher), trusted).tokenizer)
            bar = progress_bar(progress, "training inputs", "inputs")
            batches, made = model_inputs(model, companions, reads, sources, bar)
            if task.name == MASKED:
                batches = with_masked_tokens(batches, companions.tokenizer, self.settings.seed)
            pooling = pooling_of(ModelSource.find(self.teacher).path)
            about_zeros = zeros_note(model, dense, pruning)
            result = recover_model(
                model,
                dense,
                batches,
                self.settings,
                pooling=pooling,
                pruned=was_pruned(pruning),
                state=state,
                progress=recovery_bar(progress, self.settings, state),
            )
            recovery = with_provenance(
                result.to_dict(),
                task=task.name,
                settings=self._settings(),
                calibration={
                    "source": made.source,
                    "inputs": made.inputs,
                    "pieces": self.inputs.pieces,
                    "length": sources.length,
                    "seed": self.settings.seed,
                },
                **({"pooling": pooling} if task.name == FEATURE_EXTRACTION else {}),
                device=self.loading["device"],
            )
            with stage(progress, "save the model"):
                source = source_facts(self.teacher, self.out)
                pruning.pop("source_path", None)  # A teacher from the hub has no path.
                history = history_with(
                    pruning,
                    "recover",
                    f"{result.steps} optimizer steps of {self.inputs.inputs_per_step} inputs"
                    + rounded_to(self.settings.quantization),
                    seconds=result.seconds,
                    mean_loss=list(result.mean_losses),
                )
                kept = after_training(pruning, self.settings.quantization)
                facts = {**kept, **source, "recovery": recovery, "history": history}
                save_model(model, companions, self.out, report=facts, overwrite=self.overwrite)
                remove_state(state)
        if about_zeros is not None:
            print_line(about_zeros)
        if json:
            report.write_json(json, {**recovery, "model": name_of(self.model_dir), **source})
        return result

    def _settings(self) -> dict[str, Any]:
        kept = {
            name: value for name, value in asdict(self.settings).items() if name not in ("tokens_per_step", "groups")
        }
        dtype = str(self.settings.forward_dtype).removeprefix("torch.")
        return {**kept, "forward_dtype": dtype, "inputs_per_step": self.inputs.inputs_per_step}
