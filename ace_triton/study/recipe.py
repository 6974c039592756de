"""What can be added to a metric: a channel order, a weight update, recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import StudyError
from ..prune_blocks import Sequential
from ..solvers.update import Update

_SEQUENTIAL = {"none": "at once", "layers": "layer by layer"}


@dataclass(frozen=True)
class Recipe:
    """What is done to a model besides choosing masks by a metric.

    Attributes:
        permute: reorder channels first.
        update: how kept weights are changed; None leaves them.
        sequential: what is pruned before the model runs again, as in :func:`~ace_triton.prune_blocks.prune_model`.
        budgets: rule for the share that each block keeps; None for the same share in all.
        minutes: of recovery afterwards; None for no recovery.
        published: the method's published form with nothing added. Only a workbench with implementations of its own
            runs it (:meth:`.workbench.Workbench.prune`).

    Raises:
        ValueError: if something is added to a published form, or minutes are invalid.
    """

    permute: bool = False
    update: Update | None = None
    sequential: Sequential = "blocks"
    budgets: str | None = None
    minutes: float | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if self.published and replace(self, published=False) != Recipe():
            raise StudyError(f"nothing can be added to a published form; got {self}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise StudyError(f"minutes of recovery must be above 0, or None for no recovery; got {self.minutes}")

    @property
    def words(self) -> tuple[str, ...]:
        """("permuted", "lstsq", "12 mask rounds", "5 min of recovery"); empty if nothing is added."""
        words = ["permuted"] if self.permute else []
        words += [] if self.update is None else _words_of(self.update)
        words += [] if self.sequential == "blocks" else [_SEQUENTIAL[self.sequential]]
        words += [] if self.budgets is None else [f"shares by {self.budgets}"]
        words += ["published form"] if self.published else []
        words += [] if self.minutes is None else [f"{self.minutes:g} min of recovery"]
        return tuple(words)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options of the update, so that a result keeps its meaning if a default changes."""
        return {**asdict(self), "update": None if self.update is None else self.update.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`."""
        update = record["update"]
        return cls(**{**record, "update": None if update is None else Update.from_dict(update)})


PLAIN = Recipe()
"""A metric alone."""


def _words_of(update: Update) -> list[str]:
    changed = {f.name: getattr(update, f.name) for f in fields(Update) if getattr(update, f.name) != f.default}
    rounds = changed.pop("mask_rounds", None)
    words = [update.kind] if rounds is None else [update.kind, f"{rounds} mask rounds"]
    return words + [f"{name}={value}" for name, value in changed.items() if name != "kind"]
