"""Options of methods and updates. Types come from function signatures; values are checked before any work starts."""

from __future__ import annotations

import ast
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from .errors import ArgumentError

Kind = Literal["number", "whole", "switch", "text", "any"]

_KINDS: dict[Any, Kind] = {float: "number", int: "whole", bool: "switch", str: "text"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as in ``eps: Annotated[float, Range(above=0, below=1)] = 0.01``.

    Attributes:
        least, most: inclusive bounds; None for no bound.
        above, below: exclusive bounds; None for no bound.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        lower = f"{self.least} or more" if self.least is not None else f"above {self.above}"
        upper = f"{self.most} or less" if self.most is not None else f"below {self.below}"
        ends = [lower] * (self.least is not None or self.above is not None)
        return " and ".join(ends + [upper] * (self.most is not None or self.below is not None))


@dataclass(frozen=True, init=False)
class OneOf:
    """The only allowed values of a number, as in ``a: Annotated[float, OneOf(1, 0.75, 0.5)] = 1.0``.

    Attributes:
        values: the allowed numbers.
    """

    values: tuple[float, ...]

    def __init__(self, *values: float) -> None:
        object.__setattr__(self, "values", values)

    def __contains__(self, value: float) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class OptionType:
    """The allowed values of an option.

    Attributes:
        name: the option's name.
        default: its default value.
        kind: "number" (finite), "whole" (an int), "switch" (a bool), "text", or "any" if the signature does not say.
        choices: the allowed values, of any type; empty if there is no list of values.
        optional: True if None is allowed too.
        range: bounds of a number, or its only values; None for no bounds.
    """

    name: str
    default: Any
    kind: Kind = "any"
    choices: tuple[Any, ...] = ()
    optional: bool = False
    range: Range | OneOf | None = None

    @property
    def allowed(self) -> str:
        """The allowed values in words, as in "a number above 0 and below 1"."""
        if self.choices:
            words = f"one of {', '.join(map(repr, self.choices))}"
        else:
            kinds = {"number": "a number", "whole": "a whole number", "switch": "True or False", "text": "text"}
            words = kinds.get(self.kind, "any value")
        if self.range is not None:
            words += f", {self.range}"
        return f"{words}, or None" if self.optional else words

    def check(self, value: Any) -> Any:
        """The value, with a number converted to int or float; ArgumentError if the value is not allowed."""
        checked = self._checked(value)
        if checked is _INVALID:
            raise ArgumentError(f"{self.name} must be {self.allowed}; got {value!r}")
        return checked

    def read(self, text: str) -> Any:
        """The value of a text from the command line; ArgumentError if the value is not allowed."""
        for choice in self.choices:
            if text == str(choice):
                return choice
        if self.optional and text.lower() == "none":
            return None
        return self.check(text if self.choices else self._read(text))

    def _read(self, text: str) -> Any:
        try:
            if self.kind == "number":
                return float(text)
            if self.kind == "whole":
                return int(text)
            if self.kind == "switch":
                return {"true": True, "false": False}.get(text.lower(), text)
            return text if self.kind == "text" else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def _checked(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if self.choices:
            same = (choice for choice in self.choices if type(choice) is type(value) and choice == value)
            return next(same, _INVALID)
        if self.kind in ("number", "whole"):
            return self._number(value)
        wanted = {"switch": bool, "text": str}.get(self.kind, object)
        return value if isinstance(value, wanted) else _INVALID

    def _number(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind == "whole" else Real):
            return _INVALID
        number = int(value) if isinstance(value, Integral) else float(value)
        if not abs(number) <= sys.float_info.max or (self.range is not None and number not in self.range):
            return _INVALID
        return number


_INVALID = object()


def option_types(function: Callable[..., Any], skip: int = 0) -> dict[str, OptionType]:
    """The options of a function or dataclass, by name, from its signature.

    The type of an option is its annotation: float, int, bool, str or a Literal, each also ``| None``, or Annotated with
    a :class:`Range` or :class:`OneOf`. Without an annotation it is the type of the default; a default of 1 or 1.0
    allows any number. Other annotations and defaults allow any value.

    Args:
        function: the function or dataclass.
        skip: number of parameters before the options.

    Raises:
        ArgumentError: there are too few parameters, an option has no default, or there is ``*args`` or ``**kwargs``.
    """
    parameters = list(inspect.signature(function).parameters.values())
    name = getattr(function, "__name__", str(function))
    if len(parameters) < skip:
        raise ArgumentError(f"{name} takes {len(parameters)} arguments; it must take {skip} before its options")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # An annotation cannot be evaluated: use the types of the defaults.
        hints = {}
    found = {}
    for parameter in parameters[skip:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ArgumentError(f"{name} takes {parameter}: name each option instead, with a default")
        if parameter.default is parameter.empty:
            raise ArgumentError(f"{name}: option {parameter.name!r} has no default; give it one")
        found[parameter.name] = _option_type(parameter.name, parameter.default, hints.get(parameter.name))
    return found


def check_options(known: Mapping[str, OptionType], options: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The options, checked; ArgumentError if ``owner`` has no such option or a value is invalid."""
    return _each(known, options, owner, OptionType.check)


def read_options(known: Mapping[str, OptionType], pairs: Sequence[str], owner: str, flag: str) -> dict[str, Any]:
    """Convert ``["a=0.5", "base=ria"]`` to ``{"a": 0.5, "base": "ria"}`` and check the values.

    Args:
        known: all existing options.
        pairs: the pairs from the command line.
        owner: the method or update that has the options, for messages.
        flag: the option of the command line that was used, for messages.

    Raises:
        ArgumentError: a pair has no ``=``, an option is given twice or unknown, or a value is invalid.
    """
    texts: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ArgumentError(f"{flag} {pair!r}: write name=value")
        if name in texts:
            raise ArgumentError(f"{flag} {pair!r}: {name} is given twice")
        texts[name] = text.strip()
    return _each(known, texts, owner, OptionType.read)


def _each(
    known: Mapping[str, OptionType], values: Mapping[str, Any], owner: str, take: Callable[[OptionType, Any], Any]
) -> dict[str, Any]:
    taken = {}
    for name, value in values.items():
        if name not in known:
            has = ", ".join(f"{option.name}={option.default!r}" for option in known.values()) or "none"
            raise ArgumentError(f"{owner} has no option {name!r}; its options: {has}")
        try:
            taken[name] = take(known[name], value)
        except ValueError as error:
            raise ArgumentError(f"{owner}: {error}") from None
    return taken


def _option_type(name: str, default: Any, hint: Any) -> OptionType:
    if hint is None:
        default_kinds = {bool: "switch", int: "number", float: "number", str: "text"}
        return OptionType(name, default, typing.cast(Kind, default_kinds.get(type(default), "any")))
    bounds = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, *notes = typing.get_args(hint)
        bounds = next((note for note in notes if isinstance(note, (Range, OneOf))), None)
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else Any
    if typing.get_origin(hint) is Literal:
        return OptionType(name, default, "any", typing.get_args(hint), optional)
    return OptionType(name, default, _KINDS.get(hint, "any"), (), optional, bounds)
