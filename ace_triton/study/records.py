"""What a study finds, as records that live in its journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Setting:
        """What :meth:`to_dict` gave."""
        return cls(**record)


@dataclass(frozen=True)
class DenseResult:
    """The unpruned model's perplexity."""

    perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DenseResult:
        """What :meth:`to_dict` gave."""
        return cls(**record)


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a pruning: calibration forwards, statistics, score and mask, and all of it."""

    calibration: float
    statistics: float
    select: float
    total: float

    @classmethod
    def of(cls, seconds: Seconds) -> StageSeconds:
        """What a report says."""
        return cls(seconds.calibration, seconds.statistics, seconds.select, seconds.total)


@dataclass(frozen=True)
class CellResult:
    """One cell, measured.

    Attributes:
        cell: what was run.
        perplexity: after pruning.
        kept: share of the pruned layers' weights that is left.
        seconds: wall clock of pruning by stage, loading and evaluation left out.
        cpu_seconds: CPU time of the process over the same span, all threads together.
        processor: what it ran on.
        threads: torch's.
    """

    cell: Cell
    perplexity: float
    kept: float
    seconds: StageSeconds
    cpu_seconds: float
    processor: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "cell": self.cell.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CellResult:
        """What :meth:`to_dict` gave."""
        return cls(**{**record, "cell": Cell.from_dict(record["cell"]), "seconds": StageSeconds(**record["seconds"])})


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
