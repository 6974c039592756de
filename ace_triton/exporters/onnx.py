"""ONNX: a dense graph with zeros, which TensorRT reads and onnxruntime runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..inputs.model_source import reason
from .exporter import Exporter, Run
from .flat_cache import INPUTS, FlatCacheModel, cache_names, cache_shapes
from .onnx_weights import name_weights, weights_of

FILE = "model.onnx"
SHAPES_FILE = "trtexec-shapes.txt"

LARGEST_BATCH, USUAL_TOKENS, LARGEST_TOKENS = 8, 128, 1024
"""Of the shapes that TensorRT optimizes for."""


class Onnx(Exporter):
    """``model.onnx`` with its weights in ``model.onnx.data``, and a key-value cache as inputs and outputs.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.*``; outputs are ``logits`` and
    ``present.*``. A weight is [in_features, out_features] in the graph, as MatMul needs it, so its n:m groups lie along
    K. Only an output head that shares its weight with the embedding is transposed in the graph.
    """

    name, extra = "onnx", "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    weight_types = ("float32", "float16")

    def write(self, model: Any, tokenizer: Any, folder: Path, weight_type: str) -> None:
        shapes = cache_shapes(model)
        program = _exported(model.to(getattr(torch, weight_type)), shapes)
        name_weights(program.model, model)
        program.save(folder / FILE, external_data=True)
        (folder / SHAPES_FILE).write_text(_tensorrt_shapes(shapes) + "\n")

    def read_weights(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        return weights_of(folder / FILE)

    def opened(self, folder: Path, model: Any) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]

        def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return dict(zip(outputs, session.run(None, inputs), strict=True))

        empty = {
            entry.name: np.zeros([1, entry.shape[1], 0, entry.shape[3]], _NUMPY_TYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name not in INPUTS
        }
        return in_two_calls(call, empty)

    def tolerance(self, weight_type: str) -> float | None:
        return 1e-3 if weight_type == "float32" else None

    def advice(self, out: Path, weight_type: str) -> list[str]:
        typed = "--fp16" if weight_type == "float32" else "--stronglyTyped"
        return [
            f"onnxruntime runs {out / FILE}; it multiplies by the zeros",
            "TensorRT uses the sparse tensor cores for 2:4 layers; this project has not measured what that gains:",
            f"    trtexec --onnx={out / FILE} --saveEngine={out / 'model.plan'} --sparsity=enable {typed} "
            f"$(cat {out / SHAPES_FILE})",
        ]


_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def in_two_calls(call: Any, empty: dict[str, np.ndarray]) -> Run:
    """Logits of a sequence in two calls, the second with the cache of the first.

    Args:
        call: runs the graph on inputs by name; returns outputs by name.
        empty: an empty cache, by name of the input.
    """

    def run(ids: torch.Tensor) -> torch.Tensor:
        logits, past, half = [], empty, max(1, len(ids) // 2)
        for start, end in ((0, half), (half, len(ids))):
            if start == end:
                break
            tokens = {
                "input_ids": ids[None, start:end].numpy(),
                "attention_mask": np.ones([1, end], np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
            }
            found = call({**tokens, **past})
            logits.append(torch.from_numpy(np.array(found["logits"][0])))
            past = {name: found[name.replace("past_key_values", "present")] for name in empty}
        return torch.cat(logits)

    return run


def _exported(model: Any, shapes: list[tuple[int, int]]) -> Any:
    batch, tokens, past = 2, 3, 4  # Three numbers that differ, so that no two axes are taken for one.
    example = [torch.zeros(batch, heads, past, size, dtype=model.dtype, device="cpu") for heads, size in shapes]
    arguments = (
        torch.zeros(batch, tokens, dtype=torch.int64, device="cpu"),
        torch.ones(batch, past + tokens, dtype=torch.int64, device="cpu"),
        torch.arange(past, past + tokens, dtype=torch.int64, device="cpu").repeat(batch, 1),
        example,
    )
    axes = (
        {0: "batch", 1: "tokens"},
        {0: "batch", 1: "all_tokens"},
        {0: "batch", 1: "tokens"},
        [{0: "batch", 2: "past_tokens"} for _ in shapes],
    )
    try:
        with torch.no_grad(), _quiet():
            return torch.onnx.export(
                FlatCacheModel(model).eval(),
                arguments,
                dynamo=True,
                dynamic_shapes=axes,
                input_names=[*INPUTS, *cache_names(len(shapes), "past_key_values")],
                output_names=["logits", *cache_names(len(shapes), "present")],
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch.export raises what the model's code raises, and classes of its own.
        cause = error.__cause__ or error
        raise CheckpointError(
            f"torch cannot export a {type(model).__name__} to ONNX ({reason(cause)}); models with stacked experts, and "
            "models whose cache is not one key and one value a layer, cannot be exported"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tensorrt_shapes(shapes: list[tuple[int, int]]) -> str:
    """The options of trtexec that give the smallest, usual and largest shape of each input."""
    names = cache_names(len(shapes), "past_key_values")
    options = []
    for option, batch, tokens, past in (
        ("--minShapes", 1, 1, 0),
        ("--optShapes", 1, USUAL_TOKENS, 0),
        ("--maxShapes", LARGEST_BATCH, LARGEST_TOKENS, LARGEST_TOKENS),
    ):
        given = [f"input_ids:{batch}x{tokens}", f"attention_mask:{batch}x{past + tokens}"]
        given.append(f"position_ids:{batch}x{tokens}")
        given += [f"{name}:{batch}x{heads}x{past}x{size}" for name, (heads, size) in zip(names, shapes, strict=True)]
        options.append(f"{option}={','.join(given)}")
    return " ".join(options)
