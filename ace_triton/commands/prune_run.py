"""One run of ``ace-triton prune``: its checks, its work and what is written beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..calibration_report import CalibrationReport, report_on
from ..decoders.kept_tensors import Offload
from ..formats.registry import save_model
from ..inputs import checkpoint
from ..inputs.calibration import Calibration, load_calibration
from ..inputs.companions import Companions
from ..inputs.model_inputs import IMAGES_OF_A_FORWARD, InputReport, Reads, Sources, model_inputs
from ..inputs.model_source import ModelSource, weight_file_bytes
from ..inputs.model_task import TEXT_GENERATION, ModelTask, task_of
from ..inputs.output_folder import Reservation
from ..model_report import ModelReport
from ..packed.pack_model import SparsifyReport, sparsify
from ..packed.packable import check_packed, check_stored
from ..packed.stored_bits import StoredBits
from ..planning.pruning_plan import PruningPlan, plan_pruning, weights_stay_in_files
from ..processes import Processes
from ..progress import progress_bar, stage
from ..prune_blocks import prune_model, prune_stored, rehearse
from ..recipe import Recipe
from ..streaming.file_store import FileStore
from ..streaming.fits import LARGEST_SHARE, surely_fits
from ..streaming.streamed_pack import packing_facts
from ..streaming.streamed_prune import StreamedModel, streamed
from ..timing import Moment
from .calibration_sources import read_sources, trial_inputs
from .console import note_slow_calibration, print_note
from .options import parse_device, parse_dtype
from .prune_facts import prune_facts
from .recipe_file import CalibrationSettings, read_documents_of
from .sources import check_length, check_source

Texts = str | list[str] | Sources | None
"""A causal language model's documents or "self", what another model is calibrated on, or None if nothing is needed."""


@dataclass(frozen=True)
class PruneResults:
    """What a run found.

    Attributes:
        facts: the JSON that is written beside the model.
        report: what was pruned.
        calibration: what the model was calibrated on; None if the method needs no text.
        packing: what was packed; None for a dense checkpoint.
        outside: names of linear layers outside the blocks, which stay dense, if the model is no causal language model.
    """

    facts: dict[str, Any]
    report: ModelReport
    calibration: CalibrationReport | InputReport | None
    packing: SparsifyReport | None
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneRun:
    """What to prune and how.

    Attributes:
        source: the model.
        out: folder for the pruned model.
        recipe: what pruning does.
        calibration: which calibration sequences to take; its digest is the one that the text must have.
        dtype, device: as the command's options.
        packed: write a packed checkpoint.
        stored: bits of the weights that stay dense in it; None to keep their type.
        trust_remote_code: run code that comes with the model.
        overwrite: replace ``out`` if it exists.
        stream: keep the weights in files, and only the block in work in memory; None to decide by the memory.
        restart: throw away the state of an interrupted streamed run.
        offload: where the hidden states are kept; "disk" is the disk of ``out``.
        task_name: what the model is loaded for; None to find it in its configuration.
    """

    source: str
    out: Path
    recipe: Recipe
    calibration: CalibrationSettings
    dtype: str = "auto"
    device: str = "auto"
    packed: bool = False
    stored: StoredBits | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    stream: bool | None = None
    restart: bool = False
    offload: Offload = "memory"
    task_name: str | None = None

    @cached_property
    def task(self) -> ModelTask:
        """What the model is loaded for; CheckpointError if it is not found, or is not for the task."""
        return task_of(self.source, self.task_name, trust_remote_code=self.trust_remote_code)

    @property
    def of_text_alone(self) -> bool:
        """True for a causal language model that is calibrated on text: other models need inputs of their own."""
        media = self.calibration.images is not None or self.calibration.audio is not None
        return self.task.name == TEXT_GENERATION and not media

    def check_recipe(self) -> None:
        """ValueError if the model cannot be pruned so, or the recipe cannot be saved; loads nothing."""
        dtype = parse_dtype(self.dtype)
        parse_device(self.device)
        if self.packed:
            check_packed(self.recipe, torch.float32 if self.dtype == "auto" else dtype)
        rehearse(self.recipe)
        self.recipe.to_json()

    def read_text(self) -> tuple[CalibrationSettings, Texts]:
        """The calibration settings with the text's digest, and the documents; None if the method needs no inputs.

        Raises:
            ValueError: if the output, the model or the text cannot be used, or the text is not the recorded one.
        """
        checkpoint.check_out(self.out, overwrite=self.overwrite)
        check_source(self.source)
        if not self.of_text_alone:
            return self._read_inputs()
        if not self.recipe.calibrated:
            return self.calibration, None
        check_length(self.source, self.calibration.length, "--length")
        return read_documents_of(self.calibration)

    def _read_inputs(self) -> tuple[CalibrationSettings, Sources | None]:
        """As :meth:`read_text`, for a model that is no causal language model or reads images or audio."""
        if not self.recipe.calibrated:
            return self.calibration, None
        return read_sources(self.source, self.task, self.calibration)

    def run(self, progress: Progress, settings: CalibrationSettings, documents: Texts) -> PruneResults:
        """Load, calibrate, prune and save.

        Args:
            progress: shows the stages.
            settings, documents: from :meth:`read_text`.
        """
        streams = Processes.now().first_does(self._streams)
        return (self._run_streamed if streams else self._run_in_memory)(progress, settings, documents)

    def _streams(self) -> bool:
        """Whether to keep the weights in files: as the user says, or if the model does not fit in memory."""
        if self.stream is not None:
            return self.stream
        device, size = torch.device(parse_device(self.device)), weight_file_bytes(self.source)
        if device.type == "cuda" and size > LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]:
            print_note("the model does not fit on the GPU, so its weights stay in files (--stream)")
            return True
        if device.type != "cpu" or surely_fits(size):
            return False
        plan = self.plan()
        if plan.streams:
            print_note(weights_stay_in_files(plan.in_memory.peak, plan.available_bytes))
        return plan.streams

    def plan(self, **more: Any) -> PruningPlan:
        """The plan of this run; ``more`` are other arguments of plan_pruning."""
        settings, size = self.calibration, self.calibration.batch_size
        text: str | None = settings.text
        if not self.of_text_alone:
            inputs = trial_inputs(self.source, self.task, settings, trust_remote_code=self.trust_remote_code)
            size = size or (1 if settings.audio else IMAGES_OF_A_FORWARD if settings.images else None)
            more |= {"task": self.task.name, "inputs": inputs}
            text = None
        return plan_pruning(
            self.source,
            self.recipe,
            samples=settings.samples,
            length=settings.length,
            batch_size=size,
            text=text,
            dtype=parse_dtype(self.dtype),
            packed=self.packed,
            stored=self.stored,
            offload=self.offload,
            trust_remote_code=self.trust_remote_code,
            **more,
        )

    def _run_in_memory(self, progress: Progress, settings: CalibrationSettings, documents: Texts) -> PruneResults:
        processes = Processes.now()
        with self._reserved(processes):
            started = Moment.now()
            with stage(progress, "load the model"):
                model, tokenizer = self._beside(checkpoint.load(self.source, **self._loading(), task=self._load_as))
            load = started.since()
            if self.packed:
                check_packed(self.recipe, model.dtype)
                check_stored(model, self.stored)
            if documents is not None:
                note_slow_calibration(self.dtype, model)
            inputs, calibrated = self._inputs(model, tokenizer, documents, settings, progress)
            report = self._prune(model, inputs, progress, self._batch_size).with_load(*load)
            facts, outside = prune_facts(self, model, report, None if documents is None else settings, calibrated)
            packing = self._save(model, tokenizer, facts, progress, processes)
        return PruneResults(facts, report, calibrated, packing, outside)

    @property
    def _load_as(self) -> str | None:
        """The task as loading takes it."""
        return TEXT_GENERATION if self.of_text_alone else self.task_name

    @property
    def _batch_size(self) -> int | None:
        """Sequences of a forward; None for inputs that are cut into batches when they are made."""
        return self.calibration.batch_size if self.of_text_alone else None

    def _beside(self, loaded: tuple[Any, Any]) -> tuple[Any, Any]:
        """A model with its tokenizer; a model of other inputs with its companions."""
        model, tokenizer = loaded
        if self.of_text_alone:
            return model, tokenizer
        return model, Companions(ModelSource.find(self.source), self.trust_remote_code)

    def _inputs(
        self, model: Any, tokenizer: Any, documents: Texts, settings: CalibrationSettings, progress: Progress
    ) -> tuple[Any, CalibrationReport | InputReport | None]:
        """What the model is calibrated on, and the report on it; None twice if nothing is needed."""
        if documents is None:
            return None, None
        if isinstance(documents, Sources):
            reads = Reads.of(model.forward, self.task.name)
            return model_inputs(
                model, tokenizer, reads, documents, progress_bar(progress, "calibration inputs", "inputs")
            )
        sequences = _sequences(documents, tokenizer, model, settings, progress)
        return sequences, self._calibration_report(sequences, model, settings, progress)

    @contextmanager
    def _reserved(self, processes: Processes) -> Iterator[None]:
        """A context in which ``out`` is reserved, for all processes by the first of them."""
        with ExitStack() as running:
            if processes.is_first:
                running.enter_context(checkpoint.reserved(self.out, overwrite=self.overwrite))
            processes.wait()
            yield
            processes.wait()

    def _loading(self) -> dict[str, Any]:
        return {
            "dtype": parse_dtype(self.dtype),
            "device": parse_device(self.device),
            "trust_remote_code": self.trust_remote_code,
            "own_memory": True,
        }

    def _prune(self, model: Any, inputs: Any, progress: Progress, batch_size: int | None) -> ModelReport:
        offload_folder = Reservation.of(self.out).work if self.offload == "disk" else None
        bar = progress_bar(progress, "prune", "blocks")
        return prune_model(
            model, inputs, self.recipe, batch_size=batch_size, offload_folder=offload_folder, progress=bar
        )

    def _save(
        self, model: Any, tokenizer: Any, facts: dict[str, Any], progress: Progress, processes: Processes
    ) -> SparsifyReport | None:
        """Write the model, in the first process; returns what was packed there."""
        if not processes.is_first:
            return None
        with stage(progress, "save the model"):
            packing = self._pack(model) if self.packed else None
            facts |= {} if packing is None else packing_facts(packing)
            kind = "packed" if self.packed else "dense"
            save_model(model, tokenizer, self.out, kind, report=facts, overwrite=self.overwrite)
        return packing

    def _pack(self, model: Any) -> SparsifyReport:
        bits, sparsity = (self.stored or StoredBits()).packing(self.recipe.quantize), self.recipe.sparsity
        return sparsify(model, **bits, pruned_to=None if sparsity.n is None else str(sparsity))

    def _run_streamed(self, progress: Progress, settings: CalibrationSettings, documents: Texts) -> PruneResults:
        started = Moment.now()
        with streamed(
            self.source,
            self.out,
            dtype=parse_dtype(self.dtype),
            device=parse_device(self.device),
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
            restart=self.restart,
            offload=self.offload,
            task=self._load_as,
        ) as stream:
            model, stream.tokenizer = self._beside((stream.model, stream.tokenizer))
            if self.packed:
                check_packed(self.recipe, model.dtype)
            with stage(progress, "copy the weights"):
                store = stream.start(
                    {
                        "recipe": self.recipe.to_dict(),
                        "calibration": None if documents is None else settings.to_dict(),
                        "dtype": str(model.dtype),
                        **({} if self.of_text_alone else {"task": self.task.name}),
                    }
                )
            check_stored(model, self.stored)  # Before, its modules have hooks that load the weights.
            load = started.since()
            if store.resumed and Processes.now().is_first:
                print_note(f"resuming: {len(store.resumed)} of {len(store.units)} blocks are done")
            if documents is not None:
                note_slow_calibration(self.dtype, model)
            with store.open():
                inputs, calibrated = self._kept_inputs(stream, store, documents, settings, progress)
                bar = progress_bar(progress, "prune", "blocks")
                report = prune_stored(model, inputs, self.recipe, store, batch_size=self._batch_size, progress=bar)
            report = report.with_load(*load)
            facts, outside = prune_facts(self, model, report, None if documents is None else settings, calibrated)
            with stage(progress, "pack" if self.packed else "complete the files"):
                packing = stream.publish(facts, packed=self.packed, quantize=self.recipe.quantize, stored=self.stored)
        return PruneResults(facts, report, calibrated, packing, outside)

    def _kept_inputs(
        self,
        stream: StreamedModel,
        store: FileStore,
        documents: Texts,
        settings: CalibrationSettings,
        progress: Progress,
    ) -> tuple[Any, CalibrationReport | InputReport | None]:
        """As :meth:`_inputs`; the same in a resumed run, which has no dense model to write or to judge a text.

        Inputs of other models depend on the files alone, so they are made again.
        """
        if documents is None or isinstance(documents, Sources):
            return self._inputs(stream.model, stream.tokenizer, documents, settings, progress)

        def calibrate() -> dict[str, Any]:
            sequences, report = self._inputs(stream.model, stream.tokenizer, documents, settings, progress)
            return {"ids": sequences.ids.tolist(), "report": asdict(report)}  # type: ignore[arg-type]

        kept = store.once("calibration", calibrate)
        return torch.tensor(kept["ids"], dtype=torch.int64, device="cpu"), CalibrationReport(**kept["report"])

    def _calibration_report(
        self, sequences: Calibration, model: Any, settings: CalibrationSettings, progress: Progress
    ) -> CalibrationReport:
        with stage(progress, "check the calibration text"):
            return report_on(sequences, model, settings.text)


def _sequences(
    documents: str | list[str], tokenizer: Any, model: Any, settings: CalibrationSettings, progress: Progress
) -> Calibration:
    return load_calibration(
        documents,
        tokenizer,
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        model=model,
        bos=settings.bos,
        progress=progress_bar(progress, "calibration text", "sequences"),
    )
