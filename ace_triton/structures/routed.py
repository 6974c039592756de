"""The importance of experts: the norm of their outputs times their routing weights, over calibration tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..decoders.batches import tensors_in
from ..errors import ArgumentError
from .forwards import BlockWatcher
from .mixtures import Mixture

ROUTED = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
"""Arguments of an experts' module of transformers: the experts of each token, and their weights."""


class Contributions(BlockWatcher):
    """Collects the sum over tokens t of g_te ||f_e(x_t)|| / n_tokens for each expert e of a mixture, batch by batch.

    g is the routing weight, 0 for an expert that the token is not sent to, and f the expert's output. If the experts'
    module takes the routing as arguments, each expert runs on its own tokens once more. Else g f is the mixture's
    output minus its output while the expert's tensors are 0, and the mixture runs once for each expert.

    Args:
        mixture: the mixture.

    Attributes:
        found: fp32 [n_experts] for each batch in which the mixture ran.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.found: list[torch.Tensor] = []
        self._batches = 0

    def watched(self, shape: tuple[int, int], valid: torch.Tensor | None, hooks: ExitStack) -> None:
        self._batches += 1

        def valid_of(tokens: int) -> torch.Tensor | None:
            return valid.flatten() if valid is not None and valid.numel() == tokens else None

        hooks.callback(_hook(self._mixture, self.found, valid_of).remove)

    def of_batches(self) -> torch.Tensor:
        """The contributions, fp32 [n_batches, n_experts]; ArgumentError if the mixture did not run once a batch."""
        if len(self.found) != self._batches:
            raise ArgumentError(
                f"{self._mixture.consumer} did not run once for each batch, so its experts cannot be ranked: take "
                "--method magnitude"
            )
        return torch.stack(self.found)


def _hook(mixture: Mixture, found: list[torch.Tensor], valid_of: Callable[[int], torch.Tensor | None]) -> Any:
    """The handle of a forward hook that adds a batch's contributions to ``found``."""
    experts = next(iter(mixture.stacks.values()), None)
    names = () if experts is None or len(mixture.stacks) > 1 else tuple(inspect.signature(experts.forward).parameters)
    if experts is not None and names[1:] in ROUTED:

        def of_routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            hidden, index, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
            found.append(_of_routed(mixture, module, hidden, index, weights, valid_of))

        return experts.register_forward_hook(of_routed, with_kwargs=True)

    def of_zeroed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        whole = _first(output)
        norms = []
        for expert in range(mixture.count):
            with _zeroed(mixture, expert):
                norms.append(_summed((whole - _first(module.forward(*args, **kwargs))).flatten(0, -2), valid_of))
        found.append(torch.stack(norms))

    return mixture.module.register_forward_hook(of_zeroed, with_kwargs=True)


def _of_routed(
    mixture: Mixture,
    experts: nn.Module,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    valid_of: Callable[[int], torch.Tensor | None],
) -> torch.Tensor:
    """The contributions of each expert to the tokens of one call, [n_experts]."""
    states = hidden.flatten(0, -2)
    valid = valid_of(len(states))
    tokens = len(states) if valid is None else int(valid.sum())
    found = torch.zeros(mixture.count, dtype=torch.float32, device=hidden.device)
    for expert in range(mixture.count):
        chosen = index == expert
        if valid is not None:
            chosen = chosen & valid[:, None]
        places, columns = chosen.nonzero(as_tuple=True)
        if len(places):
            own = index[places, columns, None]
            outputs = experts.forward(states[places], own, weights[places, columns, None])
            found[expert] = outputs.float().norm(dim=-1).sum() / tokens
    return found


def _summed(values: torch.Tensor, valid_of: Callable[[int], torch.Tensor | None]) -> torch.Tensor:
    """The mean norm of rows, [n_tokens, width]."""
    norms, valid = values.float().norm(dim=-1), valid_of(len(values))
    return norms.mean() if valid is None else norms[valid].mean()


def _first(output: Any) -> torch.Tensor:
    return next(iter(tensors_in(output)))


@contextmanager
def _zeroed(mixture: Mixture, expert: int) -> Iterator[None]:
    """A context in which an expert's tensors are 0; the router is unchanged."""
    own = [part for part in mixture.parts() if part.layer in mixture.stacks or part.structure == expert]
    views = [part.tensor.data if part.structure is not None else part.tensor.data[expert] for part in own]
    before = [view.clone() for view in views]
    try:
        for view in views:
            view.zero_()
        yield
    finally:
        for view, tensor in zip(views, before, strict=True):
            view.copy_(tensor)
