"""Counts a model's weights: each matrix is pruned, skipped, excluded or outside the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn

from ..linears import linear_weight

Kind = Literal["pruned", "skipped", "excluded"]


@dataclass(frozen=True)
class Account:
    """Number of parameters per outcome. A parameter that several layers share counts once.

    Matrices are the weights of linear layers, and all other parameters with more than one row and column. Biases are
    not matrices.

    Attributes:
        pruned: parameters in pruned layers, including the weights kept there.
        skipped: parameters in matrices that stayed dense although ``include`` and ``exclude`` allow pruning them.
        excluded: parameters in matrices of the blocks that ``include`` or ``exclude`` rules out.
        outside: parameters in matrices outside the blocks (embeddings, the head, towers that no calibration
            input reaches) that ``include`` does not name.
        model: all parameters of the model, including vectors.
    """

    pruned: int
    skipped: int
    excluded: int
    outside: int
    model: int

    @property
    def blocks(self) -> int:
        """Parameters in all matrices of the blocks, and in the layers outside the blocks that ``include`` names."""
        return self.pruned + self.skipped + self.excluded

    def share(self, kind: Kind) -> float:
        """One count as a fraction of :attr:`blocks`; 0 if :attr:`blocks` is 0."""
        count: int = getattr(self, kind)
        return count / self.blocks if self.blocks else 0.0

    def to_dict(self) -> dict[str, float]:
        """Counts, and fractions of :attr:`blocks`, as JSON types."""
        shares = {f"{kind}_share": self.share(kind) for kind in ("pruned", "skipped", "excluded")}
        return {**asdict(self), "blocks": self.blocks, **shares}


class Ledger:
    """Keeps the account while a model is pruned.

    Args:
        model: the whole model.
        inside: modules whose matrices need an entry: the blocks of all towers.
    """

    def __init__(self, model: nn.Module, inside: Iterable[nn.Module]) -> None:
        self._sizes = matrices(model)
        self._model = sum(parameter.numel() for parameter in model.parameters())
        self._open: dict[nn.Parameter, int] = {}
        self._counts: dict[Kind, int] = {"pruned": 0, "skipped": 0, "excluded": 0}
        for module in inside:
            self.open(module.parameters())

    def open(self, parameters: Iterable[nn.Parameter]) -> None:
        """Expect entries for the matrices among these parameters."""
        self._open.update((p, self._sizes[p]) for p in parameters if p in self._sizes and p not in self._open)

    def rest(self, parameter: nn.Parameter) -> int:
        """Number of elements of a parameter without an entry."""
        return self._open.get(parameter, 0)

    def enter(self, kind: Kind, parameter: nn.Parameter, count: int) -> None:
        """Record the outcome of ``count`` elements of a parameter.

        A shared parameter may be entered as skipped or excluded several times; it counts once.

        Raises:
            RuntimeError: if ``count`` elements were pruned but fewer have no entry yet.
        """
        taken = min(count, self.rest(parameter))
        if kind == "pruned" and taken != count:
            raise RuntimeError(
                f"{count:,} weights were pruned, but only {taken:,} were left to prune: this is a bug in ace_triton; "
                "please report it"
            )
        if taken:
            self._open[parameter] -= taken
            self._counts[kind] += taken

    def account(self) -> Account:
        """The account so far. Elements of the blocks without an entry are in no count except ``model``."""
        outside = sum(size for parameter, size in self._sizes.items() if parameter not in self._open)
        return Account(**self._counts, outside=outside, model=self._model)


def matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """Number of elements of each linear layer's weight, and of each other parameter with several rows and columns.

    Biases of experts, stacked in one parameter, count as vectors and are left out.
    """
    linears = {module._parameters.get("weight") for module in model.modules() if linear_weight(module) is not None}
    named = [(name.rpartition(".")[2], parameter) for name, parameter in model.named_parameters()]
    wide = (p for key, p in named if p.dim() >= 2 and p.numel() > max(p.shape) and "bias" not in key)
    found = {parameter: parameter.numel() for _, parameter in named if parameter in linears}
    return found | {parameter: parameter.numel() for parameter in wide}
