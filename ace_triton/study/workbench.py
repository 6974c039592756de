"""A model held in memory with its dense weights, pruned again and again on the same texts."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..calibration import MOST_DOCUMENTS, SELF, crop, token_stream
from ..evaluate import perplexity
from ..prune_model import ModelReport, prune_model
from ..text import TextError, read_documents, wikitext_rows
from .cells import Cell
from .records import Setting


@dataclass(frozen=True)
class Protocol:
    """What a study is run on.

    Attributes:
        model: as for :func:`ace_triton.checkpoint.load`.
        calibration, evaluation: as for :func:`ace_triton.text.read_documents`.
        wikitext: the evaluation text is a raw WikiText file, whose lines are joined as its dataset's rows.
        samples: calibration sequences.
        windows, window_length: of the evaluation.
        dtype: of weights and forwards; statistics are fp32 whatever it is.
        device: where to run.
    """

    model: str
    calibration: str = "allenai/c4:en"
    evaluation: str = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    wikitext: bool = False
    samples: int = 128
    windows: int = 20
    window_length: int = 512
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


@dataclass(frozen=True)
class Pruning:
    """A pruning that was done, and the CPU seconds that the process spent on it."""

    report: ModelReport
    cpu_seconds: float


class Workbench:
    """A dense model and the texts of a study.

    Attributes:
        model, tokenizer: loaded once; the model is dense outside of :meth:`pruned`.
        setting: what is compared when a study is resumed.
        ids: int64 [n_tokens], the evaluation text.

    Raises:
        TextError: texts that cannot be read or are too short.
        CheckpointError: a model that cannot be loaded.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        if protocol.calibration == SELF:
            raise TextError('a study calibrates on text; "self" is for ace-triton prune')
        calibration = read_documents(protocol.calibration, most=MOST_DOCUMENTS)
        documents = read_documents(protocol.evaluation)
        evaluation = "\n\n".join(wikitext_rows("".join(documents)) if protocol.wikitext else documents)
        self.model, self.tokenizer = checkpoint.load(protocol.model, dtype=protocol.dtype, device=protocol.device)
        self._dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._stream = token_stream(calibration, self.tokenizer)
        self.ids = torch.tensor(self.tokenizer(evaluation, verbose=False)["input_ids"])
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
        )
        self._check_length(protocol.window_length, "--window-length")

    def check_lengths(self, lengths: tuple[int, ...]) -> None:
        """Raise TextError for a calibration length that the model or the text is too short for."""
        self._check_length(max(lengths), "--lengths")
        crop(self._stream, 1, max(lengths), seed=0)

    def calibration(self, length: int, seed: int) -> torch.Tensor:
        """Crops of the calibration text, int64 [samples, length]."""
        return crop(self._stream, self.protocol.samples, length, seed)

    def perplexity(self) -> float:
        """Of the model as it is now."""
        result = perplexity(self.model, self.ids, length=self.protocol.window_length, windows=self.protocol.windows)
        return result.perplexity

    @contextmanager
    def pruned(self, cell: Cell, **how: Any) -> Iterator[Pruning]:
        """The model is pruned inside, and dense again after.

        Args:
            cell: method, options, pattern and calibration.
            how: what else :func:`~ace_triton.prune_model.prune_model` takes (permute, update, true_sequential).
        """
        ids = None
        if cell.length is not None and cell.seed is not None:
            ids = self.calibration(cell.length, cell.seed)
        options = dict(cell.variant.options)
        try:
            start = time.process_time()
            report = prune_model(self.model, ids, cell.variant.method, cell.sparsity, **how, **options)
            yield Pruning(report, time.process_time() - start)
        finally:
            self.model.load_state_dict(self._dense)

    def _check_length(self, length: int, option: str) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and length > longest:
            raise TextError(f"{option} {length} is more than the model's {longest} positions: give a smaller one")


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _short(name: str) -> str:
    """A source's name without this machine's folders."""
    return Path(name).name if Path(name).exists() else name


def _sha256_of(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
