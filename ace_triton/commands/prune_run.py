"""One run of ``ace-triton prune``: its checks, its work and what is written beside the model."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..calibration_report import CalibrationReport, report_on
from ..decoders.kept_tensors import Offload
from ..errors import ArgumentError, RecipeError
from ..formats.registry import save_model
from ..inputs import checkpoint
from ..inputs.calibration import Calibration, load_calibration, read_calibration
from ..inputs.model_source import weight_file_bytes
from ..inputs.output_folder import Reservation
from ..model_report import ModelReport
from ..packed.manifest import DTYPES as PACKED_DTYPES
from ..packed.pack_model import SparsifyReport, sparsify
from ..planning.pruning_plan import PruningPlan, plan_pruning, weights_stay_in_files
from ..processes import Processes
from ..progress import progress_bar, stage
from ..provenance import option_facts, source_facts, with_provenance
from ..prune_blocks import prune_model, prune_stored, rehearse
from ..recipe import Recipe
from ..streaming.fits import LARGEST_SHARE, surely_fits
from ..streaming.streamed_prune import StreamedModel, streamed
from .console import print_note
from .options import parse_device, parse_dtype
from .recipe_file import CalibrationSettings, digest_of
from .sources import check_length, check_source


@dataclass(frozen=True)
class PruneResults:
    """What a run found.

    Attributes:
        facts: the JSON that is written beside the model.
        report: what was pruned.
        calibration: what the model was calibrated on; None if the method needs no text.
        packing: what was packed; None for a dense checkpoint.
    """

    facts: dict[str, Any]
    report: ModelReport
    calibration: CalibrationReport | None
    packing: SparsifyReport | None


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
        trust_remote_code: run code that comes with the model.
        overwrite: replace ``out`` if it exists.
        stream: keep the weights in files, and only the block in work in memory; None to decide by the memory.
        restart: throw away the state of an interrupted streamed run.
        offload: where the hidden states are kept; "disk" is the disk of ``out``.
    """

    source: str
    out: Path
    recipe: Recipe
    calibration: CalibrationSettings
    dtype: str = "auto"
    device: str = "auto"
    packed: bool = False
    trust_remote_code: bool = False
    overwrite: bool = False
    stream: bool | None = None
    restart: bool = False
    offload: Offload = "memory"

    def check_recipe(self) -> None:
        """ValueError if the model cannot be pruned so, or the recipe cannot be saved; loads nothing."""
        dtype = parse_dtype(self.dtype)
        parse_device(self.device)
        if self.stream and self.packed:
            raise ArgumentError("--stream writes dense checkpoints: leave --packed out, then pack --stream")
        if self.packed:
            check_packed(self.recipe, torch.float32 if self.dtype == "auto" else dtype)
        rehearse(self.recipe)
        self.recipe.to_json()

    def read_text(self) -> tuple[CalibrationSettings, str | list[str] | None]:
        """The calibration settings with the text's digest, and the documents; None if the method needs no text.

        Raises:
            ValueError: if the output, the model or the text cannot be used, or the text is not the recorded one.
        """
        checkpoint.check_out(self.out, overwrite=self.overwrite)
        check_source(self.source)
        if not self.recipe.calibrated:
            return self.calibration, None
        check_length(self.source, self.calibration.length, "--length")
        documents = read_calibration(self.calibration.text)
        digest = None if isinstance(documents, str) else digest_of(documents)
        if self.calibration.sha256 not in (None, digest):
            raise RecipeError(
                f"{self.calibration.text} is not the text that the recipe was used with (its content differs): give "
                "the text to use with --calibration"
            )
        return replace(self.calibration, sha256=digest), documents

    def run(self, progress: Progress, settings: CalibrationSettings, documents: str | list[str] | None) -> PruneResults:
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
        if device.type == "cuda" and not self.packed and size > LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]:
            print_note("the model does not fit on the GPU, so its weights stay in files (--stream)")
            return True
        if self.packed or device.type != "cpu" or surely_fits(size):
            return False
        plan = self.plan()
        if plan.streams:
            print_note(weights_stay_in_files(plan.in_memory.peak, plan.available_bytes))
        return plan.streams

    def plan(self, **more: Any) -> PruningPlan:
        """The plan of this run; ``more`` are other arguments of plan_pruning."""
        settings = self.calibration
        return plan_pruning(
            self.source,
            self.recipe,
            samples=settings.samples,
            length=settings.length,
            batch_size=settings.batch_size,
            dtype=parse_dtype(self.dtype),
            offload=self.offload,
            trust_remote_code=self.trust_remote_code,
            **more,
        )

    def _run_in_memory(
        self, progress: Progress, settings: CalibrationSettings, documents: str | list[str] | None
    ) -> PruneResults:
        processes = Processes.now()
        with ExitStack() as running:
            if processes.is_first:
                running.enter_context(checkpoint.reserved(self.out, overwrite=self.overwrite))
            processes.wait()
            started = time.perf_counter()
            with stage(progress, "load the model"):
                model, tokenizer = checkpoint.load(
                    self.source,
                    dtype=parse_dtype(self.dtype),
                    device=parse_device(self.device),
                    trust_remote_code=self.trust_remote_code,
                    own_memory=True,
                )
            load_seconds = time.perf_counter() - started
            if self.packed:
                check_packed(self.recipe, model.dtype)
            sequences = None if documents is None else _sequences(documents, tokenizer, model, settings, progress)
            calibrated = self._calibration_report(sequences, model, settings, progress)
            bar = progress_bar(progress, "prune")
            report = prune_model(
                model,
                sequences,
                self.recipe,
                batch_size=settings.batch_size,
                offload_folder=Reservation.of(self.out).work if self.offload == "disk" else None,
                progress=bar,
            )
            report = report.with_load(load_seconds)
            facts = self._facts(model, report, None if documents is None else settings, calibrated)
            packing = None
            if processes.is_first:
                with stage(progress, "save the model"):
                    packing = self._pack(model) if self.packed else None
                    kind = "packed" if self.packed else "dense"
                    save_model(model, tokenizer, self.out, kind, report=facts, overwrite=self.overwrite)
            processes.wait()
        return PruneResults(facts, report, calibrated, packing)

    def _pack(self, model: Any) -> SparsifyReport:
        by = self.recipe.quantize
        return sparsify(model) if by is None else sparsify(model, bits=by.bits, group=by.group)

    def _run_streamed(
        self, progress: Progress, settings: CalibrationSettings, documents: str | list[str] | None
    ) -> PruneResults:
        started = time.perf_counter()
        with streamed(
            self.source,
            self.out,
            dtype=parse_dtype(self.dtype),
            device=parse_device(self.device),
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
            restart=self.restart,
            offload=self.offload,
        ) as stream:
            model = stream.model
            with stage(progress, "copy the weights"):
                store = stream.start(
                    {
                        "recipe": self.recipe.to_dict(),
                        "calibration": None if documents is None else settings.to_dict(),
                        "dtype": str(model.dtype),
                    }
                )
            load_seconds = time.perf_counter() - started
            with store.open():
                sequences = calibrated = None
                if documents is not None:
                    # A resumed run has no dense model to write the text or to judge it, so both are kept.
                    kept = store.once("calibration", lambda: self._calibrate(stream, documents, settings, progress))
                    sequences = torch.tensor(kept["ids"], dtype=torch.int64, device="cpu")
                    calibrated = CalibrationReport(**kept["report"])
                bar = progress_bar(progress, "prune")
                report = prune_stored(
                    model, sequences, self.recipe, store, batch_size=settings.batch_size, progress=bar
                )
            report = report.with_load(load_seconds)
            facts = self._facts(model, report, None if documents is None else settings, calibrated)
            with stage(progress, "complete the files"):
                stream.publish(facts)
        return PruneResults(facts, report, calibrated, None)

    def _calibrate(
        self,
        stream: StreamedModel,
        documents: str | list[str],
        settings: CalibrationSettings,
        progress: Progress,
    ) -> dict[str, Any]:
        sequences = _sequences(documents, stream.tokenizer, stream.model, settings, progress)
        report = self._calibration_report(sequences, stream.model, settings, progress)
        assert report is not None
        return {"ids": sequences.ids.tolist(), "report": asdict(report)}

    def _calibration_report(
        self, sequences: Calibration | None, model: Any, settings: CalibrationSettings, progress: Progress
    ) -> CalibrationReport | None:
        if sequences is None:
            return None
        with stage(progress, "check the calibration text"):
            return report_on(sequences, model, settings.text)

    def _facts(
        self,
        model: Any,
        report: ModelReport,
        settings: CalibrationSettings | None,
        calibrated: CalibrationReport | None,
    ) -> dict[str, Any]:
        recipe, found = self.recipe, {}
        if calibrated is not None:
            found["calibration_report"] = {**calibrated.to_dict(), "seed": self.calibration.seed}
        return with_provenance(
            report.to_dict(),
            **source_facts(self.source, self.out),
            **found,
            calibration=None if settings is None else settings.to_dict(),
            options=option_facts(recipe.complete_options),
            scope=recipe.sparsity.scope,
            permute=recipe.permute,
            include=None if recipe.include is None else list(recipe.include),
            exclude=list(recipe.exclude) or None,
            dtype=str(model.dtype).removeprefix("torch."),
            dtype_option=self.dtype,
            device=str(model.device),
        )


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
        progress=progress_bar(progress, "calibration text"),
    )


def check_packed(recipe: Recipe, dtype: Any) -> None:
    """ValueError if a model pruned by this recipe could not be packed."""
    pattern = recipe.sparsity
    if pattern.n is None or pattern.m is None:
        raise ArgumentError(f"--packed needs groups, as --sparsity 2:4; {pattern} has none")
    if dtype not in PACKED_DTYPES.values():
        raise ArgumentError(f"--packed: packed checkpoints hold {', '.join(PACKED_DTYPES)}, the model is {dtype}")
    # A packed group holds n values and a bit for each of the m weights.
    value_bytes = dtype.itemsize if recipe.quantize is None else recipe.quantize.bits / 8
    if pattern.n * value_bytes + pattern.m / 8 >= pattern.m * dtype.itemsize:
        raise ArgumentError(f"--packed: {pattern} packed is no smaller than dense; keep fewer of every {pattern.m}")
