"""What a study runs: every method at every sparsity, calibration length and seed, cheap ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..metrics import metric
from ..sparsity import Sparsity


@dataclass(frozen=True)
class Variant:
    """A method with some of its options set.

    Attributes:
        method: a metric's name.
        options: as pairs; those equal to the metric's defaults are dropped.

    Raises:
        ValueError: no such metric, or no such option of it.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        defaults = metric(self.method).options
        given = metric(self.method).complete(dict(self.options))
        kept = tuple((name, value) for name, value in given.items() if value != defaults[name])
        object.__setattr__(self, "options", kept)

    @property
    def label(self) -> str:
        """ "ace", or "ace:base=wanda+reduce=abs"."""
        pairs = "+".join(f"{name}={value}" for name, value in self.options)
        return f"{self.method}:{pairs}" if pairs else self.method

    @property
    def complete(self) -> dict[str, Any]:
        """All options, the metric's defaults among them."""
        return metric(self.method).complete(dict(self.options))

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on calibration tokens."""
        return metric(self.method).needs(self.complete).tokens


@dataclass(frozen=True)
class Cell:
    """One pruning.

    Attributes:
        variant: the method.
        sparsity: "2:4", or the pruned fraction as "0.5".
        length: tokens of a calibration sequence; None where the method looks at none.
        seed: of the calibration crops; None likewise.
    """

    variant: Variant
    sparsity: str
    length: int | None
    seed: int | None

    def __str__(self) -> str:
        drawn = "" if self.length is None else f", L={self.length}, seed {self.seed}"
        return f"{self.variant.label}, {self.sparsity}{drawn}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options: a result keeps its meaning when a default changes."""
        return {
            "method": self.variant.method,
            "options": self.variant.complete,
            "sparsity": self.sparsity,
            "length": self.length,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """What :meth:`to_dict` gave."""
        variant = Variant(record["method"], tuple(record["options"].items()))
        return cls(variant, record["sparsity"], record["length"], record["seed"])


@dataclass(frozen=True)
class Grid:
    """The cells of one call of a study.

    Attributes:
        variants: the methods.
        sparsities: patterns or pruned fractions, as :class:`~ace_triton.sparsity.Sparsity` takes them.
        lengths: tokens of a calibration sequence.
        seeds: of the calibration crops.

    Raises:
        ValueError: an axis is empty, or holds what is no sparsity, length or seed.
    """

    variants: tuple[Variant, ...]
    sparsities: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for axis in ("variants", "sparsities", "lengths", "seeds"):
            if not getattr(self, axis):
                raise ValueError(f"a study needs at least one of its {axis}, got none")
        if min(self.lengths) < 2:
            raise ValueError(f"a calibration sequence needs at least 2 tokens, got {min(self.lengths)}")
        object.__setattr__(self, "sparsities", tuple(str(Sparsity(pattern)) for pattern in self.sparsities))

    def cells(self) -> list[Cell]:
        """All cells, each once, ordered so that a study stopped early is worth most.

        Methods without calibration come first; then length times seed rank rises: every method and
        sparsity at the shortest length and first seed, before longer sequences and further seeds.
        """
        ranked = [(length * rank, length, seed) for length in self.lengths for rank, seed in enumerate(self.seeds, 1)]
        draws = [(length, seed) for _, length, seed in sorted(ranked)]
        free = [variant for variant in self.variants if not variant.calibrated]
        drawn = [variant for variant in self.variants if variant.calibrated]
        ordered = [Cell(variant, sparsity, None, None) for sparsity in self.sparsities for variant in free]
        for length, seed in draws:
            ordered += [Cell(variant, sparsity, length, seed) for sparsity in self.sparsities for variant in drawn]
        return list(dict.fromkeys(ordered))

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown: the first seed, the length nearest 128."""
        return min(self.lengths, key=lambda length: (abs(length - 128), length)), self.seeds[0]
