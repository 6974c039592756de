"""What a study adds to a metric: a channel order, a weight update, recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import StudyError
from ..recipe import Recipe, Sequential
from ..solvers.update import Update


@dataclass(frozen=True)
class StudyRecipe:
    """The parts of a :class:`~ace_triton.recipe.Recipe` beside method, options and sparsity, and what follows pruning.

    Attributes:
        permute, update, sequential, budgets: as in :class:`~ace_triton.recipe.Recipe`.
        minutes: of recovery afterwards; None for no recovery.
        published: the method's published form with nothing added. Only a workbench with implementations of its own
            runs it (:meth:`.workbench.Workbench.prune`).

    Raises:
        StudyError: if something is added to a published form, or minutes are invalid.
        RecipeError: if another part is invalid.
    """

    permute: bool = False
    update: Update | None = None
    sequential: Sequential = "blocks"
    budgets: str | None = None
    minutes: float | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if self.published and replace(self, published=False) != StudyRecipe():
            raise StudyError(f"nothing can be added to a published form; got {self}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise StudyError(f"minutes of recovery must be above 0, or None for no recovery; got {self.minutes}")
        self.of("magnitude")

    def of(self, method: str, options: Mapping[str, Any] | None = None, sparsity: str = "2:4") -> Recipe:
        """The whole recipe of a method; RecipeError if its parts do not go together."""
        return Recipe(
            method,
            options,
            sparsity,
            update=self.update,
            permute=self.permute,
            sequential=self.sequential,
            budgets=self.budgets,
        )

    @property
    def words(self) -> tuple[str, ...]:
        """("permuted", "lstsq", "12 mask rounds", "5 min of recovery"); empty if nothing is added."""
        words = list(self.of("magnitude").additions)
        words += ["published form"] if self.published else []
        words += [] if self.minutes is None else [f"{self.minutes:g} min of recovery"]
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options of the update, so that a result keeps its meaning if a default changes."""
        return {**asdict(self), "update": None if self.update is None else self.update.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StudyRecipe:
        """The inverse of :meth:`to_dict`."""
        update = record["update"]
        return cls(**{**record, "update": None if update is None else Update.from_dict(update)})


PLAIN = StudyRecipe()
"""A metric alone."""
