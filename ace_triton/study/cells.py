"""What a study runs: every method at every sparsity, calibration length and seed, the cheap ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import StudyError
from ..recipe import Recipe
from ..sparsity import Sparsity
from .recipe import PLAIN, StudyRecipe


@dataclass(frozen=True)
class Variant:
    """A method with its options, and what is added to it.

    Attributes:
        method: name of a metric.
        options: pairs of name and value; values equal to the metric's defaults are dropped.
        recipe: what is added.

    Raises:
        ValueError: if the metric or one of the options is unknown.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    recipe: StudyRecipe = PLAIN

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(Recipe(self.method, dict(self.options)).options.items()))

    @property
    def label(self) -> str:
        """ "ace", or "ace:base=wanda+reduce=abs, permuted"."""
        pairs = "+".join(f"{name}={value}" for name, value in self.options)
        return ", ".join([f"{self.method}:{pairs}" if pairs else self.method, *self.recipe.words])

    @property
    def alone(self) -> Variant:
        """The same method with nothing added."""
        return self.with_recipe(PLAIN)

    def with_recipe(self, recipe: StudyRecipe) -> Variant:
        """The same method with another recipe."""
        return replace(self, recipe=recipe)

    @property
    def complete(self) -> dict[str, Any]:
        """All options, including the metric's defaults."""
        return Recipe(self.method, dict(self.options)).complete_options

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on calibration tokens."""
        return replace(self.recipe, permute=False).of(self.method, dict(self.options)).calibrated


@dataclass(frozen=True)
class Cell:
    """One pruning.

    Attributes:
        variant: the method, and what is added to it.
        sparsity: "2:4", or the pruned fraction as "0.5".
        length: tokens in a calibration sequence; None for a method without calibration.
        seed: random seed of the calibration samples; None for a method without calibration.
    """

    variant: Variant
    sparsity: str
    length: int | None
    seed: int | None

    @classmethod
    def of(cls, variant: Variant, sparsity: str, length: int, seed: int) -> Cell:
        """A pruning; length and seed are dropped for a method without calibration."""
        return cls(variant, sparsity, length, seed) if variant.calibrated else cls(variant, sparsity, None, None)

    def __str__(self) -> str:
        drawn = "" if self.length is None else f", L={self.length}, seed {self.seed}"
        return f"{self.variant.label}, {self.sparsity}{drawn}"

    @property
    def recipe(self) -> Recipe:
        """What the pruning does; RecipeError if its parts do not go together."""
        return self.variant.recipe.of(self.variant.method, dict(self.variant.options), self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options, so that a result keeps its meaning if a default changes."""
        recipe = self.variant.recipe
        return {
            "method": self.variant.method,
            "options": self.variant.complete,
            "sparsity": self.sparsity,
            "length": self.length,
            "seed": self.seed,
            **({} if recipe == PLAIN else {"recipe": recipe.to_dict()}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """The inverse of :meth:`to_dict`."""
        recipe = StudyRecipe.from_dict(record["recipe"]) if "recipe" in record else PLAIN
        variant = Variant(record["method"], tuple(record["options"].items()), recipe)
        return cls(variant, record["sparsity"], record["length"], record["seed"])


@dataclass(frozen=True)
class Grid:
    """The cells of one call of a study.

    Attributes:
        variants: the methods.
        sparsities: patterns or pruned fractions, as :class:`~ace_triton.sparsity.Sparsity` takes them.
        lengths: tokens in a calibration sequence.
        seeds: random seeds of the calibration samples.

    Raises:
        ValueError: if an axis is empty or has an invalid value.
    """

    variants: tuple[Variant, ...]
    sparsities: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        check_axes(self.lengths, variants=self.variants, sparsities=self.sparsities, seeds=self.seeds)
        object.__setattr__(self, "sparsities", tuple(str(Sparsity(pattern)) for pattern in self.sparsities))

    def cells(self) -> list[Cell]:
        """All cells, each once, in an order that makes an interrupted study most useful.

        Methods without calibration come first. Then every method and sparsity runs at the shortest length and the first
        seed, before longer sequences and further seeds.
        """
        free = [variant for variant in self.variants if not variant.calibrated]
        drawn = [variant for variant in self.variants if variant.calibrated]
        ordered = [Cell(variant, sparsity, None, None) for sparsity in self.sparsities for variant in free]
        for length, seed in draws(self.lengths, self.seeds):
            ordered += [Cell(variant, sparsity, length, seed) for sparsity in self.sparsities for variant in drawn]
        return list(dict.fromkeys(ordered))

    @property
    def shown(self) -> tuple[int, int]:
        """Length and seed of the cells whose text is shown."""
        return shown_draw(self.lengths, self.seeds)


def check_axes(lengths: Sequence[int], **axes: Sequence[Any]) -> None:
    """ValueError for an empty axis or an invalid length."""
    for name, axis in {"lengths": lengths, **axes}.items():
        if not axis:
            raise StudyError(f"a study needs at least one of its {name}, got none")
    if min(lengths) < 2:
        raise StudyError(f"a calibration sequence needs at least 2 tokens, got {min(lengths)}")


def draws(lengths: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, int]]:
    """Length and seed of every calibration sample, by rising product of the length and the seed's rank."""
    ranked = [(length * rank, length, seed) for length in lengths for rank, seed in enumerate(seeds, 1)]
    return [(length, seed) for _, length, seed in sorted(ranked)]


def shown_draw(lengths: Sequence[int], seeds: Sequence[int]) -> tuple[int, int]:
    """Length and seed of the cells whose text is shown: the length nearest 128, and the first seed."""
    return min(lengths, key=lambda length: (abs(length - 128), length)), seeds[0]
