"""A model in memory together with its dense weights, pruned repeatedly on the same texts."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..decoders.batches import check_positions, longest_sequence
from ..errors import StudyError, TextError
from ..evaluate import perplexity
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning, Bos, own_beginning, text_ids
from ..inputs.calibration import MOST_DOCUMENTS, SELF, crop, pieces, token_stream
from ..inputs.text import read_documents, wikitext_rows
from ..inputs.written_text import TEXT_LENGTH
from ..prune_blocks import prune_model
from ..recovery.settings import RecoveryReport, RecoverySettings
from ..recovery.text import TEXT_SEQUENCES
from ..recovery.train import RecoveryProgress, recover
from ..timing import Seconds
from .cells import Cell
from .records import Evaluation, Setting


@dataclass(frozen=True)
class Protocol:
    """What a study runs on.

    Attributes:
        model: as for :func:`ace_triton.inputs.checkpoint.load`.
        calibration, evaluation: as for :func:`ace_triton.inputs.text.read_documents`.
        wikitext: whether the evaluation text is a raw WikiText file, whose lines are joined like its dataset's rows.
        samples: number of calibration sequences.
        windows, window_length: number and tokens of the evaluation windows.
        further_window_lengths: tokens of the windows of further evaluations, over the same text.
        dtype: type of weights and forwards; statistics are always fp32.
        device: where to run.
        bos: what calibration sequences and windows begin with.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        TextError: the calibration is "self".
    """

    model: str
    calibration: str = "allenai/c4:en"
    evaluation: str = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    wikitext: bool = False
    samples: int = 128
    windows: int = 20
    window_length: int = 512
    further_window_lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    bos: Bos = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.calibration == SELF:
            raise TextError('a study calibrates on text; "self" is for ace-triton prune')


@dataclass(frozen=True)
class Pruning:
    """Result of a pruning.

    Attributes:
        kept: mean share of the pruned layers' weights that is kept.
        seconds: wall clock by stage.
        cpu_seconds: CPU time of the process.
    """

    kept: float
    seconds: Seconds
    cpu_seconds: float


class Workbench:
    """A dense model and the texts of a study.

    Attributes:
        model, tokenizer: loaded once; the model is dense outside of :meth:`pruned`.
        teacher: a copy of the model that stays dense, made on first use.
        setting: what must be the same when a study is resumed.
        ids: int64 [n_tokens], the evaluation text.
        beginning: what calibration sequences and windows begin with.

    Raises:
        TextError: if a text cannot be read or is too short.
        CheckpointError: if the model cannot be loaded.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        calibration = read_documents(protocol.calibration, most=MOST_DOCUMENTS)
        documents = read_documents(protocol.evaluation)
        evaluation = "\n\n".join(wikitext_rows("".join(documents)) if protocol.wikitext else documents)
        self.model, self.tokenizer = checkpoint.load(
            protocol.model,
            dtype=protocol.dtype,
            device=protocol.device,
            trust_remote_code=protocol.trust_remote_code,
        )
        self._dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.beginning = Beginning.of(self.tokenizer, protocol.bos)
        self._stream = self.beginning.before_stream(token_stream(calibration, self.tokenizer))
        self.ids = text_ids(evaluation, self.tokenizer, self.beginning)
        self.setting = Setting(
            model=_short(protocol.model),
            weights_sha256=_sha256_of(self._dense),
            dtype=str(protocol.dtype).removeprefix("torch."),
            calibration=_short(protocol.calibration),
            calibration_sha256=hashlib.sha256("\0".join(calibration).encode()).hexdigest(),
            evaluation=_short(protocol.evaluation),
            evaluation_sha256=hashlib.sha256(evaluation.encode()).hexdigest(),
            samples=protocol.samples,
            windows=protocol.windows,
            window_length=protocol.window_length,
            further_window_lengths=protocol.further_window_lengths,
            bos=str(self.beginning) if self.beginning.of_each or own_beginning(self.tokenizer) else None,
        )
        check_positions(longest_sequence(self.model), max(self.setting.window_lengths), "--window-lengths")

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Raise TextError for a calibration length that the model or the text is too short for."""
        check_positions(longest_sequence(self.model), max(lengths), "--lengths")
        for length in (min(lengths), max(lengths)):
            crop(self._stream, 1, length, 0, self.beginning)

    def calibration(self, length: int, seed: int) -> torch.Tensor:
        """Crops of the calibration text, int64 [samples, length]."""
        return crop(self._stream, self.protocol.samples, length, seed, self.beginning)

    def perplexity(self) -> float:
        """Perplexity of the model in its present state."""
        return self._perplexity(self.setting.window_length)

    def further_perplexities(self) -> tuple[Evaluation, ...]:
        """Perplexities over windows of the setting's further lengths."""
        return tuple(Evaluation(n, self._perplexity(n)) for n in self.setting.further_window_lengths)

    @contextmanager
    def pruned(self, cell: Cell) -> Iterator[Pruning]:
        """Prune the model for the duration of a ``with`` block; recovery, if any, is left to :meth:`recover`."""
        ids = None
        if cell.length is not None and cell.seed is not None:
            ids = self.calibration(cell.length, cell.seed)
        try:
            start = time.process_time()
            kept, seconds = self.prune(cell, ids)
            yield Pruning(kept, seconds, time.process_time() - start)
        finally:
            self.model.load_state_dict(self._dense)

    def recover(
        self, settings: RecoverySettings, state: Path | None = None, progress: RecoveryProgress | None = None
    ) -> RecoveryReport:
        """Train the pruned model on the calibration text, in pieces chosen by the settings' seed.

        Args:
            settings: as for :func:`ace_triton.recover`.
            state: file that an interrupted training resumes from; None to keep none.
            progress: called after each step.
        """
        length = min(TEXT_LENGTH, longest_sequence(self.model) or TEXT_LENGTH)
        ids = pieces(self._stream, TEXT_SEQUENCES, length, settings.seed, self.beginning)
        return recover(self.model, self.teacher, ids, settings, state=state, progress=progress)

    def prune(self, cell: Cell, ids: torch.Tensor | None) -> tuple[float, Seconds]:
        """Prune the model in place; a subclass can add implementations of its own.

        Args:
            cell: what to run.
            ids: calibration sequences, int64 [samples, length]; None for a method without calibration.

        Returns:
            the mean share of the pruned layers' weights that is kept, and wall-clock seconds by stage.

        Raises:
            ValueError: for a published form, which this class does not have.
        """
        if cell.published:
            raise StudyError(f"{cell}: published forms of methods are not part of ace_triton")
        report = prune_model(self.model, ids, cell.recipe)
        return sum(layer.kept for layer in report.layers) / len(report.layers), report.seconds

    @cached_property
    def teacher(self) -> Any:
        """A copy of the dense model."""
        teacher = copy.deepcopy(self.model)
        teacher.load_state_dict(self._dense)
        return teacher

    def _perplexity(self, length: int) -> float:
        windows = self.setting.windows_of(length)
        return perplexity(self.model, self.ids, length=length, windows=windows, beginning=self.beginning).perplexity


def processor_name() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _short(name: str) -> str:
    """A source's name without folders."""
    return Path(name).name if Path(name).exists() else name


def _sha256_of(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
