"""Counts where the weights of a model went: each of its matrices is pruned, skipped, excluded or outside the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn

from ..linears import linear_weight

Kind = Literal["pruned", "skipped", "excluded"]


@dataclass(frozen=True)
class Account:
    """Parameters by what became of them; a parameter that several layers share counts once.

    Matrices are the weights of linear layers and all other parameters with more than one row and column, but biases.

    Attributes:
        pruned: in pruned layers, kept weights too.
        skipped: in matrices that stayed dense though they were not ruled out by name.
        excluded: in matrices of the blocks that ``include`` and ``exclude`` ruled out.
        outside: in matrices outside the decoder blocks (embeddings, the head, other towers) that were not asked for.
        model: all parameters of the model, vectors too.
    """

    pruned: int
    skipped: int
    excluded: int
    outside: int
    model: int

    @property
    def blocks(self) -> int:
        """In all matrices of the blocks, and of layers outside them that were asked for."""
        return self.pruned + self.skipped + self.excluded

    def share(self, kind: Kind) -> float:
        """Of :attr:`blocks`."""
        count: int = getattr(self, kind)
        return count / self.blocks if self.blocks else 0.0

    def to_dict(self) -> dict[str, float]:
        """As JSON types: counts, and shares of the blocks' matrices."""
        shares = {f"{kind}_share": self.share(kind) for kind in ("pruned", "skipped", "excluded")}
        return {**asdict(self), "blocks": self.blocks, **shares}


class Ledger:
    """Keeps the account while a model is pruned.

    Args:
        model: all of it.
        inside: the modules whose matrices are to be accounted for.
    """

    def __init__(self, model: nn.Module, inside: Iterable[nn.Module]) -> None:
        self._sizes = matrices(model)
        self._model = sum(parameter.numel() for parameter in model.parameters())
        self._open: dict[nn.Parameter, int] = {}
        self._counts: dict[Kind, int] = {"pruned": 0, "skipped": 0, "excluded": 0}
        for module in inside:
            self.open(module.parameters())

    def open(self, parameters: Iterable[nn.Parameter]) -> None:
        """Expect entries for these, as far as they are matrices."""
        self._open.update((p, self._sizes[p]) for p in parameters if p in self._sizes and p not in self._open)

    def rest(self, parameter: nn.Parameter) -> int:
        """How many elements of a parameter have no entry yet."""
        return self._open.get(parameter, 0)

    def enter(self, kind: Kind, parameter: nn.Parameter, count: int) -> None:
        """Record what became of ``count`` elements of a parameter.

        A skipped or excluded parameter that is shared may be entered again, and counts once.

        Raises:
            RuntimeError: more elements were pruned than the parameter has left.
        """
        taken = min(count, self.rest(parameter))
        if kind == "pruned" and taken != count:
            raise RuntimeError(
                f"{count:,} weights were pruned where {taken:,} were left to prune, which is a bug of ace_triton; "
                "please report it"
            )
        if taken:
            self._open[parameter] -= taken
            self._counts[kind] += taken

    def account(self) -> Account:
        """The account; what has no entry is in none of its counts."""
        outside = sum(size for parameter, size in self._sizes.items() if parameter not in self._open)
        return Account(**self._counts, outside=outside, model=self._model)


def matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The elements of each weight of a linear layer, and of each other parameter with more than one row and column.

    Biases that a mixture stacks by expert are vectors.
    """
    linears = {module._parameters.get("weight") for module in model.modules() if linear_weight(module) is not None}
    named = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    wide = (p for key, p in named if p.dim() >= 2 and p.numel() > max(p.shape) and "bias" not in key)
    found = {parameter: parameter.numel() for _, parameter in named if parameter in linears}
    return found | {parameter: parameter.numel() for parameter in wide}
