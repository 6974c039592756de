"""Replace the linear layers of a model that were pruned by packed layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..decoders.blocks import linears_of, possible_stacks, stacks_of
from ..decoders.experts import Stack
from ..decoders.plan import NameFilter, Skipped
from ..errors import ArgumentError
from ..kernels.few_bits import check_bits
from ..linears import linear_weight
from ..process_memory import give_back_free_memory
from ..solvers.quantize import GROUP
from ..sparsity import Sparsity
from ..tied import tied_parameters
from .expert_stack import ExpertStack, stores_transposed
from .manifest import DENSE
from .nm_linear import NMLinear
from .pack_layer import OFFLOADED, NotEligible, Wanted, nm_of, pack_layer
from .packed_linear import PackedLinear
from .pattern import find_pattern
from .products import RowLimits
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import QuantizedLinear, TiedLinear
from .saving import SavePretrained
from .tables import Tables, forget_ties, possible_bits, tables_of

FREED_BYTES = 64 * 2**20
"""The allocator is asked to return free memory each time this many bytes of dense weights were freed."""


@dataclass(frozen=True)
class PackedLayer:
    """A layer that was packed.

    Attributes:
        name: dotted name in the model.
        pattern: "n:m", "unstructured", or "dense" for a quantized weight that is not pruned.
        dense_bytes, packed_bytes: size of the weight before and after packing.
        bits: bits of a quantized value; None if the layer was not quantized.
    """

    name: str
    pattern: str
    dense_bytes: int
    packed_bytes: int
    bits: int | None = None


@dataclass(frozen=True)
class SparsifyReport:
    """The result of :func:`pack_model`.

    Attributes:
        layers: the packed layers, in the order of the model.
        skipped: layers that stayed dense, each with the reason. Layers that ``include`` or ``exclude`` ruled out are
            not listed.
    """

    layers: tuple[PackedLayer, ...]
    skipped: tuple[Skipped, ...]

    @property
    def dense_bytes(self) -> int:
        """Total size of these layers' weights before packing."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Total size of these layers' weights after packing."""
        return sum(layer.packed_bytes for layer in self.layers)

    def skipped_of(self, names: Collection[str]) -> tuple[Skipped, ...]:
        """Those of the skipped layers that have these names, as the pruned layers that stayed dense."""
        return tuple(layer for layer in self.skipped if layer.name in names)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        sizes = {"dense_bytes": self.dense_bytes, "packed_bytes": self.packed_bytes}
        return {**asdict(self), **sizes}


class WeightsInMemory:
    """Where the weights are while a model is packed. A subclass may keep them elsewhere."""

    def loaded(self, module: nn.Module, parameter: str | None = None) -> AbstractContextManager[object]:
        """A context in which a module's own parameters, or one of them, have their values."""
        return nullcontext()

    def keep(self, layer: nn.Module) -> None:
        """Called inside :meth:`loaded` with each layer that the model gets in place of a dense one."""


def pack_model(
    model: nn.Module,
    pattern: str | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    limits: RowLimits | None = None,
    bits: int | None = None,
    group: int = GROUP,
    head_bits: int | None = None,
    embedding_bits: int | None = None,
    dense_bits: int | None = None,
    all_bits: int | None = None,
    pruned_to: str | None = None,
) -> SparsifyReport:
    """Replace every linear layer that was pruned by a packed one, in place.

    A layer pruned to n:m along its inputs becomes an :class:`~ace_triton.packed.nm_linear.NMLinear`. One with other
    zeros becomes a :class:`~ace_triton.packed.rows_linear.RowsLinear` if at least 45 % of it are zeros.

    This does not prune: use :func:`~ace_triton.prune_blocks.prune_model` first. Each dense weight is freed as soon as
    its layer is packed. A packed layer computes the same product as the pruned dense layer, up to the order of
    summation. Experts that are stacked in one parameter become separate layers
    (:class:`~ace_triton.packed.expert_stack.ExpertStack`). ``sparsify`` is another name for this function.

    Args:
        model: a pruned module that contains ``nn.Linear`` layers, Conv1D layers or stacked experts.
        pattern: "n:m" for all layers; None detects the pattern of each layer.
        include: shell patterns; only layers whose dotted name matches one of them are packed.
        exclude: shell patterns; layers whose dotted name matches one of them stay dense.
        limits: numbers of rows that choose the product of the packed layers; None for the defaults of the device.
        bits: 8 or 4 to round the kept weights to that many bits; None to keep them. Without calibration the rounding is
            to the nearest value. ``prune_model(..., quantize=bits)`` chooses better values; packing keeps these.
        group: for all bits, the number of neighboring inputs that share a scale, a multiple of 32.
        head_bits: 8 or 4 to store the output head in that many bits, pruned or not; None to keep it. If the head shares
            the embedding's weight, the embedding is stored in the same bits.
        embedding_bits: the same for the embedding.
        dense_bits: 8 or 4 to store linear layers that pruning left dense in that many bits; None to keep them.
        all_bits: 8 or 4 for every weight that has no bits of its own and can be stored so: as ``bits``, ``head_bits``,
            ``embedding_bits`` and ``dense_bits``. A head or an embedding that cannot is listed as skipped.
        pruned_to: the pattern that the model was pruned to, if it is known; one other than "n:m" has no effect. With
            ``bits``, it is used for each layer that follows it, also if rounding has set most kept weights to 0.

    Returns:
        The packed layers, and the skipped layers with their reasons.

    Raises:
        ArgumentError: if no layer can be packed, ``pattern`` is not an n:m, bits or group are invalid, or the model has
            no head or embedding that can be stored in few bits; nothing was changed.
        PatternError: if ``pattern`` cannot be read; nothing was changed.
    """
    return pack_layers(
        model,
        WeightsInMemory(),
        pattern,
        include=include,
        exclude=exclude,
        limits=limits,
        bits=bits,
        group=group,
        head_bits=head_bits,
        embedding_bits=embedding_bits,
        dense_bits=dense_bits,
        all_bits=all_bits,
        pruned_to=pruned_to,
    )


sparsify = pack_model
"""Alias of :func:`pack_model`. New code should call ``pack_model``: the function packs, it does not prune."""


def pack_layers(
    model: nn.Module,
    weights: WeightsInMemory,
    pattern: str | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    limits: RowLimits | None = None,
    bits: int | None = None,
    group: int = GROUP,
    head_bits: int | None = None,
    embedding_bits: int | None = None,
    dense_bits: int | None = None,
    all_bits: int | None = None,
    pruned_to: str | None = None,
) -> SparsifyReport:
    """As :func:`pack_model`, for a model whose weights may be elsewhere.

    Args:
        model: the model. Its parameters may be on the meta device if ``weights`` loads them.
        weights: where the weights are.
        pattern, include, exclude, limits, bits, group: as for :func:`pack_model`.
        head_bits, embedding_bits, dense_bits, all_bits, pruned_to: as there.
    """
    for given in (bits, head_bits, embedding_bits, dense_bits, all_bits):
        if given is not None:
            check_bits(given, group)
    left: dict[str, str] = {}
    if all_bits is not None:
        bits, dense_bits = bits or all_bits, dense_bits or all_bits
        head_bits, embedding_bits, left = possible_bits(model, all_bits, head_bits, embedding_bits)
    known = nm_of(pruned_to) if pruned_to is not None and Sparsity(pruned_to).n is not None else None
    wanted = Wanted(None if pattern is None else nm_of(pattern), limits, bits, group, dense_bits, known)
    tables = tables_of(model, head_bits, embedding_bits)
    head, of_head = None, wanted
    if tables.head is not None:
        head = tables.head[0]
        of_head = replace(wanted, bits=tables.head[1], dense_bits=tables.head[1])
    for table in (tables.head, tables.embedding):
        if table is not None:
            _check_finite(model, table[0], weights)
    names = NameFilter.of(model, include, exclude)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tied = tied_parameters(model)
    packed: list[PackedLayer] = []
    skipped: list[Skipped] = []
    freed = 0

    def note(entries: list[PackedLayer]) -> None:
        nonlocal freed
        packed.extend(entries)
        freed += sum(entry.dense_bytes for entry in entries)
        if freed > FREED_BYTES:
            give_back_free_memory()
            freed = 0

    def skip(name: str, weight: torch.Tensor, reason: str) -> None:
        skipped.append(Skipped(name, reason, weight.numel(), weight.numel() / parameters))

    for name, reason in left.items():
        skip(name, model.get_parameter(f"{name}.weight"), reason)
    found = (name for name, _ in linears_of(model) if name and name not in left)
    chosen = [name for name in found if name == head or names.wants(name)]
    for name in [name for name in chosen if name != tables.tied]:
        layer = model.get_submodule(name)
        weight = linear_weight(layer)
        assert weight is not None
        try:
            if id(layer.weight) in tied:
                raise NotEligible("its weight is tied to another layer's")
            with weights.loaded(layer):
                replacement = pack_layer(layer, of_head if name == head else wanted)
                weights.keep(replacement)
        except NotEligible as why_not:
            skip(name, weight, str(why_not))
            continue
        _replace(model, layer, replacement)
        note([_entry(name, replacement)])
    stacks = stacks_of(model)
    tried = {stack.name for stack in stacks}
    while stacks:
        # The list must hold no reference to a packed stack, so that its memory is freed before the next one is packed.
        stack = stacks.pop(0)
        if id(stack.weight) in tied:
            skip(stack.name, stack.weight, "its weight is tied to another layer's")
            continue
        path, _, leaf = stack.name.rpartition(".")
        with weights.loaded(model.get_submodule(path), leaf):
            stack = replace(stack, weight=model.get_parameter(stack.name))
            note(_pack_experts(model, stack, wanted, names, skip, weights))
    for stack in possible_stacks(model):
        if stack.name in tried or not names.wants(stack.name):
            continue
        path, _, leaf = stack.name.rpartition(".")
        with weights.loaded(model.get_submodule(path), leaf):
            weight = model.get_parameter(stack.name).detach()
            if weight.is_meta:
                skip(stack.name, weight, OFFLOADED)
            elif not find_pattern(weight).dense:
                reason = "it is neither a linear layer nor a three-dimensional stack of two or more experts"
                skip(stack.name, weight, reason)
    if tables.embedding is not None:
        note(_pack_embedding(model, tables, weights, group, limits))
    if not packed:
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in skipped[:3])) or "it has no linear layer"
        advice = (
            ""
            if OFFLOADED in reasons
            else "; prune it first (ace-triton prune --sparsity 2:4), or store it as it is in 8 bits (ace-triton pack "
            "--all-bits 8)"
        )
        raise ArgumentError(f"no layer of {type(model).__name__} can be packed: {reasons}{advice}")
    give_back_free_memory()
    forget_ties(model)
    SavePretrained.attach(model)
    return SparsifyReport(tuple(packed), tuple(skipped))


def set_row_limits(model: nn.Module, limits: RowLimits | None) -> None:
    """Set the limits that choose the product by the number of rows, for all packed layers of a model.

    Args:
        model: a model with packed layers.
        limits: the limits; None for the defaults of the device.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.limits = limits


def _check_finite(model: nn.Module, name: str, weights: WeightsInMemory) -> None:
    """ArgumentError if a head or an embedding holds NaN or infinity, before anything is changed."""
    module = model.get_submodule(name)
    with weights.loaded(module):
        weight: Any = module.weight
        if not weight.is_meta and not bool(weight.detach().isfinite().all()):
            raise ArgumentError(
                f"{name} holds NaN or infinity, so it cannot be stored in few bits: load the model again"
            )


def _pack_embedding(
    model: nn.Module, tables: Tables, weights: WeightsInMemory, group: int, limits: RowLimits | None
) -> list[PackedLayer]:
    """Store the embedding in few bits, and let a tied head multiply by it."""
    assert tables.embedding is not None
    name, bits = tables.embedding
    embedding = model.get_submodule(name)
    assert isinstance(embedding, nn.Embedding)
    with weights.loaded(embedding):
        if embedding.weight.is_meta:
            raise ArgumentError(f"{name}: {OFFLOADED}")
        quantized = QuantizedEmbedding.from_embedding(embedding, bits, group)
        weights.keep(quantized)
    if tables.tied is not None:
        head = model.get_submodule(tables.tied)
        bias: Any = head.bias
        _replace(model, head, TiedLinear(quantized, bias, limits).train(head.training))
    _replace(model, embedding, quantized)
    size = quantized.packed
    return [PackedLayer(name, DENSE, size.dense_bytes, size.packed_bytes, bits)]


def _pack_experts(
    model: nn.Module,
    stack: Stack,
    wanted: Wanted,
    names: NameFilter,
    skip: Callable[[str, torch.Tensor, str], None],
    weights: WeightsInMemory,
) -> list[PackedLayer]:
    """Replace a stack by one layer per expert, packed if possible. Leave the stack if no expert can be packed."""
    experts = model.get_submodule(stack.name.rpartition(".")[0])
    transposed = stores_transposed(experts)
    if transposed is None:
        skip(stack.name, stack.weight, f"a {type(experts).__name__} does not multiply by its experts one by one")
        return []
    layers: list[nn.Module] = []
    entries: list[PackedLayer] = []
    for name, expert in stack.linears(transposed=transposed).items():
        layers.append(expert)
        if names.wants(name):
            try:
                packed = pack_layer(expert, wanted)
            except NotEligible as why_not:
                skip(name, expert.weight, str(why_not))
                continue
            weights.keep(packed)
            layers[-1] = packed
            entries.append(_entry(name, packed))
    if entries:
        ExpertStack.take_place(experts, stack, layers)
        for left in getattr(experts, stack.name.rpartition(".")[2]).children():
            if isinstance(left, nn.Linear):
                weights.keep(left)
    return entries


def _replace(model: nn.Module, layer: nn.Module, replacement: nn.Module) -> None:
    """Put ``replacement`` in every place of the model that holds ``layer``."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is layer:
                setattr(module, name, replacement)


def _entry(name: str, layer: PackedLinear) -> PackedLayer:
    size, bits = layer.packed, layer.bits if isinstance(layer, (NMLinear, QuantizedLinear)) else None
    return PackedLayer(name, layer.pattern, size.dense_bytes, size.packed_bytes, bits)
