"""What a study finds, as records that live in its journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ..recover import RecoveryReport
from ..timing import Seconds
from .cells import Cell

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Record(Protocol):
    """A line of the journal."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a study have in common; another setting is another study.

    Attributes:
        model: its name, without folders.
        weights_sha256: of all its tensors.
        dtype: of weights and forwards.
        calibration, evaluation: names of the texts, without folders.
        calibration_sha256, evaluation_sha256: of the texts.
        samples: calibration sequences.
        windows, window_length: of the evaluation.
        further_window_lengths: of further evaluations over the same tokens.
        bos: what sequences and windows begin with, as "each (1)" with the token id; None if the tokenizer has no
            beginning of its own and none was asked for.
    """

    model: str
    weights_sha256: str
    dtype: str
    calibration: str
    calibration_sha256: str
    evaluation: str
    evaluation_sha256: str
    samples: int
    windows: int
    window_length: int
    further_window_lengths: tuple[int, ...] = ()
    bos: str | None = None

    @property
    def window_lengths(self) -> tuple[int, ...]:
        """All of them."""
        return self.window_length, *self.further_window_lengths

    def with_windows(self, further: Sequence[int]) -> Setting:
        """The same with those further lengths too, ascending."""
        lengths = {*self.further_window_lengths, *further} - {self.window_length}
        return replace(self, further_window_lengths=tuple(sorted(lengths)))

    def windows_of(self, length: int) -> int:
        """How many windows of that length are evaluated: as many tokens at every length, or a single window."""
        return max(1, self.windows * self.window_length // length)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; what is empty is left out."""
        return without_empty(asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Setting:
        """What :meth:`to_dict` gave."""
        return cls(**{**record, "further_window_lengths": tuple(record.get("further_window_lengths", ()))})


def without_empty(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is None or an empty tuple, as records were before there was such a thing."""
    return {name: value for name, value in record.items() if value is not None and value != ()}


@dataclass(frozen=True)
class Evaluation:
    """A perplexity over windows of ``length`` tokens."""

    length: int
    perplexity: float


def evaluations(record: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """The ``further`` of a record as JSON types, which may have none."""
    return tuple(Evaluation(**entry) for entry in record.get("further", ()))


@dataclass(frozen=True)
class DenseResult:
    """The unpruned model's perplexity.

    Attributes:
        perplexity: over windows of the setting's length.
        further: over windows of its further lengths.
    """

    perplexity: float
    further: tuple[Evaluation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return without_empty(asdict(self))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DenseResult:
        """What :meth:`to_dict` gave."""
        return cls(**{**record, "further": evaluations(record)})


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a pruning: calibration forwards, statistics, score and mask with updates, and all of it."""

    calibration: float
    statistics: float
    select: float
    total: float

    @classmethod
    def of(cls, seconds: Seconds) -> StageSeconds:
        """What a report says."""
        return cls(seconds.calibration, seconds.statistics, seconds.select + seconds.update, seconds.total)


@dataclass(frozen=True)
class RecoveryCost:
    """What a recovery took.

    Attributes:
        steps, tokens: trained on.
        seconds: wall clock.
        cpu_seconds: CPU time of the process over the same span, all threads together.
    """

    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, report: RecoveryReport) -> RecoveryCost:
        """What a report says."""
        return cls(report.steps, report.tokens, report.seconds, report.cpu_seconds)


@dataclass(frozen=True)
class CellResult:
    """One cell, measured.

    Attributes:
        cell: what was run.
        perplexity: in the end, over windows of the setting's length.
        kept: share of the pruned layers' weights that is left.
        seconds: wall clock of pruning by stage, loading and evaluation left out.
        cpu_seconds: CPU time of the process over the same span, all threads together.
        processor: what it ran on.
        threads: torch's.
        further: perplexity over windows of the setting's further lengths.
        recovery: what the training afterwards took; None where there was none.
    """

    cell: Cell
    perplexity: float
    kept: float
    seconds: StageSeconds
    cpu_seconds: float
    processor: str
    threads: int
    further: tuple[Evaluation, ...] = ()
    recovery: RecoveryCost | None = None

    @property
    def cpu_seconds_in_all(self) -> float:
        """Of pruning and of recovery."""
        return self.cpu_seconds + (0.0 if self.recovery is None else self.recovery.cpu_seconds)

    @property
    def seconds_in_all(self) -> float:
        """Wall clock of pruning and of recovery."""
        return self.seconds.total + (0.0 if self.recovery is None else self.recovery.seconds)

    def perplexity_over(self, further_length: int) -> float:
        """Over windows of one of the setting's further lengths; NaN where that was not measured."""
        return next((found.perplexity for found in self.further if found.length == further_length), math.nan)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; what is empty is left out."""
        return {**without_empty(asdict(self)), "cell": self.cell.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CellResult:
        """What :meth:`to_dict` gave."""
        recovery = record.get("recovery")
        typed = {
            "cell": Cell.from_dict(record["cell"]),
            "seconds": StageSeconds(**record["seconds"]),
            "further": evaluations(record),
            "recovery": None if recovery is None else RecoveryCost(**recovery),
        }
        return cls(**{**record, **typed})


@dataclass(frozen=True)
class Pole:
    """How near VarP's 1 / (1 - y) comes to its pole over one input.

    Attributes:
        norm: the normaliser.
        largest: the largest f_j = mean_s 1 / (1 - y_sj) of a channel.
        channels: channels with f_j of 10 or more, as a steady channel has at y = 0.9.
    """

    norm: str
    largest: float
    channels: int


@dataclass(frozen=True)
class InputNorms:
    """The norms n_j of one distinct input's channels over the calibration set, in the dense model.

    Attributes:
        block: index of the decoder block.
        layers: names of the layers that read it, within the block.
        channels: how many.
        median, largest: of n_j.
        histogram: channels by log10 n_j, in the bins of :data:`~ace_triton.study.norms.BIN_EDGES`; the ends
            take what lies beyond.
        poles: for each normaliser of VarP.
    """

    block: int
    layers: tuple[str, ...]
    channels: int
    median: float
    largest: float
    histogram: tuple[int, ...]
    poles: tuple[Pole, ...]


@dataclass(frozen=True)
class ModelNorms:
    """All inputs of the dense model, at one calibration length."""

    length: int
    inputs: tuple[InputNorms, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelNorms:
        """What :meth:`to_dict` gave."""
        inputs = tuple(
            InputNorms(
                **{
                    **entry,
                    "layers": tuple(entry["layers"]),
                    "histogram": tuple(entry["histogram"]),
                    "poles": tuple(Pole(**pole) for pole in entry["poles"]),
                }
            )
            for entry in record["inputs"]
        )
        return cls(record["length"], inputs)


@dataclass(frozen=True)
class Divergence:
    """How far a pruned model's next-token distributions lie from the dense model's.

    Attributes:
        mean: of KL(dense || pruned) over positions, in nats.
        quantiles: of the same, at :data:`QUANTILES`.
        agreement: share of positions where both rank the same token first.
        tokens: positions.
    """

    mean: float
    quantiles: tuple[float, ...]
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Sample:
    """What a model writes.

    Attributes:
        cell: the pruning; None for the dense model.
        prompts, texts: the beginnings, and how the model goes on (greedy).
        divergence: from the dense model; None for the dense model itself.
    """

    cell: Cell | None
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "cell": None if self.cell is None else self.cell.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sample:
        """What :meth:`to_dict` gave."""
        far = record["divergence"]
        return cls(
            None if record["cell"] is None else Cell.from_dict(record["cell"]),
            tuple(record["prompts"]),
            tuple(record["texts"]),
            None if far is None else Divergence(**{**far, "quantiles": tuple(far["quantiles"])}),
        )
