"""One run of ``ace-triton shrink``: reads the text, makes the smaller model in memory or in files, and writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..available_memory import available_memory
from ..byte_sizes import shown_bytes
from ..calibration_report import CalibrationReport, report_on
from ..decoders.kept_tensors import Offload
from ..errors import ArgumentError
from ..evaluate import Perplexity, perplexity
from ..formats.registry import save_model
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning, text_ids
from ..inputs.calibration import load_calibration
from ..inputs.output_folder import Reservation
from ..inputs.text import read_documents, wikitext_rows
from ..planning.pruning_plan import weights_stay_in_files
from ..progress import progress_bar, stage
from ..provenance import history_with, source_facts, with_provenance
from ..streaming.fits import LARGEST_SHARE, fits_in_memory
from ..streaming.streamed_evaluate import perplexity_of_checkpoint
from ..streaming.streamed_shrink import StreamedShrink, shrinking
from ..structures.report import ShrinkReport
from ..structures.settings import ShrinkSettings
from ..structures.shrink import shrink_model
from .console import note_slow_calibration, print_note, print_warning
from .recipe_file import CalibrationSettings
from .sources import loaded_bytes


@dataclass(frozen=True)
class Evaluation:
    """What the perplexity before and after is measured on.

    Attributes:
        text: the evaluation text, or its source.
        wikitext: the text is a raw WikiText file.
        windows, length: number of windows, and of tokens in each.
    """

    text: str
    wikitext: bool
    windows: int
    length: int

    def ids(self, tokenizer: Any, beginning: Beginning) -> torch.Tensor:
        """The tokens of the text."""
        documents = read_documents(self.text)
        if self.wikitext:
            documents = wikitext_rows("".join(documents))
        return text_ids("\n\n".join(documents), tokenizer, beginning)


@dataclass(frozen=True)
class ShrinkResults:
    """The results of a run.

    Attributes:
        facts: the content of ace_triton.json, except the list of files.
        report: what was removed.
        measured: the perplexity "before" and "after", if it was measured.
        calibrated: statistics of the calibration sequences; None if the run needs none.
    """

    facts: dict[str, Any]
    report: ShrinkReport
    measured: Mapping[str, Perplexity]
    calibrated: CalibrationReport | None


@dataclass(frozen=True)
class ShrinkRun:
    """What a command line asks for.

    Attributes:
        source, out: the dense model, and the folder for the smaller one.
        settings: what is removed and how.
        text: which calibration sequences to take.
        documents: the calibration text; None if the run needs none.
        evaluation: what the perplexity is measured on; None for no measurement.
        dtype, device: those of the model.
        trust_remote_code, overwrite, restart, offload: as for ``prune``.
        stream: True to keep the weights in files, False in memory, None for memory if the model fits.
        dry_run: write nothing.
    """

    source: str
    out: Path
    settings: ShrinkSettings
    text: CalibrationSettings
    documents: str | list[str] | None
    evaluation: Evaluation | None
    dtype: torch.dtype | str
    device: str
    trust_remote_code: bool = False
    overwrite: bool = False
    stream: bool | None = None
    restart: bool = False
    offload: Offload = "memory"
    dry_run: bool = False

    @staticmethod
    def streams(
        source: str,
        out: Path,
        settings: ShrinkSettings,
        dtype: torch.dtype | str,
        device: str,
        *,
        stream: bool | None = None,
        restart: bool = False,
        offload: Offload = "memory",
        dry_run: bool = False,
    ) -> bool:
        """Whether the weights stay in files: as the user says; if not, if the model does not fit in memory, or if this
        run resumes one that had its weights in files.

        Raises:
            ArgumentError: if the run would need more memory than there is, or options do not go together.
        """
        if stream and device != "cpu":
            raise ArgumentError("--stream shrinks on the CPU: add --device cpu, or load the model whole (--no-stream)")
        if stream is None and not restart and not dry_run and Reservation.of(out).is_unfinished:
            stream = True  # The memory that was too small for the interrupted run may be free now.
        needed = loaded_bytes(source, dtype) * _times_the_weights(settings, dry_run=dry_run)
        fits = fits_in_memory(needed)
        if stream is None and not fits and device == "cpu":
            print_note(weights_stay_in_files(needed, available_memory()))
            stream = True
        if not stream and offload == "disk":
            raise ArgumentError("--offload disk needs --stream: in memory no hidden states are kept between blocks")
        if not stream and not fits:
            raise ArgumentError(
                f"{source}: shrink needs about {shown_bytes(needed)} in memory, {shown_bytes(available_memory())} are "
                f"available: add --stream{' --device cpu' * (device != 'cpu')}, or use a machine with more memory"
            )
        return bool(stream)

    def run(self, progress: Progress) -> ShrinkResults:
        """Load, calibrate, shrink, measure and save.

        Args:
            progress: shows the stages.
        """
        return self._in_files(progress) if self.stream else self._in_memory(progress)

    def _in_memory(self, progress: Progress) -> ShrinkResults:
        held = nullcontext() if self.dry_run else self._reserved()
        with held:
            with stage(progress, "load the model"):
                model, tokenizer = checkpoint.load(
                    self.source,
                    dtype=self.dtype,
                    device=self.device,
                    trust_remote_code=self.trust_remote_code,
                    own_memory=True,
                )
            sequences, calibrated = self._calibrate(model, tokenizer, progress)
            ids = self._evaluation_ids(tokenizer)
            result = shrink_model(
                model, sequences, settings=self.settings, dry_run=self.dry_run, progress=_bars(progress)
            )
            measured = {}
            for which, of in (("before", model), ("after", result.model)) if result.model is not None else ():
                if ids is not None:
                    measured[which] = self._perplexity(
                        of, ids, tokenizer, progress_bar(progress, f"evaluate {which}", "windows")
                    )
            facts = self._facts(model, result.report, calibrated, measured)
            if result.model is not None:
                with stage(progress, "save the model"):
                    save_model(result.model, tokenizer, self.out, report=facts, overwrite=self.overwrite)
        return ShrinkResults(facts, result.report, measured, calibrated)

    def _reserved(self) -> AbstractContextManager[object]:
        return checkpoint.reserved(self.out, overwrite=self.overwrite, restart=self.restart)

    def _in_files(self, progress: Progress) -> ShrinkResults:
        with shrinking(
            self.source,
            self.out,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
            restart=self.restart,
            offload=self.offload,
            keep=not self.dry_run,
        ) as stream:
            model, tokenizer = stream.model, stream.tokenizer
            if self.dry_run:
                sequences, calibrated = self._calibrate(model, tokenizer, progress)
                report = stream.dry_run(sequences, self.settings, _bars(progress))
                return ShrinkResults(self._facts(model, report, calibrated, {}), report, {}, calibrated)
            done = stream.start(
                {
                    "settings": self.settings.to_dict(),
                    "calibration": None if self.documents is None else self.text.to_dict(),
                    "evaluation": None if self.evaluation is None else asdict(self.evaluation),
                    "dtype": str(model.dtype),
                }
            )
            if done:
                print_note(f"resuming: {done} steps are done")
            ids, calibrated = None, None
            if self.documents is not None:
                kept = stream.once("calibration", lambda: self._recorded_calibration(stream, progress))
                ids = torch.tensor(kept["ids"], dtype=torch.int64, device="cpu")
                calibrated = CalibrationReport(**kept["report"])
            report = stream.run(ids, self.settings, _bars(progress))
            measured = self._measured_in_files(stream, progress)
            facts = self._facts(model, report, calibrated, measured)
            with stage(progress, "complete the files"):
                stream.publish(facts)
        return ShrinkResults(facts, report, measured, calibrated)

    def _calibrate(self, model: Any, tokenizer: Any, progress: Progress) -> tuple[Any, CalibrationReport | None]:
        if self.documents is None:
            return None, None
        note_slow_calibration(self.dtype, model)
        sequences = load_calibration(
            self.documents,
            tokenizer,
            samples=self.text.samples,
            length=self.text.length,
            seed=self.text.seed,
            model=model,
            bos=self.text.bos,
            progress=progress_bar(progress, "calibration text", "sequences"),
        )
        with stage(progress, "check the calibration text"):
            return sequences, report_on(sequences, model, self.text.text)

    def _recorded_calibration(self, stream: StreamedShrink, progress: Progress) -> dict[str, Any]:
        sequences, report = self._calibrate(stream.model, stream.tokenizer, progress)
        assert report is not None
        return {"ids": sequences.ids.tolist(), "report": asdict(report)}

    def _evaluation_ids(self, tokenizer: Any) -> torch.Tensor | None:
        if self.evaluation is None:
            return None
        return self.evaluation.ids(tokenizer, Beginning.of(tokenizer, self.text.bos))

    def _perplexity(
        self, model: Any, ids: torch.Tensor, tokenizer: Any, bar: Callable[[int, int], None], **how: Any
    ) -> Perplexity:
        assert self.evaluation is not None
        beginning = Beginning.of(tokenizer, self.text.bos)
        of = self.evaluation
        how = how or {"progress": bar}
        return perplexity(model, ids, length=of.length, windows=of.windows, beginning=beginning, **how)

    def _measured_in_files(self, stream: StreamedShrink, progress: Progress) -> dict[str, Perplexity]:
        ids = self._evaluation_ids(stream.tokenizer)
        if ids is None or self.evaluation is None:
            return {}
        of, beginning = self.evaluation, Beginning.of(stream.tokenizer, self.text.bos)

        def before() -> dict[str, Any]:
            bar = progress_bar(progress, "evaluate before", "steps")
            logits = stream.dense.logits(bar)
            return self._perplexity(stream.model, ids, stream.tokenizer, bar, logits=logits).to_dict()

        def after() -> dict[str, Any]:
            return perplexity_of_checkpoint(
                stream.folder,
                ids,
                length=of.length,
                windows=of.windows,
                beginning=beginning,
                trust_remote_code=self.trust_remote_code,
                progress=progress_bar(progress, "evaluate after", "steps"),
            ).to_dict()

        kept = {"before": stream.once("perplexity before", before), "after": stream.once("perplexity after", after)}
        return {which: Perplexity(**found) for which, found in kept.items()}

    def _facts(
        self,
        model: Any,
        report: ShrinkReport,
        calibrated: CalibrationReport | None,
        measured: Mapping[str, Perplexity],
    ) -> dict[str, Any]:
        both = [measured[which].perplexity for which in ("before", "after")] if measured else None
        return with_provenance(
            {"shrink": report.to_dict()},
            **source_facts(self.source, self.out),
            calibration=None if calibrated is None else self.text.to_dict(),
            calibration_report=None if calibrated is None else {**calibrated.to_dict(), "seed": self.text.seed},
            perplexity={which: found.to_dict() for which, found in measured.items()} or None,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            history=history_with(checkpoint.read_report(self.source), "shrink", **report.step(both)),
        )

    def warn_if_too_large(self, report: ShrinkReport) -> None:
        """After a dry run in memory, warn if the run itself would not fit."""
        if self.stream or (estimate := report.estimate) is None:
            return
        more, available = estimate.peak_bytes - estimate.weight_bytes, available_memory()
        if more > LARGEST_SHARE * available:
            print_warning(
                f"the run needs about {shown_bytes(more)} beside the loaded model, {shown_bytes(available)} are "
                "available: add --stream"
            )


def _times_the_weights(settings: ShrinkSettings, *, dry_run: bool) -> float:
    """Bytes that a run in memory needs for each byte of the weights, at most."""
    if settings.needs_gradients:
        return 8
    return 2 if dry_run else 3


def _bars(progress: Progress) -> Callable[[str, int, int], None]:
    """A function that shows a stage's progress, with one bar for each stage."""
    bars: dict[str, Callable[..., None]] = {}

    def move(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = progress_bar(progress, name, "steps")
        bars[name](done, total)

    return move
