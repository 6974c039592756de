"""The fields of a ``quantization_config`` or of bitsandbytes' ``quant_state``, each checked when it is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

SIZES = range(1, 2**31)
LONGEST_VALUE = 60
"""Characters of an invalid value that a message quotes."""


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object.

    Attributes:
        place: where they stand, for messages: "its quantization_config".
        stated: the fields.
        before: names of the fields around this object, with their dots, for messages.

    Raises:
        CheckpointError: from every method, if the field is invalid; the message is a clause.
    """

    place: str
    stated: Mapping[str, Any]
    before: str = ""

    def integer(self, name: str, allowed: Collection[int], default: int | None = None) -> int:
        """An integer field; ``default`` if it is missing, and without a default it is needed."""
        value = self.stated.get(name, default)
        if type(value) is not int or value not in allowed:
            raise self._invalid(name, value, _listed(allowed))
        return value

    def group_size(self, name: str, default: int) -> int:
        """The number of inputs in a group; -1 for one group."""
        value = self.stated.get(name, default)
        if type(value) is not int or (value != -1 and value not in SIZES):
            raise self._invalid(name, value, "-1 or an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        """A number."""
        value: Any = self.stated.get(name)
        if type(value) not in (int, float):
            raise self._invalid(name, value, "a number")
        return float(value)

    def sizes(self, name: str, count: int) -> list[int]:
        """A list of ``count`` sizes; older versions of compressed-tensors write "128x128"."""
        value: Any = self.stated.get(name)
        product = isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", value)
        found = [int(size) for size in value.split("x")] if product else value
        if not isinstance(found, list) or len(found) != count or not all(type(n) is int and n in SIZES for n in found):
            raise self._invalid(name, value, f"a list of {count} integers of at least 1")
        return found

    def section(self, name: str) -> Fields:
        """The fields inside a field; none if it is missing or null."""
        value = self.stated.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._invalid(name, value, "an object")
        return Fields(self.place, value or {}, f"{self.before}{name}.")

    def _invalid(self, name: str, value: Any, wanted: str) -> CheckpointError:
        if name not in self.stated:
            return CheckpointError(f"{self.place} lacks {self.before}{name}, {wanted}")
        shown = repr(value)
        shown = shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}..."
        return CheckpointError(f"{self.place} has {self.before}{name} {shown} instead of {wanted}")


def _listed(allowed: Collection[int]) -> str:
    if isinstance(allowed, range):
        least, most = allowed.start, allowed.stop - 1
        return f"an integer of at least {least}" if allowed == SIZES else f"an integer from {least} to {most}"
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last
