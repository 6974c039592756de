"""The weights of an ONNX graph: their orientation and names when it is written, and how they are read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..linears import linear_weight

PRODUCTS = ("MatMul", "Gemm")


def name_weights(graph_model: Any, model: Any) -> None:
    """Give the weights of matrix products the orientation [in_features, out_features] and the names of their layers.

    Args:
        graph_model: the graph as ``onnx_ir.Model``, changed in place.
        model: the model that it was exported from, in the graph's dtype.
    """
    graph = graph_model.graph
    _transpose(graph)
    layers = {}
    for name, module in model.named_modules():
        weight = linear_weight(module)
        if weight is not None:
            layers[digest(weight.t().contiguous().numpy())] = name
    for node in graph:
        value: Any = node.inputs[1] if node.op_type in PRODUCTS else None
        turned = value is not None and value.producer() is not None and value.producer().op_type == "Transpose"
        if turned:
            value = value.producer().inputs[0]
        if value is None or not value.is_initializer():
            continue
        stored = value.const_value.numpy()
        layer = layers.get(digest(stored.T if turned else stored))
        if layer is not None and f"{layer}.weight" not in graph.initializers:
            graph.initializers.pop(value.name)
            value.name = f"{layer}.weight"
            graph.initializers.add(value)


def _transpose(graph: Any) -> None:
    """Replace Transpose(initializer), as the weight of a product, by a transposed initializer.

    An initializer with other uses (an output head that is tied to the embedding) stays as it is.
    """
    import onnx_ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(list(weight.uses())) > 1:
            continue
        values = np.ascontiguousarray(weight.const_value.numpy().T)
        turned = onnx_ir.Value(
            name=f"{weight.name}.transposed",
            type=weight.type,
            shape=onnx_ir.Shape(values.shape),
            const_value=onnx_ir.tensor(values, name=f"{weight.name}.transposed"),
        )
        graph.initializers.add(turned)
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)
        graph.initializers.pop(weight.name)


def digest(values: np.ndarray) -> bytes:
    """A digest of a matrix's shape, dtype and numbers."""
    head = f"{values.shape}{values.dtype}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(values).tobytes()).digest()


def weights_of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Read the weights of all matrix products from a file, with the ``onnx`` package alone.

    Yields:
        The name of the initializer without ".weight", and the weight as [out_features, in_features]: K, along which
        the product sums, is the last axis.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    initializers = {entry.name: entry for entry in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        turned, name = False, node.input[1]
        while (source := made_by.get(name)) is not None and source.op_type in ("Transpose", "Cast", "Identity"):
            turned ^= source.op_type == "Transpose"
            name = source.input[0]
        if name not in initializers:
            continue
        if node.op_type == "Gemm":
            turned ^= any(entry.name == "transB" and entry.i for entry in node.attribute)
        stored = numpy_helper.to_array(initializers[name])
        if stored.ndim == 2:
            weight = stored if turned else stored.T
            yield name.removesuffix(".weight"), weight
