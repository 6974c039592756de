"""Turn a packed model back into a dense one, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels.packed_dense import dequantize_dense
from .expert_stack import ExpertStack
from .packed_linear import PackedLinear
from .quantized_embedding import QuantizedEmbedding
from .quantized_linear import TiedLinear
from .tables import PACKED_MODULES, restore_ties


def unpack_model(model: nn.Module) -> int:
    """Replace every packed layer and embedding by the dense one that it was packed from, in place.

    Each weight is the packed weight bit for bit, with zeros. Stacked experts become one parameter again. Each packed
    weight is freed as soon as its layer is unpacked.

    Args:
        model: any module; a model without packed layers is not changed.

    Returns:
        The number of layers that were unpacked.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PACKED_MODULES)}
    transposed = _transposed_layers(model)
    embeddings = {layer: _dense_embedding(layer) for layer in layers.values() if isinstance(layer, QuantizedEmbedding)}
    for name, layer in layers.items():
        if isinstance(layer, QuantizedEmbedding):
            dense: nn.Module = embeddings[layer]
        elif isinstance(layer, TiedLinear):
            weight: Any = embeddings[layer.embedding].weight
            dense = _linear(layer, weight)
        else:
            dense = _dense(layer, name in transposed)
        for module in list(model.modules()):
            for child_name, child in list(module._modules.items()):
                if child is layer:
                    setattr(module, child_name, dense)
    if embeddings:
        restore_ties(model)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ExpertStack):
                delattr(module, name)
                setattr(module, name, nn.Parameter(child.dense(), requires_grad=False))
    return len(layers)


def _dense(layer: PackedLinear, transposed: bool) -> nn.Module:
    weight = layer.unpack()
    if transposed:
        from transformers.pytorch_utils import Conv1D

        dense: Any = Conv1D(0, 0)
        dense.nf, dense.nx = layer.out_features, layer.in_features
        weight = weight.t().contiguous()
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = layer.bias
        return dense.train(layer.training)
    return _linear(layer, nn.Parameter(weight, requires_grad=False))


def _linear(layer: PackedLinear, weight: nn.Parameter) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = weight
    dense.register_parameter("bias", layer.bias)
    return dense.train(layer.training)


def _dense_embedding(layer: QuantizedEmbedding) -> nn.Embedding:
    dense = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta")
    dense.padding_idx = layer.padding_idx
    dense.weight = nn.Parameter(dequantize_dense(layer.packed), requires_grad=False)
    return dense.train(layer.training)


def _transposed_layers(model: nn.Module) -> set[str]:
    """Names of the layers that the model's class builds as Conv1D, whose weight is [in_features, out_features]."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    with torch.device("meta"):
        built = type(model)(config)
    return {name for name, module in built.named_modules() if type(module).__name__ == "Conv1D"}
