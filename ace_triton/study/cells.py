"""What a study runs: every method at every sparsity, calibration length and seed, the cheap ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import StudyError
from ..recipe import Recipe
from ..solvers.update import Update
from ..sparsity import Sparsity


@dataclass(frozen=True)
class Cell:
    """One pruning of a study: a recipe, and what only the study knows.

    Attributes:
        recipe: what pruning does, with its sparsity.
        length: tokens in a calibration sequence; None for a recipe without calibration.
        seed: random seed of the calibration samples; None for a recipe without calibration.
        minutes: of recovery afterwards; None for no recovery.
        published: the method's published form with nothing added. Only a workbench with implementations of its own
            runs it (:meth:`.workbench.Workbench.prune`).

    Raises:
        StudyError: if something is added to a published form, minutes are invalid, or the recipe has include, exclude,
            an axis, a scope, or a fraction of more than 4 digits.
    """

    recipe: Recipe
    length: int | None = None
    seed: int | None = None
    minutes: float | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if self.published and (self.recipe.additions or self.minutes is not None):
            raise StudyError(f"nothing can be added to a published form; got {self}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise StudyError(f"minutes of recovery must be above 0, or None for no recovery; got {self.minutes}")
        everywhere = self.recipe.include is None and not self.recipe.exclude
        if not everywhere or Sparsity.of(self.sparsity) != self.recipe.sparsity:
            raise StudyError(
                "a study prunes all layers, to n:m or to a fraction of every row with at most 4 digits: leave include, "
                f"exclude, axis and scope out; got {self.recipe}"
            )

    @property
    def sparsity(self) -> str:
        """ "2:4", or the pruned fraction as "0.5"."""
        return str(self.recipe.sparsity)

    @property
    def additions(self) -> tuple[str, ...]:
        """("permuted", "lstsq", "12 mask rounds", "5 min of recovery"); empty for a metric alone."""
        return (*self.recipe.additions, *self._words)

    @property
    def label(self) -> str:
        """ "ace", or "ace:base=wanda+reduce=abs, permuted"; without the sparsity."""
        return ", ".join([self.recipe.words, *self._words])

    @property
    def _words(self) -> tuple[str, ...]:
        """What the study adds to the recipe."""
        recovery = () if self.minutes is None else (f"{self.minutes:g} min of recovery",)
        return ("published form", *recovery) if self.published else recovery

    @cached_property
    def variant(self) -> Cell:
        """The same at 2:4, which every recipe allows, without length and seed: equal for all cells that a table or
        figure compares over sparsities, lengths and seeds."""
        return replace(self.with_recipe(sparsity="2:4"), length=None, seed=None)

    @cached_property
    def alone(self) -> Cell:
        """The metric with nothing added, at the same sparsity, length and seed."""
        recipe = Recipe(self.recipe.method, self.recipe.options, self.recipe.sparsity)
        return Cell(recipe, self.length, self.seed)

    def with_recipe(self, **parts: Any) -> Cell:
        """The same with some parts of the recipe replaced."""
        return replace(self, recipe=replace(self.recipe, **parts))

    def at(self, sparsity: str, length: int | None = None, seed: int | None = None) -> Cell:
        """The same at another sparsity, length and seed; a recipe without calibration drops length and seed."""
        draw = {"length": length, "seed": seed} if self.recipe.calibrated else {"length": None, "seed": None}
        return replace(self.with_recipe(sparsity=sparsity), **draw)

    def __str__(self) -> str:
        drawn = "" if self.length is None else f", L={self.length}, seed {self.seed}"
        return f"{self.label}, {self.sparsity}{drawn}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options, so that a result keeps its meaning if a default changes."""
        recipe = self.recipe.to_dict()
        parts = ("rotate", "permute", "update", "sequential", "budgets", "quantize")
        added = {name: recipe[name] for name in parts if name in recipe}
        return {
            "method": recipe["method"],
            "options": recipe["options"],
            "sparsity": self.sparsity,
            "length": self.length,
            "seed": self.seed,
            **({"recipe": {**added, "minutes": self.minutes, "published": self.published}} if self.additions else {}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Cell:
        """The inverse of :meth:`to_dict`."""
        added = dict(record.get("recipe", {}))
        own = {name: added.pop(name) for name in ("minutes", "published") if name in added}
        if added.get("update") is not None:
            added["update"] = Update.from_dict(added["update"])
        parts = {name: record[name] for name in ("method", "options", "sparsity")}
        return cls(Recipe.from_dict(parts | added), record["length"], record["seed"], **own)


@dataclass(frozen=True)
class Grid:
    """The cells of one call of a study.

    Attributes:
        variants: the recipes, whatever their sparsity.
        sparsities: patterns or pruned fractions, as :class:`~ace_triton.sparsity.Sparsity` takes them.
        lengths: tokens in a calibration sequence.
        seeds: random seeds of the calibration samples.

    Raises:
        ValueError: if an axis is empty or has an invalid value.
    """

    variants: tuple[Cell, ...]
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
        pairs = [(variant, sparsity) for sparsity in self.sparsities for variant in self.variants]
        ordered = [variant.at(sparsity) for variant, sparsity in pairs if not variant.recipe.calibrated]
        for length, seed in draws(self.lengths, self.seeds):
            ordered += [variant.at(sparsity, length, seed) for variant, sparsity in pairs]
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
