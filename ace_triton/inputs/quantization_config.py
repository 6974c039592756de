"""Find the format of quantized weights in a configuration's ``quantization_config``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError
from .quantization_fields import Fields
from .quantized_formats import PACKED_BITS, Awq, Bitsandbytes, CompressedTensors, Format, Gptq
from .quantized_mxfp4 import Mxfp4
from .quantized_torchao import torchao_format

STATED_BITS = range(1, 17)
"""Bits per weight that compressed-tensors may state for weights that are not packed."""


def format_of(stated: Mapping[str, Any]) -> Format | None:
    """The format of a configuration's ``quantization_config``; None if its method is not one of these.

    Raises:
        CheckpointError: if the method is known, but not this variant, or a field is invalid; the message is a clause.
    """
    method, fields = stated.get("quant_method"), Fields("its quantization_config", stated)
    if method == "gptq":
        return _gptq(fields)
    if method == "awq":
        return _awq(fields)
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    if method == "torchao":
        return torchao_format(fields)
    return _OTHERS.get(method) if isinstance(method, str) else None


_OTHERS: Mapping[str, Format] = {"bitsandbytes": Bitsandbytes(), "mxfp4": Mxfp4()}
"""Formats whose variants are told by the tensors alone."""


def _gptq(fields: Fields) -> Format:
    stated = fields.stated
    layout = "marlin" if stated.get("is_marlin_format") else stated.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"the layout {layout} of GPTQ is unknown here; gptq and gptq_v2 can be read")
    return Gptq(_bits(fields, PACKED_BITS), fields.group_size("group_size", -1), layout == "gptq")


def _awq(fields: Fields) -> Format:
    stated = fields.stated
    version = str(stated.get("version") or stated.get("format") or "gemm").lower()
    if version not in ("gemm", "exllama", "ipex") or stated.get("backend") == "llm-awq":
        raise CheckpointError(f"the version {version} of AWQ is unknown here; gemm can be read")
    _bits(fields, (4,))
    return Awq(fields.group_size("group_size" if "group_size" in stated else "q_group_size", 128))


def _bits(fields: Fields, allowed: Collection[int]) -> int:
    return fields.integer("w_bit" if "bits" not in fields.stated else "bits", allowed, 4)


def _compressed_tensors(fields: Fields) -> Format:
    every = fields.section("config_groups")
    groups = [every.section(name) for name in every.stated]
    layout = str(fields.stated.get("format") or "")
    layouts = {layout, *(str(group.stated["format"]) for group in groups if group.stated.get("format"))}
    strange = layouts - {"", "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
    strange -= {"mixed-precision"}
    if strange or fields.section("sparsity_config").stated.get("format", "dense") != "dense":
        what = ", ".join(sorted(strange)) or "sparse"
        raise CheckpointError(
            f"the format {what} of compressed-tensors is unknown here; pack-quantized, int-quantized and "
            "float-quantized can be read"
        )
    bits: list[int] = []
    group_sizes: list[int] = []
    block_rows: list[int] = []
    for group in groups:
        if group.stated.get("weights") is None:
            continue
        weights = group.section("weights")
        is_packed = (group.stated.get("format") or layout) == "pack-quantized"
        bits.append(weights.integer("num_bits", PACKED_BITS if is_packed else STATED_BITS, 8))
        if weights.stated.get("group_size") is not None:
            group_sizes.append(weights.group_size("group_size", -1))
        if weights.stated.get("block_structure") is not None:
            rows, columns = weights.sizes("block_structure", 2)
            block_rows.append(rows)
            group_sizes.append(columns)
    return CompressedTensors(
        tuple(dict.fromkeys(bits)),
        tuple(dict.fromkeys(n for n in group_sizes if n > 0)),
        tuple(dict.fromkeys(block_rows)),
    )
