"""Taylor terms of the loss for structures: what changes if a structure's weights become 0, to second order.

g is the gradient of the mean loss of a batch, w the weights of a structure, F the Fisher diagonal, which is the mean of
g^2 over batches. One backward runs for each batch; if weights are in files,
:mod:`ace_triton.structures.block_gradients` runs it one block at a time. Gradients are added up in fp32 and freed as
soon as they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, run_model
from ..decoders.calibration_mode import calibration_mode
from ..errors import ArgumentError
from .coupled import Entry, Structures
from .coupled_layers import Coupled
from .parts import Part

Progress = Callable[[int, int], None]

Sums = Collection[str]
"""Which sums over batches are kept: "gradient", "fisher"."""

SUMS: dict[str, Sums] = {"vector": (), "element": ("gradient",), "second": ("fisher",), "mixed": ("gradient", "fisher")}
"""The sums that the terms of LLM-Pruner need."""


@dataclass
class Taylor:
    """Taylor terms of the structures of one consumer, summed over batches as they come.

    Attributes:
        products: g^T w over a structure, by layer, one entry for each batch, each [n_structures].
        elements: sum of |g w - g^2 w^2 / 2| over a structure, one entry for each batch.
        gradient, fisher: sums of g and of g^2 over batches, by tensor, if they are kept.
    """

    products: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    elements: list[torch.Tensor] = field(default_factory=list)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    fisher: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0

    def fill(self) -> None:
        """Add 0 for the layers that the last batches sent no gradient to, such as an expert without tokens."""
        for parts in (*self.products.values(), *([self.elements] if self.elements else [])):
            while len(parts) < self.batches:
                parts.append(torch.zeros_like(parts[0]))

    def vector(self) -> torch.Tensor:
        """|g^T w - w^T H w / 2| of each batch, with w^T H w = (g^T w)^2, [n_batches, n_structures]."""
        whole = torch.stack([torch.stack(parts) for parts in self.products.values()]).sum(0)
        return (whole - whole.square() / 2).abs()

    def element(self) -> torch.Tensor:
        """The sum of |g w - F w^2 / 2| of each batch, with its own F, [n_batches, n_structures]."""
        return torch.stack(self.elements)


def taylor_terms(
    model: nn.Module,
    structures: Structures,
    batches: Sequence[Batch],
    *,
    sums: Sums = (),
    progress: Progress | None = None,
) -> dict[str, Taylor]:
    """Taylor terms by name of the consumer.

    Args:
        model: a causal language model; unchanged at return.
        structures: the structures.
        batches: token ids.
        sums: which sums to keep; each takes the memory of an fp32 copy of the weights.
        progress: called with the number of batches done, and of all batches.

    Raises:
        ArgumentError: if the model is in fp16, in which gradients underflow, no loss can be computed, or no gradient
            reaches a layer that is no expert.
    """
    check_gradients(model, batches)
    entries = structures.entries.values()
    found = {entry.consumer: Taylor() for entry in entries}
    with calibration_mode(model), frozen(model), adding(entries, structures, found, sums), torch.enable_grad():
        for number, batch in enumerate(batches):
            with of_batch(found):
                batch_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            if progress is not None:
                progress(number + 1, len(batches))
    check_reached(entries, found)
    return found


def check_gradients(model: nn.Module, batches: Sequence[Batch]) -> None:
    """ArgumentError if gradients would underflow, or the model reads other inputs than token ids."""
    if next(model.parameters()).dtype == torch.float16:
        raise ArgumentError("gradients underflow in float16: load the model in float32 or bfloat16 (--dtype float32)")
    if not all(batch.of_text for batch in batches):
        raise _no_loss(model)


def check_reached(entries: Iterable[Entry], found: Mapping[str, Taylor]) -> None:
    """ArgumentError if no gradient reached a layer that is no expert."""
    routed = {entry.consumer for entry in entries if isinstance(entry, Coupled) and entry.expert == "routed"}
    if silent := [name for name, taylor in found.items() if not taylor.elements and name not in routed]:
        raise ArgumentError(f"no gradient reached {silent[0]}: use a method without gradients (--method flap)")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter needs a gradient or has one; at exit all are as they were."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def adding(
    entries: Iterable[Entry], structures: Structures, found: Mapping[str, Taylor], sums: Sums = ()
) -> Iterator[None]:
    """A context in which a backward adds to Taylor terms; all parameters are frozen before and after.

    Args:
        entries: the structures whose tensors need gradients.
        structures: those of the whole model.
        found: the terms by name of the consumer.
        sums: which sums to keep.
    """
    with ExitStack() as hooks:
        for entry in entries:
            for part in entry.parts(structures.layers):
                if isinstance(part.tensor, nn.Parameter):
                    part.tensor.requires_grad_(True)
                    hooks.callback(part.tensor.requires_grad_, False)
                    hook = _adding(entry, part, found[entry.consumer], sums)
                    hooks.callback(part.tensor.register_post_accumulate_grad_hook(hook).remove)
        yield


@contextmanager
def of_batch(found: Mapping[str, Taylor]) -> Iterator[None]:
    """A context in which one batch adds to Taylor terms."""
    for taylor in found.values():
        taylor.batches += 1
    yield
    for taylor in found.values():
        taylor.fill()


def batch_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean negative log-likelihood of a batch's next tokens, in nats; errors as :func:`token_losses`."""
    return token_losses(model, batch).mean()


def token_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The negative log-likelihood of each real token that follows another, in nats, [n_tokens].

    Raises:
        ArgumentError: if the model reads other inputs than token ids, or gives no logits.
    """
    return losses_in(run_model(model, batch), model, batch)


def losses_in(output: Any, model: nn.Module, batch: Batch) -> torch.Tensor:
    """As :func:`token_losses`, of an output of the model for the batch."""
    logits = getattr(output, "logits", None)
    if not batch.of_text or logits is None or logits.shape[:2] != batch.ids.shape:
        raise _no_loss(model)
    losses = losses_of(logits, batch)
    return losses.flatten() if batch.valid is None else losses[batch.valid[:, 1:]]


def _no_loss(model: nn.Module) -> ArgumentError:
    return ArgumentError(
        f"{type(model).__name__} gives no logits for each token of its text, so there is no loss to take gradients of: "
        "use a method without gradients (--method flap)"
    )


def losses_of(logits: torch.Tensor, batch: Batch, start: int = 0) -> torch.Tensor:
    """The negative log-likelihood of the tokens that follow some tokens, in nats, [n_sequences, n_following].

    Args:
        logits: [n_sequences, n_tokens, vocabulary], of tokens that lie side by side.
        batch: the tokens.
        start: index of the first of these tokens. The last token of a sequence has no following one.
    """
    targets = batch.ids[:, start + 1 : start + 1 + logits.shape[1]]
    logits = logits[:, : targets.shape[1]].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def _adding(entry: Entry, part: Part, taylor: Taylor, sums: Sums) -> Callable[[torch.Tensor], None]:
    """A hook that adds a tensor's gradient to the terms and frees it."""

    @torch.no_grad()
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient, weight = parameter.grad.float(), parameter.detach().float()
        parameter.grad = None
        product = gradient * weight
        parts = taylor.products.setdefault(part.layer, [])
        of_layer = entry.by_structure(part, product)
        while len(parts) < taylor.batches - 1:
            parts.append(torch.zeros_like(of_layer))
        if len(parts) < taylor.batches:
            parts.append(of_layer)
        else:
            parts[-1] = parts[-1] + of_layer
        element = entry.by_structure(part, (product - product.square() / 2).abs())
        while len(taylor.elements) < taylor.batches - 1:
            taylor.elements.append(torch.zeros_like(element))
        if len(taylor.elements) < taylor.batches:
            taylor.elements.append(element)
        else:
            taylor.elements[-1] = taylor.elements[-1] + element
        for which, value in (("gradient", gradient), ("fisher", gradient)):
            if which in sums:
                kept: dict[str, torch.Tensor] = getattr(taylor, which)
                value = value.square() if which == "fisher" else value
                kept[part.name] = kept[part.name].add_(value) if part.name in kept else value

    return hook


def llm_pruner_terms(terms: str, entry: Entry, structures: Structures, taylor: Taylor) -> torch.Tensor:
    """LLM-Pruner's importance of each structure (arXiv 2305.11627), summed over its layers, [n_structures].

    Args:
        terms: "vector", |sum of g w| over the part of a structure in one layer; "element", the sum of |g w|; "second",
            the sum of |w F w|; or "mixed", the sum of |g w - w F w / 2|.
        entry: the structures of one kind in one block.
        structures: those of the whole model.
        taylor: their Taylor terms, with the sums that :data:`SUMS` names.
    """
    if terms == "vector":
        return torch.stack([torch.stack(parts).mean(0).abs() for parts in taylor.products.values()]).sum(0)
    total = torch.zeros(entry.count, dtype=torch.float32, device=taylor.elements[0].device)
    for part in entry.parts(structures.layers):
        if part.name not in (taylor.fisher if terms == "second" else taylor.gradient):
            continue  # A buffer, or an expert that no token was sent to.
        weight = part.tensor.detach().float()
        value = 0.0 if terms == "second" else taylor.gradient[part.name] / taylor.batches * weight
        if terms != "element":
            second = taylor.fisher[part.name] / taylor.batches * weight.square()
            value = second if terms == "second" else value - second / 2
        assert isinstance(value, torch.Tensor)
        total = total + entry.by_structure(part, value.abs())
    return total
