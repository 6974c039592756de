"""What the forwards of modules use, and what can change their results besides a weight."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from ..kernels.written import version_of

_ATTENTION = """
    q_proj k_proj v_proj qkv_proj o_proj q_norm k_norm head_dim num_attention_heads num_key_value_heads
    num_key_value_groups scaling sliding_window layer_idx use_rope apply_rotary_pos_emb update view reshape transpose
    contiguous shape getattr ALL_ATTENTION_FUNCTIONS get_interface eager_attention_forward _attn_implementation
"""
_BLOCK = """
    input_layernorm self_attn post_attention_layernorm mlp gate_proj up_proj gate_up_proj down_proj act_fn activation_fn
    chunk
"""
_DROPOUT = "nn functional dropout training attention_dropout residual_dropout resid_attn_dropout resid_mlp_dropout"
_MODEL = """
    config model layers norm embed_tokens rotary_emb lm_head enumerate num_hidden_layers layer_types attention_type
    has_sliding_layers create_causal_mask create_sliding_window_causal_mask DynamicCache get_seq_length torch arange
    unsqueeze device dict isinstance int slice ValueError
    slice_logits_to_keep loss_function vocab_size cache past_key_values hidden_states attentions last_hidden_state
    BaseModelOutputWithPast CausalLMOutputWithPast
"""

KNOWN_NAMES = frozenset(" ".join((_ATTENTION, _BLOCK, _DROPOUT, _MODEL)).split())
"""Global names, attributes and methods in the forwards of transformers whose computation the step repeats. Factors
without a name show in the trial run."""


def unknown_names(kind: type[nn.Module]) -> list[str]:
    """Names that the forward of a module's class uses and that are not in :data:`KNOWN_NAMES`."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if not isinstance(code, CodeType):
        return ["compiled code"]
    return sorted(set(_names(code)) - KNOWN_NAMES)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Changes if a forward, a parameter, another attribute or the configuration of a module changes."""
    modules: list[Any] = []
    configs: dict[int, str] = {}
    for module in model.modules():
        kind = type(module)
        modules.append((kind, kind.forward, [(name, _value(value)) for name, value in vars(module).items()]))
        config = vars(module).get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = repr(vars(config))
    return modules, list(configs.values())


def _value(value: Any) -> Any:
    """What stands for a value: itself if it is a number, a text or a function."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.dtype, version_of(value)
    if isinstance(value, tuple | list):
        return [_value(entry) for entry in value]
    if isinstance(value, dict):
        return [(name, _value(entry)) for name, entry in value.items()]
    plain = isinstance(value, bool | int | float | str) or inspect.isfunction(value) or inspect.isbuiltin(value)
    return value if plain else type(value)
