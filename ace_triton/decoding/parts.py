"""The parts of a transformers model that the compiled step computes, found by its modules and checked one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..inputs.model_source import reason
from ..kernels.backend import backend_of_device
from ..kernels.decode_step import Block, Linear, Sizes
from ..kernels.memory import ELEMENTS
from ..linears import linear_weight
from ..packed.nm_linear import NMLinear
from ..packed.packed_linear import PackedLinear
from ..packed.quantized_linear import QuantizedLinear, TiedLinear
from ..packed.rows_linear import RowsLinear
from .forwards import unknown_names
from .refusal import StepRefusedError

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose cosines and sines depend on the position alone, not on the length of the text."""

KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")

PACKED = NMLinear, RowsLinear, QuantizedLinear, TiedLinear
"""Packed layers whose products the step has."""

_SPLIT, _JOINED = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)
_GATES, _JOINED_GATES = ("gate_proj", "up_proj"), ("gate_up_proj",)

_ACTIVATIONS: dict[str, Any] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Parts:
    """The parts of a decoder.

    Attributes:
        embedding: the module that gives a token's numbers.
        rotary: the module that gives cosines and sines.
        blocks, norm, head, sizes: as :class:`~ace_triton.kernels.decode_step.DecodeStep` takes them.
        tensors: all tensors that the step reads, or copies.
        dtype: the model's dtype.
        window: largest number of tokens for which attention sees all of them; None if there is no limit.
    """

    embedding: nn.Module
    rotary: nn.Module
    blocks: list[Block]
    norm: torch.Tensor
    head: Linear
    sizes: Sizes
    tensors: list[torch.Tensor]
    dtype: torch.dtype
    window: int | None


def parts_of(model: Any) -> Parts:
    """Find the parts of a causal language model from transformers.

    Raises:
        StepRefusedError: if a module is not known, does not compute what the step does, or is not on the CPU.
    """
    return _Finder(model).found()


class _Finder:
    """Finds and checks the parts of one model."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.names = {module: name for name, module in model.named_modules()}
        self.known_norms: dict[tuple[type, torch.dtype], None] = {}
        self.tensors: list[torch.Tensor] = []
        self.eps: set[float] = set()
        self.activations: set[str] = set()
        self.scaling: set[float] = set()
        self.heads: set[tuple[int, int, int]] = set()

    def found(self) -> Parts:
        self._check_model()
        base, head, embedding = self.model.base_model, self.model.get_output_embeddings(), None
        if base is not self.model and isinstance(head, nn.Module):
            embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, nn.Module) or not isinstance(getattr(base, "layers", None), nn.ModuleList):
            raise StepRefusedError(f"a {type(self.model).__name__} has no blocks, embeddings and head that it knows")
        self._check_children(self.model, {self.names[base], self.names[head]})
        self._check_children(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
        self._check_forward(self.model)
        self._check_forward(base)
        rotary = self._child(base, "rotary_emb")
        rope = getattr(rotary, "rope_type", None)
        if rope not in STATIC_ROPE:
            raise StepRefusedError(f"its rotary positions are of type {rope!r}, not {', '.join(STATIC_ROPE)}")
        blocks = [self._block(block) for block in base.layers]
        norm, layer = self._norm(self._child(base, "norm")), self._linear(head)
        for what, values in (
            ("eps of its norms", self.eps),
            ("activation", self.activations),
            ("scaling of scores", self.scaling),
            ("number of heads", self.heads),
            ("feed-forward width", {block.down.weight.shape[1] for block in blocks}),
        ):
            if len(values) != 1:
                raise StepRefusedError(f"the {what} differs from block to block")
        ((heads, kv_heads, size),) = self.heads
        sizes = Sizes(
            hidden=len(norm),
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            rotary=self._rotary_size(rotary),
            intermediate=blocks[0].down.weight.shape[1],
            eps=self.eps.pop(),
            scaling=self.scaling.pop(),
            activation=self.activations.pop(),
        )
        return Parts(embedding, rotary, blocks, norm, layer, sizes, self.tensors, self.model.dtype, self._window())

    def _check_model(self) -> None:
        """Check what holds for all modules."""
        if self.model.training:
            raise StepRefusedError("it is in training mode: call model.eval()")
        devices = {tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())}
        if devices != {torch.device("cpu")}:
            raise StepRefusedError(f"it is on {', '.join(sorted(map(str, devices)))}, not on the CPU alone")
        if (backend := backend_of_device(torch.device("cpu"))) != "cpu":
            raise StepRefusedError(f"the backend is {backend!r}, not the compiled CPU library")
        if self.model.dtype not in ELEMENTS:
            raise StepRefusedError(f"its dtype is {self.model.dtype}")
        if _global_forward_hooks or _global_forward_pre_hooks:
            raise StepRefusedError("torch has hooks for all modules")
        for module, name in self.names.items():
            hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            if "forward" in module.__dict__ or any(getattr(module, hook) for hook in hooks):
                raise StepRefusedError(f"{name or 'the model'} has hooks or a forward of its own")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self.config, name, None):
                raise StepRefusedError(f"it caps logits ({name})")

    def _rotary_size(self, rotary: nn.Module) -> int:
        numbers = torch.zeros(1, 1, 1, dtype=self.model.dtype, device="cpu")
        try:
            cosines, _ = rotary(numbers, position_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
        except Exception as error:  # The forward is the model's own, and may raise anything.
            raise StepRefusedError(f"its rotary positions fail ({reason(error)})") from error
        return int(cosines.shape[-1])

    def _window(self) -> int | None:
        types = getattr(self.config, "layer_types", None)
        unknown = sorted(set(types or ()) - set(KNOWN_LAYER_TYPES))
        if unknown:
            raise StepRefusedError(f"its layers are of type {unknown[0]!r}")
        window: int | None = getattr(self.config, "sliding_window", None)
        return None if types is not None and "sliding_attention" not in types else window

    def _block(self, block: nn.Module) -> Block:
        norms = ("input_layernorm", "post_attention_layernorm")
        self._check_children(block, {*norms, "self_attn", "mlp"})
        attention, mlp = self._child(block, "self_attn"), self._child(block, "mlp")
        joined = hasattr(attention, "qkv_proj")
        self._check_children(attention, {*(_JOINED if joined else _SPLIT), "o_proj", "q_norm", "k_norm"})
        gates = _JOINED_GATES if hasattr(mlp, "gate_up_proj") else _GATES
        self._check_children(mlp, {*gates, "down_proj", "act_fn", "activation_fn"})
        if not getattr(attention, "use_rope", True):
            raise StepRefusedError(f"{self.names[attention]} has no rotary positions")
        for module in (block, attention, mlp):
            self._check_forward(module)
        inputs = [self._linear(self._child(attention, name)) for name in (_JOINED if joined else _SPLIT)]
        output = self._linear(self._child(attention, "o_proj"))
        self._note_heads(attention, inputs, output)
        activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        self.activations.add(self._activation(activation))
        query_norm, key_norm = (
            self._norm(getattr(attention, name)) if getattr(attention, name, None) is not None else None
            for name in ("q_norm", "k_norm")
        )
        attention_norm, feed_norm = (self._norm(self._child(block, name)) for name in norms)
        return Block(
            attention_norm,
            feed_norm,
            inputs,
            output,
            [self._linear(self._child(mlp, name)) for name in gates],
            self._linear(self._child(mlp, "down_proj")),
            query_norm,
            key_norm,
        )

    def _note_heads(self, attention: nn.Module, inputs: list[Linear], output: Linear) -> None:
        size, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
        if not isinstance(size, int) or not isinstance(scaling, float):
            raise StepRefusedError(f"{self.names[attention]} does not say its head_dim and scaling")
        heads = output.weight.shape[1] // size
        rest = sum(layer.weight.shape[0] for layer in inputs) // size - heads
        self.heads.add((heads, rest // 2, size))
        self.scaling.add(scaling)

    def _linear(self, layer: nn.Module) -> Linear:
        if isinstance(layer, PackedLinear) and type(layer) in PACKED:
            packed = layer.packed
            self.tensors += packed.tensors.values()
            weight: Any = packed
        elif type(layer) is nn.Linear or type(layer).__name__ == "Conv1D":
            dense = linear_weight(layer)
            assert dense is not None
            self.tensors.append(dense)
            weight = dense
        else:
            raise StepRefusedError(f"{self.names[layer]} is a {type(layer).__name__}, not a linear or packed layer")
        bias = layer._parameters.get("bias")
        if bias is not None:
            self.tensors.append(bias)
        return Linear(weight, None if bias is None else bias.detach())

    def _norm(self, norm: nn.Module) -> torch.Tensor:
        """The weight of an RMS norm; each class is compared with the formula once."""
        name, weight = self.names[norm], getattr(norm, "weight", None)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        plain = isinstance(weight, torch.Tensor) and weight.dim() == 1 and getattr(norm, "bias", None) is None
        if not plain or not isinstance(eps, float) or list(norm.children()):
            raise StepRefusedError(f"{name} is a {type(norm).__name__}, not an RMS norm with a weight")
        assert isinstance(weight, torch.Tensor)
        kind = type(norm), weight.dtype
        if kind not in self.known_norms:
            x = torch.linspace(-3, 2, 2 * len(weight), dtype=torch.float32, device="cpu").view(2, -1).to(weight.dtype)
            wide = x.float()
            expected = weight.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            if not torch.allclose(norm(x).float(), expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6):
                raise StepRefusedError(f"{name}, a {type(norm).__name__}, computes another norm")
            self.known_norms[kind] = None
        self.eps.add(eps)
        self.tensors.append(weight)
        return weight.detach()

    def _activation(self, activation: Any) -> str:
        x = torch.linspace(-8, 8, 129, dtype=torch.float32, device="cpu")
        if callable(activation):
            for name, known in _ACTIVATIONS.items():
                if torch.allclose(activation(x), known(x), rtol=1e-5, atol=1e-6):
                    return name
        raise StepRefusedError(f"its activation {type(activation).__name__} is none of {', '.join(_ACTIVATIONS)}")

    def _child(self, module: nn.Module, name: str) -> nn.Module:
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            raise StepRefusedError(f"{self.names[module] or type(module).__name__} has no {name}")
        return child

    def _check_forward(self, module: nn.Module) -> None:
        """Refuse a forward that uses something which nothing here computes."""
        if unknown := unknown_names(type(module)):
            raise StepRefusedError(
                f"the forward of {self.names[module] or 'the model'}, a {type(module).__name__}, uses names that it "
                f"does not know: {', '.join(unknown)}"
            )

    def _check_children(self, module: nn.Module, known: set[str]) -> None:
        """Refuse modules and parameters that nothing here computes."""
        for name in (*_acting_children(module), *dict(module.named_parameters(recurse=False))):
            if name not in known:
                raise StepRefusedError(
                    f"{self.names[module] or type(module).__name__} has {name}, which it does not know"
                )


def _acting_children(module: nn.Module) -> Iterator[str]:
    """Names of the children that do something in evaluation mode."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Dropout | nn.Identity):
            yield name
