"""The protocol of a statistic of a layer's input, and the registry of statistics.

Your own statistic is a class of this form; a metric asks for it with ``Needs(parts=[Peaks])``, and reads it with
``stats.part(Peaks)``::

    @register_statistic("peaks")
    class Peaks(Statistic):
        forms = {"largest": TensorForm("j")}
        largest = None

        def update(self, tokens, valid=None): ...
        def __add__(self, other): ...
        def reordered(self, order): ...
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch

from ..errors import StatsError

Kind = TypeVar("Kind", bound="Statistic")

RESERVED = {"format", "in_features", "count", "consumer_norm"}
"""Names in a file of statistics that no statistic can have."""


@dataclass(frozen=True)
class TensorForm:
    """The form that a saved tensor must have; it is checked when a file is read.

    Attributes:
        shape: one letter per dimension. "j" is in_features, "i" out_features, "s" the number of sequences. Any other
            letter is a length of your own, the same for all tensors of the statistic.
        dtypes: allowed dtypes.
        signed: True if negative values are allowed.
        optional: True if the statistic may be saved without this tensor.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    signed: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Saved:
    """What a file holds of one statistic; everything was checked against the statistic's ``forms``.

    Attributes:
        in_features: number of channels.
        count: tokens seen, padding left out.
        tensors: the tensors, on the CPU, by their names in ``forms``.
        facts: the values of ``fact_names``.
    """

    in_features: int
    count: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Statistic(ABC):
    """A statistic of the tokens that a layer reads, one part of an :class:`ActivationStats`.

    A class derives from it, is registered with :func:`register_statistic`, and defines :attr:`forms`, :meth:`update`,
    ``+`` and :meth:`reordered`. The other methods follow from ``forms``: each of its names is an attribute of the
    object, a tensor, or None before the first update. Splitting the tokens into other batches may change the result by
    rounding only.

    Attributes:
        name: the registered name; names of tensors in a file begin with it.
        words: the statistic in an error message.
        forms: for each tensor that is saved, the name of its attribute and its form.
        fact_names: attributes that are saved in the header of the file, as JSON values.
        file_prefix: what the names of its tensors in a file begin with. Default: the name and a dot.
        in_place: True if :meth:`update` changes tensors in place. It must then accept any batch, because it cannot be
            undone if another part refuses the batch.
        of_outputs: True for the statistics of a layer's outputs, which no statistic of yours can be.

    Args:
        in_features: number of channels.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    forms: ClassVar[Mapping[str, TensorForm]] = {}
    fact_names: ClassVar[tuple[str, ...]] = ()
    file_prefix: ClassVar[str]
    in_place: ClassVar[bool] = False
    of_outputs: ClassVar[bool] = False

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features

    @abstractmethod
    def update(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Add a batch: set attributes anew, and change no tensor in place.

        Args:
            tokens: [n_tokens, in_features] as one sequence, or [n_sequences, length, in_features]; fp32, fp16 or bf16.
            valid: bool, the shape of ``tokens`` without its last axis; False leaves a token out (padding).
        """

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """The statistic of the tokens of both; neither operand changes. Either may have seen no token."""

    @abstractmethod
    def reordered(self, order: torch.Tensor) -> Self:
        """A copy with reordered channels: position p gets channel ``order[p]``, int64 [in_features]."""

    def draw_for_lane(self, lane: int) -> None:  # noqa: B027 (most statistics draw nothing)
        """Use other random numbers than in other lanes, which are parts of the tokens that are merged later.

        The default does nothing.
        """

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        moved = copy.copy(self)
        for name, tensor in self.tensors().items():
            setattr(moved, name, tensor.to(device, copy=True))
        return moved

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors to save, by their names in :attr:`forms`; empty before the first update."""
        found = {name: getattr(self, name) for name in self.forms}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """The values of :attr:`fact_names`."""
        return {name: getattr(self, name) for name in self.fact_names}

    @classmethod
    def load(cls, saved: Saved) -> Self:
        """The statistic from what :meth:`tensors` and :meth:`facts` gave when it was saved.

        Raises:
            StatsError: the tensors or facts are inconsistent.
        """
        loaded = cls(saved.in_features)
        for name, value in {**saved.facts, **saved.tensors}.items():
            setattr(loaded, name, value)
        return loaded


_REGISTRY: dict[str, type[Statistic]] = {}


def register_statistic(name: str, *, words: str | None = None) -> Callable[[type[Kind]], type[Kind]]:
    """Decorator: register a :class:`Statistic`, so that metrics can ask for it and files can hold it.

    Args:
        name: a Python identifier; tensors in a file are named ``name.tensor``.
        words: the statistic in an error message, as in "a Gram matrix". Default: the name in quotes.

    Raises:
        StatsError: the name is invalid or taken, or the class lacks a part of the protocol.
    """

    def register(kind: type[Kind]) -> type[Kind]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or name in RESERVED:
            raise StatsError(
                f"{name!r} cannot be the name of a statistic: use small letters, digits and underscores, and none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        if not (isinstance(kind, type) and issubclass(kind, Statistic)):
            raise StatsError(f"the statistic {name!r} must be a class derived from ace_triton.Statistic, got {kind!r}")
        if missing := sorted(kind.__abstractmethods__):
            raise StatsError(f"the statistic {name!r} lacks {', '.join(missing)}: define them in {kind.__name__}")
        if not kind.forms:
            raise StatsError(f"the statistic {name!r} has no forms: name the tensors that are saved, and their form")
        if name in _REGISTRY and _REGISTRY[name].__module__ != kind.__module__:
            raise StatsError(f"there is a statistic {name!r} already: choose another name")
        kind.name, kind.words = name, words or f"the statistic {name!r}"
        if "file_prefix" not in vars(kind):
            kind.file_prefix = f"{name}."
        _REGISTRY[name] = kind
        return kind

    return register


def statistics() -> Mapping[str, type[Statistic]]:
    """All registered statistics by name."""
    return dict(_REGISTRY)


def check_registered(kind: object) -> None:
    """StatsError unless ``kind`` is a registered class."""
    if not isinstance(kind, type) or kind not in _REGISTRY.values():
        raise StatsError(
            f"{kind!r} is no registered statistic: pass a class that is decorated with ace_triton.register_statistic"
        )


def input_statistics(kinds: Iterable[type[Statistic]]) -> tuple[type[Statistic], ...]:
    """The classes as a tuple; StatsError unless all are registered and need nothing but the layer's input."""
    if isinstance(kinds, type):
        raise StatsError(f"parts must be a list of classes, got the class {kinds.__name__}: use [{kinds.__name__}]")
    wanted = tuple(kinds)
    for kind in wanted:
        check_registered(kind)
        if kind.of_outputs:
            raise StatsError(f"{kind.__name__} follows a layer's outputs: ask for it with outputs=True or layer=")
    return wanted


def is_count(value: object) -> bool:
    """True for a whole number, 0 or more; False for a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
