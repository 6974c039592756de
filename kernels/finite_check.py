"""FiniteCheck: which tensors launches have checked for NaN, infinity and, in score terms, negative numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(eq=False)
class _Result:
    """What a check found. ``flags``: int32 on the device, not read yet; ``passed``: None if not known yet."""

    flags: torch.Tensor | None = None
    passed: bool | None = None

    def read(self) -> bool | None:
        if self.flags is not None:
            self.passed, self.flags = not any(self.flags.tolist()), None
        return self.passed


class FiniteCheck:
    """Which tensors are known to be in range: weights that are finite, score terms that are also 0 or more.

    A launch that computes terms also notes on the device if they, or the weight that it read, are out of range. The
    flags stay on the device until someone asks. :func:`~ace_triton.kernels.finite.all_finite` takes such an object,
    reads only the tensors that it does not know, and records them. Tensors are known by identity; a result is valid
    until someone writes NaN or infinity to the tensor.

    Args:
        others: checks whose results are known here too.
    """

    def __init__(self, *others: FiniteCheck) -> None:
        self._others = others
        self._results: dict[tuple[int, bool], tuple[torch.Tensor, _Result]] = {}

    def record(
        self, *weights: torch.Tensor, terms: Iterable[torch.Tensor] = (), flags: torch.Tensor | None = None
    ) -> Self:
        """Keep the result of a launch that checked these tensors; returns the check itself.

        Args:
            weights: tensors that were checked for NaN and infinity.
            terms: score terms; negative numbers were checked too.
            flags: int32, any is non-zero if a tensor is out of range. None if all are known to be in range.
        """
        new = _Result(flags, True if flags is None else None)
        for tensor, is_term in [*((weight, False) for weight in weights), *((term, True) for term in terms)]:
            result = self._find(tensor, is_term)
            if result is not None and flags is None and result.read() is None:
                result.passed = True
            else:
                self._results[id(tensor), is_term] = (tensor, new)
        return self

    def pending(self, tensor: torch.Tensor, *, is_term: bool = False) -> bool | torch.Tensor | None:
        """As :meth:`passed`, but the flags of a launch if they were not read yet. Never waits."""
        result = self._find(tensor, is_term)
        if result is None:
            return None
        return result.passed if result.flags is None else result.flags

    def accept(self, *weights: torch.Tensor, terms: Iterable[torch.Tensor] = ()) -> None:
        """Take over that flags which someone read were 0: the tensors that launches have checked are in range."""
        for tensor, is_term in [*((weight, False) for weight in weights), *((term, True) for term in terms)]:
            result = self._find(tensor, is_term)
            if result is not None:
                result.passed, result.flags = True, None

    def read(self) -> None:
        """Read the flags of all launches whose results are recorded here; waits for a GPU once."""
        unread = {id(result): result for _, result in self._results.values() if result.flags is not None}
        flags = [result.flags for result in unread.values() if result.flags is not None]
        numbers = torch.cat(flags).tolist() if flags else []
        for result, own in zip(unread.values(), flags, strict=True):
            result.passed, result.flags = not any(numbers[: len(own)]), None
            numbers = numbers[len(own) :]

    def share(self, term: torch.Tensor) -> None:
        """Keep the result for a score term here if a check that knows this one records it."""
        self._results[id(term), True] = (term, _Result())

    def passed(self, tensor: torch.Tensor, *, is_term: bool = False) -> bool | None:
        """True if a tensor is in range, False if it is not, and None if no launch has checked it.

        Reading the flags of a launch waits for a GPU, once.
        """
        result = self._find(tensor, is_term)
        return None if result is None else result.read()

    def _find(self, tensor: torch.Tensor, is_term: bool) -> _Result | None:
        """The result for a tensor. A valid term is also a finite weight."""
        for kind in (is_term, True):
            known, result = self._results.get((id(tensor), kind), (None, None))
            if known is tensor:  # In a deep copy, an id may be that of another tensor.
                return result
        found = (other._find(tensor, is_term) for other in self._others)
        return next((result for result in found if result is not None), None)
