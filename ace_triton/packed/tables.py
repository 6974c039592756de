"""The tables of a model that can be stored in few bits without being pruned: its output head and its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ArgumentError
from ..linears import is_linear
from .packed_linear import PackedLinear
from .quantized_embedding import QuantizedEmbedding, why_not_quantized
from .quantized_linear import TiedLinear

PACKED_MODULES = (PackedLinear, QuantizedEmbedding)
"""Modules that store a weight in a packed form."""


@dataclass(frozen=True)
class Tables:
    """The tables that are to be stored in few bits, as :func:`tables_of` found them.

    Attributes:
        head: name and bits of an output head with a weight of its own; None to leave the head.
        embedding: name and bits of the embedding; None to leave it.
        tied: name of the head that shares the embedding's weight, if there is one.
    """

    head: tuple[str, int] | None = None
    embedding: tuple[str, int] | None = None
    tied: str | None = None


def tables_of(model: Any, head_bits: int | None, embedding_bits: int | None) -> Tables:
    """Find the output head and the embedding, and check that they can be stored in few bits.

    If the head shares the embedding's weight, either number of bits is for both.

    Raises:
        ArgumentError: if the model has no such table, a table cannot be stored in few bits, or a tied head and its
            embedding are to have different bits.
    """
    if head_bits is None and embedding_bits is None:
        return Tables()
    head, embedding = _table(model, "get_output_embeddings"), _table(model, "get_input_embeddings")
    if head_bits is not None and head is None:
        raise ArgumentError(f"a {type(model).__name__} has no output head: give no bits for it")
    if embedding_bits is not None and embedding is None:
        raise ArgumentError(f"a {type(model).__name__} has no embedding: give no bits for it")
    names = {id(module): name for name, module in model.named_modules()}
    if head is not None and embedding is not None and head.weight is embedding.weight:
        bits = head_bits or embedding_bits
        assert bits is not None
        if head_bits and embedding_bits and head_bits != embedding_bits:
            raise ArgumentError(
                f"{head_bits} bits for the head and {embedding_bits} for the embedding: they share a weight, so both "
                "need the same bits; give one of them"
            )
        _check_embedding(model, embedding, {id(head), id(embedding)})
        _check_head(head)
        return Tables(None, (names[id(embedding)], bits), names[id(head)])
    if embedding_bits is not None:
        _check_embedding(model, embedding, {id(embedding)})
    if head_bits is not None:
        _check_head(head)
    return Tables(
        None if head_bits is None else (names[id(head)], head_bits),
        None if embedding_bits is None else (names[id(embedding)], embedding_bits),
    )


def possible_bits(
    model: Any, all_bits: int, head_bits: int | None, embedding_bits: int | None
) -> tuple[int | None, int | None, dict[str, str]]:
    """The bits of the head and of the embedding, if tables without bits of their own get ``all_bits`` if they can.

    Returns:
        The bits of the head, those of the embedding, and by name of a table the reason why it keeps its type.
    """
    left: dict[str, str] = {}
    head, embedding = _table(model, "get_output_embeddings"), _table(model, "get_input_embeddings")
    names = {id(module): name for name, module in model.named_modules()}
    shared = head is not None and embedding is not None and head.weight is embedding.weight
    if head is not None and head_bits is None and not (shared and embedding_bits):
        try:
            tables_of(model, all_bits, None)
            head_bits = all_bits
        except ArgumentError as error:
            left[names[id(head)]] = str(error).partition(": give no bits")[0].partition("; give no bits")[0]
    if embedding is not None and embedding_bits is None and not shared:
        try:
            tables_of(model, None, all_bits)
            embedding_bits = all_bits
        except ArgumentError as error:
            left[names[id(embedding)]] = str(error).partition("; give no bits")[0]
    return head_bits, embedding_bits, left


def _table(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _check_embedding(model: nn.Module, embedding: Any, known: set[int]) -> None:
    reason = why_not_quantized(embedding)
    if reason is not None:
        raise ArgumentError(
            f"the embedding cannot be stored in few bits: {reason}; give no bits for it, nor for a head that shares it"
        )
    others = [
        name
        for name, module in model.named_modules()
        if id(module) not in known and any(own is embedding.weight for own in module.parameters(recurse=False))
    ]
    if others:
        raise ArgumentError(
            f"the embedding cannot be stored in few bits: {', '.join(others)} shares its weight; give no bits for it, "
            "nor for a head that shares it"
        )


def _check_head(head: Any) -> None:
    if not is_linear(head):
        raise ArgumentError(f"the output head is a {type(head).__name__}, not a linear layer: give no bits for it")
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        raise ArgumentError(
            "the output head has hooks or its own forward, which packing would remove: remove them first"
        )


def forget_ties(model: nn.Module) -> None:
    """Keep transformers from tying the weights of packed modules, which are not parameters."""
    for module in model.modules():
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(module, attribute, None)
            if isinstance(keys, dict):
                kept = {
                    one: other for one, other in keys.items() if not (_packed(module, one) or _packed(module, other))
                }
                if len(kept) < len(keys):
                    setattr(module, attribute, kept)


def restore_ties(model: Any) -> None:
    """Undo :func:`forget_ties`, after the model was unpacked."""
    for module in model.modules():
        module.__dict__.pop("_tied_weights_keys", None)
    if hasattr(model, "get_expanded_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _packed(module: nn.Module, name: str) -> bool:
    """True if ``name`` is a tensor of a packed module."""
    try:
        return isinstance(module.get_submodule(name.rpartition(".")[0]), PACKED_MODULES)
    except AttributeError:
        return False


def name_of_embedding(model: nn.Module, head: TiedLinear) -> str:
    """The name of the embedding that a head shares its weight with."""
    return next(name for name, module in model.named_modules() if module is head.embedding)
