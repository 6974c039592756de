"""OpenVINO: its intermediate representation, converted from the ONNX graph."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .exporter import Exporter, Run
from .onnx import FILE as ONNX_FILE
from .onnx import Onnx, in_two_calls
from .onnx_weights import digest, weights_of

FILE = "openvino_model.xml"


class Openvino(Exporter):
    """``openvino_model.xml`` and ``.bin``, with the inputs and outputs of the ONNX graph."""

    name, extra = "openvino", "openvino"
    packages = ("openvino", *Onnx.packages)
    weight_types = ("float32", "float16")

    def write(self, model: Any, tokenizer: Any, folder: Path, weight_type: str) -> None:
        with tempfile.TemporaryDirectory() as place:
            Onnx().write(model, tokenizer, Path(place), "float32")
            self.convert(Path(place, ONNX_FILE), folder, weight_type)

    def convert(self, graph: Path, folder: Path, weight_type: str) -> None:
        """Convert an ONNX file of :class:`~ace_triton.exporters.onnx.Onnx` with weights of float32."""
        import openvino

        converted = openvino.convert_model(graph)
        layers = {digest(weight): layer for layer, weight in weights_of(graph)}
        for constant, weight in _weights(converted):
            if (layer := layers.get(digest(weight))) is not None:
                constant.set_friendly_name(f"{layer}.weight")
        openvino.save_model(converted, folder / FILE, compress_to_fp16=weight_type == "float16")

    def read_weights(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        import openvino

        for constant, weight in _weights(openvino.Core().read_model(folder / FILE)):
            yield constant.get_friendly_name().removesuffix("_compressed").removesuffix(".weight"), weight

    def opened(self, folder: Path, model: Any) -> Run:
        import openvino

        # On a CPU with bfloat16 or float16 units OpenVINO would compute in these.
        compiled = openvino.Core().compile_model(folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = [output.get_any_name() for output in compiled.outputs]
        empty = {
            entry.get_any_name(): np.zeros([1, heads.get_length(), 0, size.get_length()], np.float32)
            for entry in compiled.inputs
            if len(entry.get_partial_shape()) == 4
            for _, heads, _, size in [list(entry.get_partial_shape())]
        }

        def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = compiled(inputs)
            return {name: np.array(found[name]) for name in outputs}

        return in_two_calls(call, empty)

    def tolerance(self, weight_type: str) -> float | None:
        return 1e-3 if weight_type == "float32" else None

    def advice(self, out: Path, weight_type: str) -> list[str]:
        return [
            f"OpenVINO reads {out / FILE}; it multiplies by the zeros",
            "after quantization to int8 (weights and activations), a CPU with AMX skips zeros if the property",
            "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is below the share of zeros; this project has not measured it",
        ]


def _weights(graph: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """The constants that are weights of matrix products, and their values [out_features, in_features]."""
    for node in graph.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        turned = bool(node.get_attributes()["transpose_b"])
        source = node.input_value(1).get_node()
        while source.get_type_name() in ("Convert", "Transpose"):
            turned ^= source.get_type_name() == "Transpose"
            source = source.input_value(0).get_node()
        if source.get_type_name() == "Constant" and len(source.get_output_shape(0)) == 2:
            stored = np.array(source.data)
            yield source, stored if turned else stored.T
