"""How the weights that pruning leaves dense are stored in a packed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ArgumentError, RecipeError
from ..kernels.few_bits import check_bits, check_group
from ..solvers.quantize import GROUP, Quantization


@dataclass(frozen=True)
class StoredBits:
    """Bits of the weights that pruning leaves dense, 8 or 4 each; None keeps the model's type.

    Attributes:
        head_bits: those of the output head; also of the embedding if they share a weight.
        embedding_bits: those of the embedding.
        dense_bits: those of linear layers that were not pruned.
        all_bits: those of all three, for each that has no bits of its own and can be stored so.
        group: number of neighboring inputs that share a scale.

    Raises:
        ArgumentError: if bits or the group are invalid.
    """

    head_bits: int | None = None
    embedding_bits: int | None = None
    dense_bits: int | None = None
    all_bits: int | None = None
    group: int = GROUP

    def __post_init__(self) -> None:
        check_group(self.group)
        for bits in self.bits.values():
            check_bits(bits, self.group)

    @property
    def bits(self) -> dict[str, int]:
        """The bits that are given, by field."""
        return {name: bits for name, bits in asdict(self).items() if name != "group" and bits is not None}

    @property
    def words(self) -> str:
        """What is stored in how many bits, as in "head 8 bits, dense 4 bits"."""
        return ", ".join(f"{name.removesuffix('_bits')} {bits} bits" for name, bits in self.bits.items())

    def to_dict(self) -> dict[str, int]:
        """As JSON types, without bits that are not given."""
        return {**self.bits, "group": self.group}

    def packing(self, quantize: Quantization | None) -> dict[str, Any]:
        """The bits and the group as :func:`~ace_triton.packed.pack_model.pack_model` takes them.

        Args:
            quantize: how the kept weights were quantized, whose group holds for all; None if they were not.
        """
        if quantize is None:
            return self.to_dict()
        return {**self.to_dict(), "bits": quantize.bits, "group": quantize.group}

    @classmethod
    def from_dict(cls, record: Any) -> StoredBits:
        """The inverse of :meth:`to_dict`; RecipeError for an unknown entry or an invalid value."""
        known = [entry.name for entry in fields(cls)]
        if not isinstance(record, Mapping):
            raise RecipeError(f"stored_bits must be an object with the entries {', '.join(known)}; got {record!r}")
        if unknown := [name for name in record if name not in known]:
            raise RecipeError(f"stored_bits has no entry {unknown[0]!r}; its entries: {', '.join(known)}")
        for name, value in record.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise RecipeError(f"stored_bits: {name} must be a whole number; got {value!r}")
        try:
            return cls(**record)
        except ArgumentError as error:
            raise RecipeError(f"stored_bits: {error}") from error
