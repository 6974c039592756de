"""Quantizes weights by the formula of each format, and stores them as its writers do: (q - zero) * scale."""

import json

import torch


def packed(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers in int32 words along the last dimension, the first integer in the lowest bits."""
    words = torch.zeros(*integers.shape[:-1], -(-integers.shape[-1] * bits // 32), dtype=torch.int64)
    for i, column in enumerate(integers.long().unbind(-1)):
        words[..., i * bits // 32] |= column << (i * bits % 32)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def rounded(weight: torch.Tensor, bits: int, group: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Integers, zero points and fp16 scales of each group of inputs, and the weight that they stand for."""
    top, groups = 2**bits - 1, int(group.max()) + 1
    lowest, highest = (torch.stack([f(weight[:, group == g]) for g in range(groups)], 1) for f in (low, high))
    scale = ((highest - lowest) / top).half()
    zero = (-lowest / scale.float()).round().clamp(1, top)
    q = (weight / scale.float()[:, group] + zero[:, group]).round().clamp(0, top)
    return q, zero, scale, (q - zero[:, group]) * scale.float()[:, group]


def low(part: torch.Tensor) -> torch.Tensor:
    return part.amin(1)


def high(part: torch.Tensor) -> torch.Tensor:
    return part.amax(1)


def gptq(weight, bits=4, size=16, *, version="gptq", in_order=True):
    """Returns the tensors by the end of their name, and the weight that they stand for."""
    group = torch.arange(weight.shape[1]) // size
    if not in_order:
        group = group[torch.randperm(len(group))]
    q, zero, scale, dense = rounded(weight, bits, group)
    stored = zero - 1 if version == "gptq" else zero
    tensors = {"qweight": packed(q, bits).t().contiguous(), "qzeros": packed(stored.t(), bits)}
    return {**tensors, "scales": scale.t().contiguous(), "g_idx": group.int()}, dense


def awq(weight, size=16):
    q, zero, scale, dense = rounded(weight, 4, torch.arange(weight.shape[1]) // size)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        name: packed(v.t().unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)
        for name, v in (("qweight", q), ("qzeros", zero))
    }
    return {**tensors, "scales": scale.t().contiguous()}, dense


def compressed(weight, bits=4, size=16, *, symmetric=True):
    group = torch.arange(weight.shape[1]) // size
    q, zero, scale, dense = rounded(weight, bits, group)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
        dense = (q - zero[:, group]) * scale.float()[:, group]
    tensors = {"weight_packed": packed(q, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return tensors if symmetric else {**tensors, "weight_zero_point": packed(zero.t(), bits).t().contiguous()}, dense


def int8_rows(weight):
    """compressed-tensors' int-quantized: a scale for each row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale.float()


def fp8_blocks(weight, size=16):
    """compressed-tensors' float-quantized: a scale for each block of size x size."""
    blocks = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    scale = blocks.abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)
    q = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale, "input_scale": torch.ones(1)}, q.float() * spread


def int8_of_bitsandbytes(weight):
    largest = weight.abs().amax(1)
    q = (weight * (127 / largest)[:, None]).round().to(torch.int8)
    return {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, (
        q.float() * largest[:, None] * (1 / 127)
    )


def nf4(weight, size=64, nested_size=4):
    """A table of 16 values, blocks of ``size`` weights, and factors that are codes of a second table."""
    table = torch.linspace(-1, 1, 16)
    blocks = weight.reshape(-1, size)
    factors = blocks.abs().amax(1)
    offset = factors.mean()
    outer_table = torch.linspace(-1, 1, 256)
    outer = (factors - offset).reshape(-1, nested_size).abs().amax(1).clamp_min(1e-6)
    codes = ((factors - offset).reshape(-1, nested_size) / outer[:, None] + 1).mul(127.5).round().long()
    factors = (outer_table[codes] * outer[:, None]).flatten() + offset
    q = ((blocks / factors[:, None]).clamp(-1, 1) + 1).mul(7.5).round().to(torch.uint8)
    dense = (table[q.long()] * factors[:, None]).reshape(weight.shape)
    pairs = q.flatten().view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
    state |= {"nested_blocksize": nested_size, "nested_dtype": "float32", "nested_offset": float(offset)}
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": codes.flatten().to(torch.uint8),
        "weight.quant_map": table,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": outer_table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }, dense


def mxfp4(weight):
    """Experts [experts, in, out]: E2M1 codes in blocks of 32 inputs, with an E8M0 exponent; by the OCP's formulas."""
    codes = torch.arange(16)
    sign, exponent, mantissa = 1 - 2 * (codes >> 3), (codes >> 1) & 3, codes & 1
    table = sign * torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    blocks = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    shared = blocks.abs().amax(3).log2().floor() - 2
    q = (blocks / 2.0 ** shared[..., None]).unsqueeze(-1).sub(table).abs().argmin(-1)
    dense = (table[q] * 2.0 ** shared[..., None]).flatten(2).transpose(1, 2).contiguous()
    pairs = q.to(torch.uint8).unflatten(3, (-1, 2))
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return {"_blocks": packed, "_scales": (shared + 127).to(torch.uint8)}, dense


def torchao_int8(weight, size=16):
    """IntxUnpackedToInt8Tensor: signed integers of 4 bits in a byte each, with zero points."""
    q, zero, scale, dense = rounded(weight, 4, torch.arange(weight.shape[1]) // size)
    tensors = {"_weight_qdata": (q - 8).to(torch.int8), "_weight_scale": scale}
    return {**tensors, "_weight_zero_point": (zero - 8).to(torch.int8)}, dense


def torchao_fp8(weight):
    """Float8Tensor with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"_weight_qdata": q, "_weight_scale": scale, "_weight_act_quant_scale": torch.ones(1)}, q.float() * scale


def torchao_config(*types: str) -> dict:
    configs = [{"_type": name, "_version": 2, "_data": {}} for name in types]
    by_name = {"_type": "FqnToConfig", "_data": {"fqn_to_config": {str(i): c for i, c in enumerate(configs)}}}
    return {"quant_method": "torchao", "quant_type": {"default": configs[0] if len(configs) == 1 else by_name}}


def group(bits: int, **others) -> dict:
    """A ``quantization_config`` of compressed-tensors with one group of layers."""
    weights = {"num_bits": bits, "type": "int", **others}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "gptq of 8 bits": (lambda w: gptq(w, 8), {"quant_method": "gptq", "bits": 8, "group_size": 16}),
    "gptq in another order": (
        lambda w: gptq(w, 2, version="gptq_v2", in_order=False),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "int4": (compressed, {**group(4, group_size=16), "format": "pack-quantized"}),
    "int4 with zero points": (
        lambda w: compressed(w, symmetric=False),
        {**group(4, group_size=16, symmetric=False), "format": "pack-quantized"},
    ),
    "int8": (int8_rows, {**group(8, strategy="channel"), "format": "int-quantized"}),
    "fp8": (fp8_blocks, {**group(8, strategy="block", block_structure=[16, 16]), "format": "float-quantized"}),
    "bitsandbytes of 8 bits": (int8_of_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "torchao": (torchao_int8, torchao_config("IntxWeightOnlyConfig", "Int8WeightOnlyConfig")),
    "torchao of fp8": (torchao_fp8, torchao_config("Float8WeightOnlyConfig")),
    "bitsandbytes of 4 bits": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}
"""For each format, what quantizes and stores a weight, and the ``quantization_config``."""
