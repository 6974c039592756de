"""The safetensors file of a layer's statistics: tensors, and a header with a few values as JSON.

All values and tensors are checked when a file is read, because kernels do not check statistics again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import StatsError
from .channel_moments import ChannelMoments
from .statistic import Saved, Statistic, TensorForm, is_count, statistics

FORMAT = "ace_triton.activation_stats.1"

_OTHER_FORMS = {"consumer_norm": TensorForm("i", optional=True)}
"""Tensors that belong to no statistic."""

_SHARED_LENGTHS = "ijs"
"""Letters of a form that mean the same length in all statistics of a file."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        in_features: number of channels.
        count: tokens seen, padding left out.
        parts: the statistics.
        consumer_norm: input norms of the layer that reads the outputs, or None.
    """

    in_features: int
    count: int
    parts: tuple[Statistic, ...]
    consumer_norm: torch.Tensor | None = None


def write(path: str | Path, contents: Contents) -> None:
    """Write statistics; those that have seen no token are left out.

    Raises:
        StatsError: the file cannot be written.
    """
    facts: dict[str, Any] = {"format": FORMAT, "in_features": contents.in_features, "count": contents.count}
    tensors = {} if contents.consumer_norm is None else {"consumer_norm": contents.consumer_norm}
    for part in contents.parts:
        own = part.tensors()
        if unknown := set(own) - set(part.forms):
            raise StatsError(f"{part.words} cannot be saved: its forms lack {', '.join(sorted(unknown))}")
        tensors |= {part.file_prefix + name: tensor for name, tensor in own.items()}
        if own and part.fact_names:
            facts[part.name] = part.facts()
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, str(path), metadata={"ace_triton": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        raise StatsError(f"{path}: statistics cannot be written ({error})") from error


def read(path: str | Path) -> Contents:
    """Read and check a file; tensors are on the CPU.

    Raises:
        StatsError: the file is missing, has another format, holds a statistic that is not registered, or its contents
            are inconsistent; the message says which.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {}).get("ace_triton", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise StatsError(f"{path}: cannot be read as activation statistics ({error})") from error
    found = facts.pop("format", None) if isinstance(facts, dict) else None
    if found != FORMAT:
        raise StatsError(
            f"{path}: not activation statistics of this version (format {found!r}, expected {FORMAT!r}): collect "
            "them again"
        )
    if missing := sorted({name.partition(".")[0] for name in tensors if "." in name} - set(statistics())):
        raise StatsError(
            f"{path}: it holds the statistic {missing[0]!r}, which is not registered: first import the module that "
            "registers it"
        )
    try:
        _check_facts(facts)
        parts = [kind for kind in statistics().values() if _is_in(kind, facts, tensors)]
        _check_names(parts, facts, tensors)
        _check_tensors(facts, tensors)
        loaded = tuple(kind.load(_saved(kind, facts, tensors)) for kind in parts)
    except StatsError as error:
        raise StatsError(f"{path}: {error}; the file is damaged or was edited: collect statistics again") from None
    return Contents(facts["in_features"], facts["count"], loaded, tensors.get("consumer_norm"))


def _check_facts(facts: dict[str, Any]) -> None:
    with_facts = {kind.name: kind.fact_names for kind in statistics().values() if kind.fact_names}
    if set(facts) - set(with_facts) != {"in_features", "count"}:
        raise StatsError(
            f"the header must have in_features and count, and may have {', '.join(with_facts)}; it has {sorted(facts)}"
        )
    for name in ("in_features", "count"):
        if not is_count(facts[name]) or facts[name] < 1:
            raise StatsError(f"{name} must be a whole number, 1 or more, got {facts[name]!r}")
    for name, wanted in with_facts.items():
        own = facts.get(name, dict.fromkeys(wanted))
        if not isinstance(own, dict) or set(own) != set(wanted):
            raise StatsError(f"{name} must have {', '.join(wanted)}, got {own!r}")


def _names(kind: type[Statistic], *, needed: bool = False) -> list[str]:
    """The names of a statistic in a file: of its facts, and of its tensors; with ``needed``, without optional ones."""
    tensors = [kind.file_prefix + name for name, form in kind.forms.items() if not (needed and form.optional)]
    return [*([kind.name] if kind.fact_names else []), *tensors]


def _is_in(kind: type[Statistic], facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bool:
    """True if a file has anything of a statistic. All files have the moments."""
    return kind is ChannelMoments or any(name in facts or name in tensors for name in _names(kind))


def _check_names(
    parts: Iterable[type[Statistic]], facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    known = set(_OTHER_FORMS)
    for kind in parts:
        known |= set(_names(kind))
        needed = _names(kind, needed=True)
        missing = [name for name in needed if name not in tensors and name not in facts]
        if missing and kind is ChannelMoments:
            raise StatsError(f"the file has no tensor {', '.join(sorted(missing))}")
        if missing:
            share = "one" if len(needed) == 2 else "some"
            raise StatsError(f"the file has only {share} of {' and '.join(needed)}, which belong together")
    if unknown := set(tensors) - known:
        raise StatsError(f"the file has unknown tensors: {', '.join(sorted(unknown))}")


def _check_tensors(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    forms = {name: ("", form) for name, form in _OTHER_FORMS.items()}
    for kind in statistics().values():
        forms |= {kind.file_prefix + name: (kind.name, form) for name, form in kind.forms.items()}
    lengths: dict[tuple[str, str], int] = {("", "j"): facts["in_features"]}
    for name, tensor in tensors.items():
        owner, form = forms[name]
        axes = [("" if letter in _SHARED_LENGTHS else owner, letter) for letter in form.shape]
        if tensor.dtype not in form.dtypes:
            raise StatsError(f"{name} must be {' or '.join(map(str, form.dtypes))}, got {tensor.dtype}")
        sizes = zip(axes, tensor.shape, strict=False)
        if tensor.dim() != len(axes) or any(lengths.setdefault(axis, size) != size for axis, size in sizes):
            wanted = ", ".join(str(lengths.get(axis, "any")) for axis in axes)
            raise StatsError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise StatsError(
                f"{name} holds NaN or infinity (look for overflow in the calibration forward: run it in bfloat16 or "
                "float32)"
            )
        if not form.signed and bool((tensor < 0).any()):
            raise StatsError(f"{name} holds negative values")


def _saved(kind: type[Statistic], facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Saved:
    own = {name: tensors[kind.file_prefix + name] for name in kind.forms if kind.file_prefix + name in tensors}
    return Saved(facts["in_features"], facts["count"], own, facts.get(kind.name, {}))
