"""The measured forms of one model in docs/tradeoff.json, and which of them no other form beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .machines import title
from .tradeoff_forms import DENSE, DENSE_FORM, STEP_FORMS, Form

SPEED_WORDS = "times the tokens a second of dense fp32"
"""What all speeds are: each is measured beside the dense model in float32, in the same rounds."""


@dataclass(frozen=True)
class Point:
    """A measured form.

    Attributes:
        form: the form.
        perplexity: on the evaluation text.
        size: bytes of a weight in the blocks.
        file_bytes: bytes of the weights' files; None for the dense model in transformers.
        faster: tokens a second over those of the dense model in float32, 1 for that model; None if not measured. It
            depends on the machine; nothing else does.
    """

    form: Form
    perplexity: float
    size: float
    file_bytes: int | None
    faster: float | None

    @property
    def pruned(self) -> bool:
        """True if the form is pruned."""
        return bool(self.form.pattern)


Cost = Callable[[Point], float]


def machines_of(content: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The machines on which speeds of a model were measured: the shown one, then the newest first."""

    def order(machine: dict[str, Any]) -> tuple[bool, str]:
        return title(machine["environment"]) == content.get("shown"), max(entry["date"] for entry in machine["speed"])

    return sorted(found["machines"], key=order, reverse=True)


def shown_speeds(content: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The speeds of a model on the machine that the README and the picture show; empty if none were measured there."""
    shown = (m["speed"] for m in found["machines"] if title(m["environment"]) == content.get("shown"))
    return next(shown, [])


def points_of(found: dict[str, Any], speeds: Sequence[dict[str, Any]] = ()) -> list[Point]:
    """The points of one model whose perplexity was measured.

    Args:
        found: the results of the model.
        speeds: those of its speeds that were measured on one machine.
    """
    faster = {Form(**entry["form"]): entry["over_dense"] for entry in speeds}
    if faster:
        faster[DENSE_FORM] = 1.0
    points = []
    for entry in found["perplexity"]:
        form = Form(**entry["form"])
        sizes = entry["bytes_per_weight"], entry["file_bytes"]
        points.append(Point(form, entry["perplexity"], *sizes, faster.get(form)))
    measured = {point.form: point for point in points}
    for form in STEP_FORMS:
        same = measured.get(Form(DENSE, "", form.weights))
        if form in faster and same is not None:
            points.append(replace(same, form=form, faster=faster[form]))
    return sorted(points, key=lambda point: (point.pruned, -point.size))


def size_cost(point: Point) -> float:
    """Smaller is better."""
    return point.size


def speed_cost(point: Point) -> float:
    """Time of a token, over the dense model's."""
    assert point.faster is not None
    return 1 / point.faster


def front_of(points: Sequence[Point], cost: Cost) -> list[Point]:
    """The points that no other beats in perplexity and cost, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), point.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front


def best(points: Iterable[Point]) -> Point | None:
    """The point with the lowest perplexity."""
    return min(points, key=lambda point: point.perplexity, default=None)
