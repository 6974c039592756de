"""What can be added to a metric: an order of channels, a weight update, recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..prune_model import Sequential
from ..update import Update

_TURNS = {"none": "at once", "layers": "layer by layer"}


@dataclass(frozen=True)
class Recipe:
    """What is done to a model beside the choice of its masks by a metric.

    Attributes:
        permute: channels are reordered first.
        update: how kept weights are moved.
        sequential: what is pruned between two looks, as in :func:`~ace_triton.prune_model.prune_model`.
        budgets: by what the blocks' shares are set; None for the same in all.
        minutes: of recovery afterwards; None for none.
        published: nothing is added, and pruning is done as the published code does it (:mod:`.published_model`).

    Raises:
        ValueError: something added to the published form, or minutes that are none.
    """

    permute: bool = False
    update: Update | None = None
    sequential: Sequential = "blocks"
    budgets: str | None = None
    minutes: float | None = None
    published: bool = False

    def __post_init__(self) -> None:
        if self.published and replace(self, published=False) != Recipe():
            raise ValueError(f"nothing is added to a published form; got {self}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes of recovery must be above 0, or None for none; got {self.minutes}")

    @property
    def words(self) -> tuple[str, ...]:
        """("permuted", "lstsq", "12 mask rounds", "5 min of recovery"); none of the empty recipe."""
        said = ["permuted"] if self.permute else []
        said += [] if self.update is None else _words_of(self.update)
        said += [] if self.sequential == "blocks" else [_TURNS[self.sequential]]
        said += [] if self.budgets is None else [f"shares by {self.budgets}"]
        said += ["published form"] if self.published else []
        said += [] if self.minutes is None else [f"{self.minutes:g} min of recovery"]
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with all options of the update: a result keeps its meaning when a default changes."""
        return {**asdict(self), "update": None if self.update is None else self.update.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """What :meth:`to_dict` gave."""
        update = record["update"]
        return cls(**{**record, "update": None if update is None else Update.from_dict(update)})


PLAIN = Recipe()
"""Nothing is added."""


def _words_of(update: Update) -> list[str]:
    changed = {f.name: getattr(update, f.name) for f in fields(Update) if getattr(update, f.name) != f.default}
    rounds = changed.pop("mask_rounds", None)
    words = [update.kind] if rounds is None else [update.kind, f"{rounds} mask rounds"]
    return words + [f"{name}={value}" for name, value in changed.items() if name != "kind"]
