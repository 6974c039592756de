"""Builds the smaller model from its configuration and the kept parts of the weights, as transformers would load it.

The fields of the configuration are found by trial: a change is accepted if the model that it describes has exactly the
tensors, by name and shape, that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..decoders.blocks import Block
from ..decoders.calls import Call
from ..decoders.finished import forward_replaced, in_tuple
from ..errors import ArgumentError
from ..tied import memory_of
from .coupled import Entry, Structures
from .coupled_layers import Coupled, Kind
from .uneven import SHAPES, resize, shapes_field

WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim")
HEAD_FIELDS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
GROUP_FIELDS = ("num_key_value_heads", "num_kv_heads")
EXPERT_WIDTH_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", *WIDTH_FIELDS)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
BIAS_FIELDS: dict[Kind, tuple[str, ...]] = {"channels": ("mlp_bias",), "groups": ("attention_bias",)}
"""Names under which configurations have the feed-forward width, that of an expert, the numbers of heads, groups and
experts, the depth, and biases."""

Changes = dict[str, Any]
"""New values of fields of the text configuration."""


@dataclass(frozen=True)
class Kept:
    """What is kept.

    Attributes:
        structures: by name of the consumer, the indices of the kept structures, int64, ascending.
        blocks: indices of the kept blocks, ascending; None for all.
    """

    structures: Mapping[str, torch.Tensor]
    blocks: tuple[int, ...] | None = None


def shapes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of a model's state dict without values, on the meta device; shared ones stay shared."""
    known: dict[int, torch.Tensor] = {}
    tensors: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return {name: known.setdefault(id(tensor), tensor.detach().to("meta")) for name, tensor in tensors.items()}


def values_in(model: nn.Module, block: Block) -> dict[str, torch.Tensor]:
    """The entries of the state dict that belong to a block, which is in memory."""
    tensors: Mapping[str, torch.Tensor] = block.module.state_dict()
    return {f"{block.name}.{name}": tensor for name, tensor in tensors.items()}


def kept_tensors(
    tensors: Mapping[str, torch.Tensor], structures: Structures, blocks: Sequence[Block], kept: Kept
) -> dict[str, torch.Tensor]:
    """The entries of the state dict of the smaller model; tensors that keep their shape are not copied.

    Args:
        tensors: those of the dense model, by name, with or without values; or those of some blocks.
        structures, blocks: what the model has.
        kept: what is kept of it; structures in blocks without tensors are left out.
    """
    inside = [block for block in blocks if any(name.startswith(f"{block.name}.") for name in tensors)]
    present = [entry for block in inside for entry in structures.within(block) if entry.consumer in kept.structures]
    result = dict(tensors)
    for entry in present:
        result = entry.kept(result, structures.layers, kept.structures[entry.consumer])
    if kept.blocks is None:
        return result
    names = {block.name: place for place, block in enumerate(blocks)}
    new_place = {old: new for new, old in enumerate(kept.blocks)}
    found = {}
    for name, tensor in result.items():
        owner = next((block for block in names if name.startswith(f"{block}.")), None)
        if owner is None:
            found[name] = tensor
        elif names[owner] in new_place:
            parent, _, _ = owner.rpartition(".")
            found[f"{parent}.{new_place[names[owner]]}{name.removeprefix(owner)}"] = tensor
    return found


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's text part; ArgumentError if the model has no configuration of transformers."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "_from_config"):
        raise ArgumentError(
            f"{type(model).__name__} is no model of transformers, so no configuration says how wide it is: give a "
            "transformers model"
        )
    return config.get_text_config()


def changed_config(model: nn.Module, changes: Changes) -> Any:
    """A copy of a model's configuration with changed fields of its text part."""
    config = copy.deepcopy(model.config)
    text: Any = config.get_text_config()  # type: ignore[operator, union-attr]
    for name, value in changes.items():
        setattr(text, name, value)
    return config


def skeleton(model: nn.Module, config: Any) -> nn.Module:
    """A model of this configuration, with its parameters on the meta device and its buffers on the CPU."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        built: nn.Module = type(model)._from_config(config, dtype=model.dtype)  # type: ignore[attr-defined, operator]
        resize(built)
    built.tie_weights()  # type: ignore[operator]
    return built


def misfit(model: nn.Module, changes: Changes, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Why a changed configuration does not describe a model with these tensors; None if it does."""
    try:
        built = skeleton(model, changed_config(model, changes))
    except Exception as error:
        return f"{type(model).__name__} refuses such sizes ({' '.join(str(error).split())})"
    wanted = built.state_dict()
    for name, tensor in tensors.items():
        if name not in wanted or wanted[name].shape != tensor.shape:
            have = tuple(wanted[name].shape) if name in wanted else "no tensor of this name"
            return f"{name} would be {tuple(tensor.shape)}, but the configuration has {have}"
    if missing := wanted.keys() - tensors.keys():
        return f"{min(missing)} would be missing"
    return None


def config_changes(model: nn.Module, kind: Kind, left: int, entry: Entry) -> list[Changes]:
    """Possible changes of the configuration for ``left`` structures of a kind in each block."""
    text = text_config(model)
    if kind == "channels":
        names = [name for name in WIDTH_FIELDS if hasattr(text, name)]
        return [{name: _like(getattr(text, name), left)} for name in names]
    if kind == "expert_channels":
        names = [name for name in EXPERT_WIDTH_FIELDS if getattr(text, name, None) == entry.count]
        return [{name: left} for name in names]
    if kind == "experts":
        own = dict.fromkeys(text.attribute_map.get(name, name) for name in EXPERT_FIELDS)
        return [{name: left} for name in own if getattr(text, name, None) == entry.count]
    heads, groups = (
        [n for n in names if isinstance(getattr(text, n, None), int)] for names in (HEAD_FIELDS, GROUP_FIELDS)
    )
    if not heads:
        return []
    share = getattr(text, heads[0]) // entry.count
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, heads[0])
    return [{heads[0]: left * share, **({groups[0]: left} if groups else {}), "head_dim": width}]


def _like(value: Any, width: int) -> Any:
    """The width in the form of an old value: a list has one width for each block."""
    return [width] * len(value) if isinstance(value, (list, tuple)) else width


def without_unfit_kinds(model: nn.Module, structures: Structures, blocks: Sequence[Block]) -> Structures:
    """The structures without kinds that the model's configuration cannot have fewer of, with the reasons.

    Shared experts keep their width if the configuration has a number of its own for it.
    """
    shapes = shapes_of(model)
    for kind, entries in list(structures.coupled.items()):
        left = entries[0].count - 1
        tries = config_changes(model, kind, left, entries[0])
        reasons: list[str | None] = []
        alone = tuple(entry for entry in entries if not isinstance(entry, Coupled) or entry.expert != "shared")
        for chosen in (alone, entries) if len(alone) < len(entries) else (entries,):
            fewer = {entry.consumer: torch.arange(structures.scaled(entry, left), device="cpu") for entry in chosen}
            tensors = kept_tensors(shapes, structures, blocks, Kept(fewer))
            reasons = [misfit(model, changes, tensors) for changes in tries]
            if None in reasons:
                structures = structures.with_entries(kind, chosen)
                break
        else:
            why = reasons[0] if reasons else f"no field of {type(text_config(model)).__name__} has their number"
            structures = structures.without(kind, f"{why}")
    return structures


def width_changes(
    model: nn.Module,
    structures: Structures,
    left: Mapping[Kind, int],
    tensors: Mapping[str, torch.Tensor],
    *,
    uneven: bool = False,
) -> Changes:
    """The changes of the configuration for the structures that are left.

    Args:
        model: the dense model.
        structures: its structures.
        left: number of structures that are left in each block, by kind.
        tensors: the shapes of the tensors of the smaller model.
        uneven: True if the widths of feed-forwards differ; then the configuration has the shapes of their layers.
    """
    options: list[Changes] = [{}]
    for kind, number in left.items():
        if kind == "channels" and uneven:
            entries = [entry for entry in structures.coupled[kind] if isinstance(entry, Coupled)]
            field = {SHAPES: shapes_field(entries, structures.layers, tensors)}
            options = [{**done, **field} for done in options]
            continue
        more = config_changes(model, kind, number, structures.coupled[kind][0])
        options = [{**done, **changes} for done in options for changes in more]
    reasons = []
    for changes in options:
        reasons.append(misfit(model, changes, tensors))
        if reasons[-1] is None:
            return changes
    raise ArgumentError(f"{type(model).__name__} cannot have these widths: {reasons[0]}")


def depth_changes(model: nn.Module, n_blocks: int, kept: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> Changes:
    """The changes of the configuration if only some blocks are kept: the depth, and lists with an entry per block."""
    text = text_config(model)
    names = [name for name in DEPTH_FIELDS if getattr(text, name, None) == n_blocks]
    if not names:
        raise ArgumentError(
            f"{type(model).__name__}: no field of its configuration has its number of blocks, {n_blocks}, so none can "
            "be removed; remove channels (--method flap)"
        )
    lists = {
        name: [value[place] for place in kept]
        for name, value in text.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == n_blocks
    }
    changes = {names[0]: len(kept), **lists}
    reason = misfit(model, changes, tensors)
    if reason is not None:
        raise ArgumentError(f"{type(model).__name__} cannot have {len(kept)} of its {n_blocks} blocks: {reason}")
    return changes


def bias_changes(
    model: nn.Module, changes: Changes, tensors: dict[str, torch.Tensor], consumers: Mapping[Kind, Sequence[str]]
) -> tuple[Changes, dict[str, torch.Tensor]]:
    """Give consumers without a bias one, if the architecture has a field for it (Llama's ``mlp_bias``).

    Args:
        model: the dense model.
        changes: the changes of the configuration so far.
        tensors: the shapes of the tensors of the smaller model.
        consumers: names of the consumers that are to have a bias, by kind.

    Returns:
        The changes and the shapes, with new biases. They stay as given if there is no such field.
    """
    text = text_config(model)
    for kind, names in consumers.items():
        if all(f"{name}.bias" in tensors for name in names):
            continue
        for field in (name for name in BIAS_FIELDS.get(kind, ()) if getattr(text, name, None) is False):
            more = {**changes, field: True}
            wanted = skeleton(model, changed_config(model, more)).state_dict()
            new = {name: tensor for name, tensor in wanted.items() if name not in tensors}
            if {f"{name}.bias" for name in names} <= new.keys() and all(name.endswith(".bias") for name in new):
                changes, tensors = more, {**tensors, **new}
    return changes, tensors


def possible_biases(model: nn.Module) -> dict[Kind, dict[str, torch.Tensor]]:
    """The shapes of the biases that :func:`bias_changes` can add if structures of a kind are removed, by kind."""
    text, own = text_config(model), shapes_of(model)
    found: dict[Kind, dict[str, torch.Tensor]] = {}
    for kind, fields in BIAS_FIELDS.items():
        for field in (name for name in fields if getattr(text, name, None) is False):
            wanted = skeleton(model, changed_config(model, {field: True})).state_dict()
            new = {name: tensor for name, tensor in wanted.items() if name not in own}
            if all(name.endswith(".bias") for name in new):
                found.setdefault(kind, {}).update(new)
    return found


def build(model: nn.Module, changes: Changes, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The smaller model in evaluation mode, with tensors of its own.

    Args:
        model: the dense model.
        changes: the changes of its configuration.
        tensors: the tensors of the smaller model. New biases, which have no values, are 0.
    """
    built, device = bare(model, changes), next(model.parameters()).device
    dense = {memory_of(tensor) for tensor in model.state_dict().values()}
    own = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            own[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            own[name] = tensor.detach().clone() if memory_of(tensor) in dense else tensor.detach()
    built.load_state_dict(own, assign=True)
    built.tie_weights()  # type: ignore[operator]
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(requires.get(name, True))
    return built.to(device)


def bare(model: nn.Module, changes: Changes) -> nn.Module:
    """The smaller model in evaluation mode, with parameters on the meta device."""
    built = skeleton(model, changed_config(model, changes))
    if (generation := getattr(model, "generation_config", None)) is not None:
        built.generation_config = copy.deepcopy(generation)  # type: ignore[assignment]
    return built.eval()


@contextmanager
def masked(structures: Structures, kept: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A context in which consumers read 0 in place of structures that are not kept, and such experts are not chosen."""
    with ExitStack() as hooks:
        for name, chosen in kept.items():
            entry = structures.entries[name]
            if not isinstance(entry, Coupled):
                hooks.enter_context(entry.masked(chosen))
                continue
            layer = structures.layers[name]
            mask = column_mask(entry, layer, chosen)

            def hide(_module: nn.Module, args: tuple[Any, ...], mask: torch.Tensor = mask) -> tuple[torch.Tensor, ...]:
                return (args[0] * mask.to(args[0].dtype), *args[1:])

            hooks.callback(layer.register_forward_pre_hook(hide).remove)
        yield


def column_mask(entry: Coupled, layer: nn.Module, kept: torch.Tensor) -> torch.Tensor:
    """True for the inputs of a consumer that belong to kept structures, bool [in_features], on its device."""
    weight = layer.get_parameter("weight")
    size = weight.shape[int(isinstance(layer, nn.Linear))]
    mask = torch.zeros(size, dtype=torch.bool, device=weight.device)
    mask[entry.index(entry.consumer, size, kept).to(weight.device)] = True
    return mask


@contextmanager
def skipped(blocks: Sequence[Block], sizes: Sequence[int | None]) -> Iterator[None]:
    """A context in which blocks return their hidden states unchanged.

    Args:
        blocks: the blocks to skip.
        sizes: for each, the size of the tuple that it returns, or None if it returns a tensor.
    """
    with ExitStack() as stubs:
        for block, size in zip(blocks, sizes, strict=True):

            def stub(*args: Any, size: int | None = size, **kwargs: Any) -> Any:
                return in_tuple(Call.of(args, kwargs).hidden, size)

            stubs.enter_context(forward_replaced(block.module, stub))
        yield
