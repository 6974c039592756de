"""torchao: integers or FP8 values of one byte each, with scales for blocks of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .quantization_fields import Fields
from .quantized_formats import Parts

CONFIGS = (
    *("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"),
    *("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"),
    *("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"),
)
"""Configurations whose weights have one byte each, as Float8Tensor, Int8Tensor and IntxUnpackedToInt8Tensor."""

BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")
"""Configurations that map names of layers to configurations."""

ONE_BYTE = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Torchao:
    """The safetensors layout of torchao: the parts of ``layer.weight`` are ``layer._weight_qdata`` and others.

    ``qdata`` is int8 or FP8 [out, in]. ``scale`` and ``zero_point`` have one number for each block of the weight: along
    each dimension, the weight's size is a multiple of theirs.
    """

    marks = ("_weight_qdata",)
    parts = ("_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_pre_scale")
    ignored = ("_weight_act_quant_scale",)
    weight_name = "weight"

    def weight(self, parts: Parts) -> torch.Tensor:
        """As in :class:`~ace_triton.inputs.quantized_formats.Format`."""
        if "_weight_act_pre_scale" in parts:
            raise CheckpointError("its inputs are multiplied by act_pre_scale, which a dense layer cannot do")
        if "_weight_scale" not in parts:
            raise CheckpointError("it lacks its scale")
        stored = parts["_weight_qdata"]
        if stored.dtype not in ONE_BYTE or stored.dim() != 2 or not stored.numel():
            raise CheckpointError(f"its qdata is {stored.dtype} {tuple(stored.shape)}, not an int8 or FP8 matrix")
        values = stored.float()
        if "_weight_zero_point" in parts:
            values -= _spread("zero_point", parts["_weight_zero_point"], stored.shape)
        values *= _spread("scale", parts["_weight_scale"], stored.shape)
        if not values.isfinite().all():
            raise CheckpointError("it has NaN or infinite values")
        return values


def torchao_format(fields: Fields) -> Torchao:
    """The format of a ``quantization_config`` of torchao.

    Raises:
        CheckpointError: if one of its configurations is not in :data:`CONFIGS`; the message is a clause.
    """
    for name in _configs(fields.section("quant_type").stated.get("default")):
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise CheckpointError(f"the configuration {name} of torchao is unknown here; {known} can be read")
    return Torchao()


def _configs(stated: Any) -> list[Any]:
    """The names of all configurations in one of them."""
    name = stated.get("_type") if isinstance(stated, Mapping) else stated
    if name not in BY_NAME:
        return [name]
    data = stated.get("_data")
    entries = data.items() if isinstance(data, Mapping) else ()
    inner = next((value for key, value in entries if key.endswith("fqn_to_config")), None)
    if not isinstance(inner, Mapping):
        return [name]
    return [found for value in inner.values() if value is not None for found in _configs(value)]


def _spread(name: str, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Numbers of blocks as one number for each weight, fp32."""
    given = tuple(values.shape)
    values = values.float() if values.dim() else values.float().reshape(1, 1)
    values = values.unsqueeze(1) if values.dim() == 1 else values
    if values.dim() != 2 or any(count == 0 or size % count for size, count in zip(shape, values.shape, strict=True)):
        raise CheckpointError(f"its {name} {given} does not fit its qdata {tuple(shape)}")
    for dimension, (size, count) in enumerate(zip(shape, values.shape, strict=True)):
        values = values.repeat_interleave(size // count, dimension)
    return values
