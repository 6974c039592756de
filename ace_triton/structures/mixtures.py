"""Finds the experts of mixtures as structures: whole experts, with their rows of the router.

A mixture is a module with experts in one of its children: tensors whose first dimension counts experts, or an
``nn.ModuleList`` with a member for each expert. Its router is the layer of the block with one output for each expert.
Every tensor of the router with a dimension of this size belongs to the experts too, such as the bias that balances
their load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..decoders.batches import Batch, run_model
from ..decoders.blocks import Block
from ..decoders.experts import PRODUCTS
from ..decoders.finished import forward_replaced
from ..decoders.layer_roles import experts_in, in_attention, routers
from .parts import Part, own_tensors


@dataclass(frozen=True)
class Mixture:
    """The experts of one block.

    Attributes:
        consumer: dotted name of the module that contains the experts' module.
        count: number of experts.
        chosen: number of experts that a token is sent to.
        module: the module of that name.
        router: dotted name of the router: its layer, or the module around the layer.
        router_module: the module of that name.
        stacks: dotted names of the children whose tensors hold all experts.
        lists: dotted names of the children with a member for each expert.
    """

    consumer: str
    count: int
    chosen: int
    module: nn.Module
    router: str
    router_module: nn.Module
    stacks: Mapping[str, nn.Module]
    lists: Mapping[str, nn.ModuleList]
    kind: Literal["experts"] = "experts"

    def parts(self, _layers: object = None) -> Iterator[Part]:
        """The tensors with experts."""
        for path, child in self.stacks.items():
            for key, tensor in own_tensors(child):
                if tensor.dim() and tensor.shape[0] == self.count:
                    yield Part(path, key, tensor, 0)
        for path, members in self.lists.items():
            for index, member in enumerate(members):
                for inner, module in member.named_modules(prefix=f"{path}.{index}"):
                    for key, tensor in own_tensors(module):
                        yield Part(inner, key, tensor, 0, index)
        for path, module in self.router_module.named_modules(prefix=self.router):
            for key, tensor in own_tensors(module):
                if self.count in tensor.shape:
                    yield Part(path, key, tensor, tensor.shape.index(self.count))
        for key, tensor in own_tensors(self.module):
            if tensor.shape == (self.count,):
                yield Part(self.consumer, key, tensor, 0)

    def by_structure(self, part: Part, values: torch.Tensor) -> torch.Tensor:
        """Sums over experts, [count], of values with the shape of a part's tensor."""
        if part.structure is not None:
            found = torch.zeros(self.count, dtype=values.dtype, device=values.device)
            found[part.structure] = values.sum()
            return found
        return values.movedim(part.dim, 0).flatten(1).sum(1) if values.dim() > 1 else values

    def parameters(self, _layers: object = None) -> int:
        """Number of parameters of one expert."""
        return sum(p.tensor.numel() for p in self.parts() if isinstance(p.tensor, nn.Parameter)) // self.count

    def kept(
        self, tensors: Mapping[str, torch.Tensor], _layers: object, chosen: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """A model's tensors by name, without the experts that are not chosen.

        Args:
            tensors: those of the model, or of the block, also without values on the meta device.
            chosen: the kept experts, int64, ascending.
        """
        found = dict(tensors)
        place = {old: new for new, old in enumerate(chosen.tolist())}
        moved = {}
        for part in self.parts():
            if part.name not in tensors:
                continue
            tensor = tensors[part.name].detach()
            if part.structure is None:
                found[part.name] = tensor.index_select(part.dim, chosen.to(tensor.device))
                continue
            del found[part.name]
            if part.structure in place:
                home = next(path for path in self.lists if part.name.startswith(f"{path}."))
                inner = part.name.removeprefix(f"{home}.{part.structure}.")
                moved[f"{home}.{place[part.structure]}.{inner}"] = tensor
        return {**found, **moved}

    @torch.inference_mode()
    def reorder(self, _layers: object, order: torch.Tensor) -> None:
        """Put the experts in another order, in place."""
        for part in self.parts():
            if part.structure is None:
                bits = part.tensor.view(torch.uint8) if part.tensor.element_size() == 1 else part.tensor
                bits.copy_(bits.index_select(part.dim, order.to(part.tensor.device)))
        for members in self.lists.values():
            modules = list(members)
            for place, old in enumerate(order.tolist()):
                members[place] = modules[old]

    @contextmanager
    def masked(self, kept: torch.Tensor) -> Iterator[None]:
        """A context in which the router's logits of the experts that are not kept are minus infinity.

        Weights are changed only while the mixture or its router runs, so they may lie in files until then.
        """
        hidden = torch.ones(self.count, dtype=torch.bool, device="cpu")
        hidden[kept.cpu()] = False

        def hiding(own: Callable[..., Any], logits: bool) -> Callable[..., Any]:
            @functools.wraps(own)
            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._biases_hidden(hidden), _HiddenOutputs(hidden) if logits else nullcontext():
                    return own(*args, **kwargs)

            return forward

        with ExitStack() as replaced:
            for module, logits in ((self.router_module, True), (self.module, False)):
                replaced.enter_context(forward_replaced(module, hiding(module.forward, logits)))
            yield

    @contextmanager
    def _biases_hidden(self, hidden: torch.Tensor) -> Iterator[None]:
        """A context in which the router's biases of hidden experts are minus infinity."""
        biases = [
            part
            for part in self.parts()
            if part.structure is None and "bias" in part.key and part.layer not in self.stacks
        ]
        before = [part.tensor.detach().clone() for part in biases]
        try:
            for part in biases:
                removed = hidden.nonzero().flatten().to(part.tensor.device)
                part.tensor.data.index_fill_(part.dim, removed, float("-inf"))
            yield
        finally:
            for part, tensor in zip(biases, before, strict=True):
                part.tensor.data.copy_(tensor)


class _HiddenOutputs(TorchFunctionMode):
    """Sets some outputs of matrix products to minus infinity, in products with as many outputs.

    Args:
        hidden: True for the outputs to set, bool [n_outputs], on the CPU.
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if (func in PRODUCTS or func is F.linear) and output.shape[-1] == len(self._hidden):
            return output.masked_fill(self._hidden.to(output.device), float("-inf"))
        return output


class _Choices(TorchFunctionMode):
    """Finds how many entries ``topk`` takes of a last dimension of a size; 0 if it is not called so."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most = size, 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and args and args[0].shape[-1:] == (self.size,):
            self.most = max(self.most, int(named.get("k", args[1] if len(args) > 1 else 1)))
        return func(*args, **named)


def find_mixtures(
    model: nn.Module, blocks: Sequence[Block], batch: Batch, shared: Callable[[str], bool]
) -> tuple[Mixture, ...] | str | None:
    """The mixtures of a model's blocks, one for each block that has experts.

    Args:
        model: the model, in evaluation mode, with experts that run one by one.
        blocks: its blocks.
        batch: a few inputs, for the trial.
        shared: True for the name of a tensor whose memory other tensors use too.

    Returns:
        the mixtures outside attention; why their experts cannot go; or None if no block has such experts.
    """
    found = mixtures_in(blocks)
    if not found or isinstance(found, str):
        return found or None
    if tied := [part.name for mixture in found for part in mixture.parts() if shared(part.name)]:
        return f"{tied[0]} is shared with other layers"
    count = found[0].count
    with _Choices(count) as choices:
        run_model(model, batch)
    chosen = choices.most or getattr(model.config.get_text_config(), "num_experts_per_tok", None)  # type: ignore[union-attr, operator]
    if not isinstance(chosen, int):
        return f"how many experts {found[0].router} chooses is unknown"
    if chosen >= count:
        return f"each token is sent to {chosen} of {count}"
    return tuple(replace(mixture, chosen=chosen) for mixture in found)


def staying_experts(blocks: Sequence[Block]) -> list[str]:
    """A line for the experts that are part of attention, which stay, with their share of the blocks' parameters."""
    found = {
        path: module
        for block in blocks
        for path, module in block.module.named_modules(prefix=block.name)
        if experts_in(module) and _mixes_tokens(block, path)
    }
    if not found:
        return []
    inside = {p for module in found.values() for p in module.parameters()}
    whole = {p for block in blocks for p in block.module.parameters()}
    share = sum(p.numel() for p in inside) / sum(p.numel() for p in whole)
    return [f"the experts of attention stay ({next(iter(found))}, ...): {share:.1%} of the blocks' parameters"]


def _mixes_tokens(block: Block, path: str) -> bool:
    """True if a module of a block is in attention."""
    return path != block.name and in_attention(block, f"{path}.experts")


def mixtures_in(blocks: Sequence[Block]) -> tuple[Mixture, ...] | str:
    """The modules with experts outside attention, how many are chosen left open; or why their experts cannot go."""
    found: list[Mixture] = []
    for block in blocks:
        homes = {path: experts_in(module) for path, module in block.module.named_modules(prefix=block.name)}
        homes = {path: experts for path, experts in homes.items() if experts and not _mixes_tokens(block, path)}
        if not homes:
            continue
        if len(homes) > 1:
            return f"{block.name} has {len(homes)} mixtures of experts, and one is expected"
        ((path, children),) = homes.items()
        mixture = _mixture(block, path, children)
        if isinstance(mixture, str):
            return mixture
        found.append(mixture)
    if len(numbers := sorted({mixture.count for mixture in found})) > 1:
        return f"blocks have different numbers of them ({', '.join(map(str, numbers))})"
    return tuple(found)


def _mixture(block: Block, path: str, children: Mapping[str, int]) -> Mixture | str:
    """The mixture in a module of a block, or why its experts cannot go."""
    module = block.module if path == block.name else block.module.get_submodule(path.removeprefix(f"{block.name}."))
    if len(counts := set(children.values())) > 1:
        return f"{path} has experts in different numbers ({', '.join(map(str, sorted(counts)))})"
    (count,) = counts
    possible = {}
    for name in routers(block):
        candidate = block.module.get_submodule(".".join(block.path_to(name)))
        if any(tensor.dim() == 2 and tensor.shape[0] == count for _, tensor in own_tensors(candidate)):
            possible[name] = candidate
    possible = {name: of for name, of in possible.items() if name.startswith(f"{path}.")} or possible
    if len(possible) != 1:
        return f"{path} has {len(possible)} layers that may be its router, and one is expected"
    (router,) = possible
    while router.rpartition(".")[0] not in (path, block.name):  # Such as a module with a scale for each expert.
        router = router.rpartition(".")[0]
    router_module = block.module.get_submodule(".".join(block.path_to(router)))
    stacks, lists = {}, {}
    for name in children:
        child = module.get_submodule(name)
        if isinstance(child, nn.ModuleList):
            lists[f"{path}.{name}"] = child
        else:
            stacks[f"{path}.{name}"] = child
    return Mixture(path, count, 0, module, router, router_module, stacks, lists)
