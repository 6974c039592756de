"""Finds outputs of blocks, beside the hidden states, that later blocks take as arguments (T5's position bias)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Link:
    """An argument of a block that is an output of an earlier block.

    Attributes:
        reader: index of the block with the argument.
        place: index of the positional argument, or name of the keyword argument.
        writer: index of the block that returned it.
        output: its index in the tuple that the block returned; at least 1, since the hidden states are first.
    """

    reader: int
    place: int | str
    writer: int
    output: int


@contextmanager
def links_found(modules: Sequence[nn.Module]) -> Iterator[list[Link]]:
    """A context in which the model runs once; it fills the list."""
    found: list[Link] = []
    returned: dict[int, tuple[torch.Tensor, int, int]] = {}

    def reading(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            found.extend(Link(index, place, *returned[id(v)][1:]) for place, v in arguments if id(v) in returned)

        return hook

    def returning(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            for place, value in enumerate(output if isinstance(output, tuple) else ()):
                if place > 0 and isinstance(value, torch.Tensor):
                    returned.setdefault(id(value), (value, index, place))

        return hook

    with ExitStack() as hooks:
        for index, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(reading(index), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(returning(index)).remove)
        yield found


class Carried:
    """The outputs of one batch that links name.

    Args:
        links: all links of the blocks.
    """

    def __init__(self, links: Iterable[Link]) -> None:
        self._links = tuple(links)
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}

    def arguments(self, reader: int) -> dict[int | str, torch.Tensor]:
        """The linked arguments of a block, by their place."""
        links = [link for link in self._links if link.reader == reader]
        return {link.place: self._outputs[link.writer, link.output] for link in links}

    def outputs_of(self, writer: int, output: Any) -> dict[tuple[int, int], Any]:
        """The linked parts of a block's output."""
        places = {link.output for link in self._links if link.writer == writer}
        return {(writer, place): output[place] for place in places}

    def add(self, writer: int, output: Any, like: Carried | None = None) -> None:
        """Keep the linked parts of a block's output; a part that equals that of ``like`` takes no memory."""
        for key, value in self.outputs_of(writer, output).items():
            other = None if like is None else like._outputs.get(key)
            same = other is not None and other.shape == value.shape and torch.equal(other, value)
            self._outputs[key] = other if same and other is not None else value
