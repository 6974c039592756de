"""Products: the ways to multiply by a packed weight, their registry, and the numbers of rows that choose one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import ArgumentError
from ..kernels.bound_launch import BoundCall
from ..kernels.packed_dense import PackedDense
from ..kernels.packed_nm import PackedNM
from ..kernels.packed_rows import PackedRows

Packed = PackedNM | PackedRows | PackedDense
"""A packed weight of any form."""

DENSE_COPY = "dense_copy"
"""Name of the product that multiplies by a dense copy of the weight, and of its mark in :meth:`RowLimits.flat`."""

LIMITED = ("packed", "semi_structured", DENSE_COPY, "dense")
"""The products that :class:`RowLimits` chooses by fields of their own; "dense" is chosen if no other product is."""


@dataclass(frozen=True, repr=False)
class RowLimits:
    """Numbers of rows (tokens of a call) that choose the product of a packed layer.

    All other calls unpack the weight and multiply dense.

    Attributes:
        packed: our kernel is used for up to this many rows.
        semi_structured: torch's 2:4 product is used from this many rows on, if it supports the weight; None for never.
        second_copy: if torch uses cuSPARSELt, keep cuSPARSELt's copy of the weight after the first call (9/16 of the
            dense bytes in bf16) instead of making it in each call. Needs ``semi_structured``. If torch has no 2:4
            product for the weight, a call that unpacks it warns.
        others: (name, first, last) for products of your own (:func:`register_product`): each is used for ``first`` to
            ``last`` rows if it supports the call; ``last`` None for no limit. They precede the other products.
        dense_copy: on a CPU, calls that would unpack the weight use a dense copy of it. The copy is made once and kept
            as long as the packed weight exists. On other devices these limits are the defaults of the device.

    Raises:
        ArgumentError: if a number of rows is invalid, ``second_copy`` is given without ``semi_structured``, or
            ``others`` names a product that is not registered.
    """

    packed: int
    semi_structured: int | None = None
    second_copy: bool = False
    others: tuple[tuple[str, int, int | None], ...] = ()
    dense_copy: bool = False

    def __post_init__(self) -> None:
        for name in ("packed", "semi_structured"):
            rows = getattr(self, name)
            if rows is not None and not _is_count(rows):
                raise ArgumentError(f"{name} must be a number of rows, 0 or more; got {rows!r}")
        if self.second_copy and self.semi_structured is None:
            raise ArgumentError(
                "second_copy=True needs semi_structured, the number of rows from which torch's 2:4 product is used: "
                f"write RowLimits({self.packed}, {self.packed + 1}, second_copy=True), or leave second_copy out"
            )
        for entry in self.others:
            _check_range(entry)

    def __repr__(self) -> str:
        set_fields = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"RowLimits({', '.join(set_fields)})"

    def flat(self) -> tuple[int, int | None, bool, str]:
        """The limits as arguments of a torch operation; :meth:`from_flat` is the inverse."""
        entries = [f"{name},{first},{'' if last is None else last}" for name, first, last in self.others]
        others = ";".join([*entries, DENSE_COPY] if self.dense_copy else entries)
        return self.packed, self.semi_structured, self.second_copy, others

    @classmethod
    def from_flat(cls, packed: int, semi_structured: int | None, second_copy: bool, others: str) -> RowLimits:
        """The limits that :meth:`flat` gave."""
        parts = [part for part in others.split(";") if part]
        entries = (part.split(",") for part in parts if part != DENSE_COPY)
        ranges = tuple((name, int(first), int(last) if last else None) for name, first, last in entries)
        return cls(packed, semi_structured, second_copy, ranges, DENSE_COPY in parts)


class Product(ABC):
    """One way to multiply by a packed weight. Products have no state of their own: one object serves all layers.

    Attributes:
        name: names the product in :class:`RowLimits`, in times and in errors.
        label: heading of the product's column in ``ace-triton bench``.
        converts: True if the first call with a weight converts it and keeps the result. ``ace-triton bench`` makes that
            call before it times the product.
        forms: the forms of packed weights that the product is asked about. Those without an n:m pattern
            (:class:`~ace_triton.kernels.packed_rows.PackedRows`,
            :class:`~ace_triton.kernels.packed_dense.PackedDense`) are left out unless named here.
    """

    name: str
    label: str
    converts: bool = False
    forms: tuple[type, ...] = (PackedNM,)

    @abstractmethod
    def refusal(self, packed: Any, rows: int) -> str | None:
        """Why the product cannot compute a call; None if it can.

        The answer must not depend on values, so that CUDA graphs can capture the call.

        Args:
            packed: the weight, with its pattern, shape, dtype and device.
            rows: number of rows (tokens) of the call.
        """

    @abstractmethod
    def multiply(self, tokens: torch.Tensor, packed: Any, bias: torch.Tensor | None, limits: RowLimits) -> torch.Tensor:
        """Compute outputs [n_tokens, out_features] = tokens W^T + bias, for a call that :meth:`refusal` allows.

        Args:
            tokens: [n_tokens, in_features] in the weight's dtype, on its device.
            packed: the weight.
            bias: [out_features] or None.
            limits: the limits that chose the product.
        """

    def why_not(self, packed: Packed, rows: int) -> str | None:
        """As :meth:`refusal`, for a packed weight of any form."""
        if not isinstance(packed, self.forms):
            return "it supports weights n:m only"
        return self.refusal(packed, rows)

    def takes(self, rows: int, limits: RowLimits) -> bool:
        """True if the limits choose this product for a number of rows."""
        for name, first, last in limits.others:
            if name == self.name and rows >= first and (last is None or rows <= last):
                return True
        return False


class BoundProduct(Product):
    """A product whose calls for few rows on a GPU can be recorded and repeated, which takes less time on the host."""

    @abstractmethod
    def operands(self, layer: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of a packed layer that a repetition takes between the tokens and the bias."""

    @abstractmethod
    def bound(
        self, tokens: torch.Tensor, packed: Any, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, BoundCall | None]:
        """As :meth:`multiply`, and the same call to be repeated with other tensors; None if it cannot be.

        Args:
            tokens: [n_tokens, in_features] in the weight's dtype, on its device, contiguous.
            packed: the weight.
            bias: [out_features] or None.
        """


class Registry:
    """All products.

    Attributes:
        products: in the order in which they are asked. "dense", which takes every call, is the last.
        others: names of those that :class:`RowLimits` has no field for.
    """

    def __init__(self) -> None:
        self.products: tuple[Product, ...] = ()
        self.others: tuple[str, ...] = ()

    def add(self, product: Product) -> None:
        """As :func:`register_product`."""
        taken = [*(known.name for known in self.products), DENSE_COPY]
        if not product.name.isidentifier():
            raise ArgumentError(f"a product's name must be an identifier, as my_product; got {product.name!r}")
        if product.name in taken:
            raise ArgumentError(
                f"there is a product {product.name!r} already: choose a name other than {', '.join(taken)}"
            )
        self.products = (product, *self.products)
        self.others = tuple(known.name for known in self.products if known.name not in LIMITED)


registry = Registry()


def register_product(product: Product) -> None:
    """Add a product. It is asked before those that were registered earlier.

    Layers without limits of their own use it for every call that it does not refuse. Layers with
    :class:`RowLimits` use it for the rows that ``others`` gives it.

    Raises:
        ArgumentError: if the name is taken or is not an identifier.
    """
    registry.add(product)


def _is_count(rows: object) -> bool:
    return isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0


def _check_range(entry: tuple[str, int, int | None]) -> None:
    if not isinstance(entry, tuple) or len(entry) != 3:
        raise ArgumentError(f"others must hold (name, first, last) of products; got {entry!r}")
    name, first, last = entry
    if name not in registry.others:
        known = ", ".join(registry.others) or "none yet"
        raise ArgumentError(
            f"others names {name!r}, which is not a registered product: register it with register_product first "
            f"(registered: {known})"
        )
    if not _is_count(first) or not (last is None or _is_count(last)):
        raise ArgumentError(f"others: the rows of {name!r} must be numbers, 0 or more; got {first!r} to {last!r}")
