"""The safetensors file of a layer's statistics: tensors, and a header with a few values as JSON.

All values and tensors are checked when a file is read, because kernels do not check statistics again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import StatsError

FORMAT = "ace_triton.activation_stats.1"

ROUNDING = 1e-5
"""Relative rounding error of a sum of squares in fp32."""

_TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Form:
    """The required form of a tensor.

    Attributes:
        shape: one letter per dimension. "j" is in_features. Any other letter is a length that is the same for all
            tensors of the file.
        dtypes: allowed dtypes.
        signed: True if negative values are allowed.
        needed: True if every file must have this tensor.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...]
    signed: bool = False
    needed: bool = False


_FORMS = {
    "mean": _Form("j", (torch.float64,), signed=True, needed=True),
    "deviation": _Form("j", (torch.float64,), signed=True, needed=True),
    "sequence_square": _Form("sj", (torch.float32,), needed=True),
    "sequence_count": _Form("s", (torch.int64,), needed=True),
    "consumer_norm": _Form("i", (torch.float32,)),
    "gram": _Form("jj", (torch.float32,), signed=True),
    "sample": _Form("kj", _TOKEN_DTYPES, signed=True),
    "draws": _Form("k", (torch.float64,)),
    "weighted_square": _Form("j", (torch.float64,)),
    "coupling": _Form("ij", (torch.float32,)),
}

_TOGETHER = (("sample", "draws"), ("outputs", "weighted_square"))
"""Pairs of header values and tensors. A file has both of a pair, or neither."""


def write(path: str | Path, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write header values and tensors.

    Raises:
        StatsError: the file cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, str(path), metadata={"ace_triton": json.dumps({"format": FORMAT, **facts})})
    except (OSError, SafetensorError) as error:
        raise StatsError(f"{path}: statistics cannot be written ({error})") from error


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read and check the header values and tensors of a file; tensors are on the CPU.

    Raises:
        StatsError: the file is missing, has another format, or its contents are inconsistent; the message says which.
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
    try:
        _check_facts(facts)
        _check_names(facts, tensors)
        _check_tensors(facts, tensors)
    except StatsError as error:
        raise StatsError(f"{path}: {error}; the file is damaged or was edited: collect statistics again") from None
    return facts, tensors


def _check_facts(facts: dict[str, Any]) -> None:
    if set(facts) - {"outputs"} != {"in_features", "count"}:
        raise StatsError(f"the header must have in_features and count, and may have outputs; it has {sorted(facts)}")
    for name in ("in_features", "count"):
        if not _is_count(facts[name]) or facts[name] < 1:
            raise StatsError(f"{name} must be a whole number, 1 or more, got {facts[name]!r}")
    if "outputs" not in facts:
        return
    outputs = facts["outputs"]
    if not isinstance(outputs, dict) or set(outputs) != {"reduce", "count", "unit"}:
        raise StatsError(f"outputs must have reduce, count and unit, got {outputs!r}")
    if outputs["reduce"] not in (None, "abs", "rms"):
        raise StatsError(f"reduce of outputs must be null, 'abs' or 'rms', got {outputs['reduce']!r}")
    if not _is_count(outputs["count"]):
        raise StatsError(f"count of outputs must be a whole number, 0 or more, got {outputs['count']!r}")
    unit = outputs["unit"]
    if isinstance(unit, bool) or not isinstance(unit, (int, float)) or not (math.isfinite(unit) and unit > 0):
        raise StatsError(f"unit of outputs must be a number above 0, got {unit!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_names(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    needed = {name for name, form in _FORMS.items() if form.needed}
    present = {*tensors, *facts}
    if missing := needed - set(tensors):
        raise StatsError(f"the file has no tensor {', '.join(sorted(missing))}")
    if unknown := set(tensors) - set(_FORMS):
        raise StatsError(f"the file has unknown tensors: {', '.join(sorted(unknown))}")
    for one, other in _TOGETHER:
        if (one in present) != (other in present):
            raise StatsError(f"the file has only one of {one} and {other}, which belong together")
    reduce = facts["outputs"]["reduce"] if "outputs" in facts else None
    if (reduce is None) != ("coupling" not in tensors):
        raise StatsError(f"outputs with reduce={reduce!r} must have {'no' if reduce is None else 'a'} coupling matrix")


def _check_tensors(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    sizes = {"j": facts["in_features"]}
    for name, tensor in tensors.items():
        form = _FORMS[name]
        if tensor.dtype not in form.dtypes:
            raise StatsError(f"{name} must be {' or '.join(map(str, form.dtypes))}, got {tensor.dtype}")
        lengths = zip(form.shape, tensor.shape, strict=False)
        if tensor.dim() != len(form.shape) or any(sizes.setdefault(letter, size) != size for letter, size in lengths):
            wanted = ", ".join(str(sizes.get(letter, "any")) for letter in form.shape)
            raise StatsError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise StatsError(
                f"{name} holds NaN or infinity (look for overflow in the calibration forward: run it in bfloat16 or "
                "float32)"
            )
        if not form.signed and bool((tensor < 0).any()):
            raise StatsError(f"{name} holds negative values")
    # In a channel with constant values, rounding can make the sum of squared deviations slightly negative.
    if bool((tensors["deviation"] < -ROUNDING * facts["count"] * tensors["mean"].square()).any()):
        raise StatsError("deviation holds negative values")
    counted = int(tensors["sequence_count"].sum())
    if counted != facts["count"]:
        raise StatsError(f"the sum of sequence_count is {counted} tokens, but count is {facts['count']}")
