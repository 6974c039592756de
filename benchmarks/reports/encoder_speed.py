"""Speed of a small encoder on one thread: single sentences in each packed form, and the products of single layers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ace_triton import RowLimits, dense_copies, load, pack_model, prune_linear, prune_model, save_packed
from ace_triton.decoders.blocks import find_blocks, linears_of
from ace_triton.packed.dispatch import ALWAYS
from ace_triton.packed.keep_dense import Keep
from ace_triton.packed.manifest import TENSORS_FILE
from ace_triton.packed.nm_linear import NMLinear

SPEED_SENTENCES, SPEED_ROUNDS = 24, 7
NOT_PRUNED = "not pruned"
_8_BITS = {"dense_bits": 8, "embedding_bits": 8}
FORMS: dict[bool, dict[str, dict[str, int]]] = {
    False: {"packed": {}, "packed, 8 bits": {"bits": 8, **_8_BITS}},
    True: {"packed, 8 bits": _8_BITS},
}
"""How a model is packed for the speed of single sentences, if it is not pruned (True) or pruned."""

KEEPS: tuple[Keep, ...] = ("auto", "packed")
PRODUCT_ROWS, PRODUCT_CALLS = (1, 4, 8, 16, 32), 41


def sentence_times(dense: Any, inputs: list[dict[str, torch.Tensor]], pattern: str) -> dict[str, dict[str, float]]:
    """Each form of a model that is pruned to a pattern or NOT_PRUNED: bytes, and milliseconds of a sentence.

    "dense" has the zeros in dense weights; the others are loaded from packed files.

    Args:
        dense: the dense model.
        inputs: sentences, one in each forward.
        pattern: n:m, or NOT_PRUNED.
    """
    pruned = copy.deepcopy(dense)
    if pattern != NOT_PRUNED:
        prune_model(pruned, None, "magnitude", pattern)
    models, found = {"dense": pruned}, {"dense": {"memory_bytes": _bytes_of(pruned)}}
    for form, bits in FORMS[pattern == NOT_PRUNED].items():
        packed = copy.deepcopy(pruned)
        pack_model(packed, **bits)
        with TemporaryDirectory() as folder:
            save_packed(packed, None, Path(folder) / "packed")
            size = (Path(folder) / "packed" / TENSORS_FILE).stat().st_size
            for keep in KEEPS:
                model = models[f"{form}, {keep}"] = load(Path(folder) / "packed", keep=keep)
                memory = _bytes_of(model) + dense_copies(model).bytes
                found[f"{form}, {keep}"] = {"file_bytes": size, "memory_bytes": memory}
    found["dense"]["file_bytes"] = found["dense"]["memory_bytes"]
    spent: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(SPEED_ROUNDS + 1):
            for name, model in models.items():
                started = time.process_time()
                for sentence in inputs:
                    model(**sentence)
                if turn:
                    spent[name].append((time.process_time() - started) / len(inputs))
    for name, seconds in spent.items():
        ratios = [dense / own for dense, own in zip(spent["dense"], seconds, strict=True)]
        found[name] |= {"ms": 1e3 * statistics.median(seconds), "faster": statistics.median(ratios)}
    return found


def _bytes_of(model: Any) -> int:
    """Size of a model's parameters and of the buffers that are saved with it."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def product_times(dense_model: Any, pattern: str) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds of a layer's products by the number of rows, for each shape of a layer in the first block."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for _, layer in linears_of(find_blocks(dense_model)[0].module):
        weight = layer.weight
        shape = " x ".join(map(str, weight.shape))
        if shape in found:
            continue
        dense = copy.deepcopy(layer)
        prune_linear(dense, None, "magnitude", pattern)
        n, m = map(int, pattern.split(":"))
        layers = {"dense": dense}
        for name, limits in (("packed", RowLimits(ALWAYS)), ("unpacked", RowLimits(0))):
            layers[name] = NMLinear.from_linear(dense, n, m, limits)
            layers[f"{name} int8"] = NMLinear.from_linear(dense, n, m, limits, bits=8)
        found[shape] = {}
        for rows in PRODUCT_ROWS:
            tokens = torch.randn(rows, weight.shape[1])
            found[shape][str(rows)] = {name: _microseconds(product, tokens) for name, product in layers.items()}
    return found


@torch.inference_mode()
def _microseconds(layer: Any, tokens: torch.Tensor) -> float:
    """The lower quartile of the CPU times of calls, so that other jobs on the machine count little."""
    times = []
    for _ in range(PRODUCT_CALLS):
        started = time.process_time()
        layer(tokens)
        times.append(time.process_time() - started)
    return 1e6 * statistics.quantiles(times, n=4)[0]


def speed_table(content: dict[str, Any], patterns: Sequence[str]) -> list[str]:
    """Times and sizes as a Markdown table."""
    lines = [
        "| pattern | form | weights in the file | weights in memory | a sentence | times as fast |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for pattern in (*patterns, NOT_PRUNED):
        for form, found in content.get(f"sentence {pattern}", {}).items():
            name = form.removesuffix(", auto").replace(", packed", ', `keep="packed"`')
            sizes = " | ".join(f"{found[key] / 1e6:.1f} MB" for key in ("file_bytes", "memory_bytes"))
            lines.append(f"| {pattern} | {name} | {sizes} | {found['ms']:.1f} ms | {found['faster']:.2f}x |")
    return [
        f"{SPEED_SENTENCES} sentences, one in each forward; all models in turn, medians of CPU time over "
        f"{SPEED_ROUNDS} rounds. Packed models are loaded with `ace_triton.load`. By default it keeps a dense copy of "
        "each packed weight of an encoder, so that no call unpacks it. "
        '`keep="packed"` keeps no copies: the least memory, and slower. "8 bits" stores kept weights, layers that are '
        "not pruned and the embeddings in 8 bits. Aim: 1.3 times as fast as dense.",
        "",
        *lines,
    ]


def products_table(content: dict[str, Any], patterns: Sequence[str]) -> list[str]:
    """Speed of each product relative to the dense one as Markdown tables, and what that means for the model."""
    names = ("packed", "unpacked", "packed int8", "unpacked int8")
    lines: list[str] = []
    best = 0.0
    for pattern in patterns:
        found = content.get(f"products {pattern}")
        if not found:
            continue
        lines += ["", f"| {pattern}, layer | rows | {' | '.join(names)} |", "|---|---:" + "|---:" * len(names) + "|"]
        for shape, of_rows in found.items():
            for rows, times in of_rows.items():
                ratios = [times["dense"] / times[name] for name in names]
                best = max(best, *ratios)
                lines.append(f"| {shape} | {rows} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")
    if not lines:
        return []
    verdict = (
        "No packed product is as fast as the dense one here: the weights fit in the processor's cache, so that fewer "
        "bytes save no time. Packing makes the file smaller; for speed, `ace_triton.load` keeps dense copies of an "
        "encoder's weights."
        if best < 1
        else f"The best packed product is {best:.2f} times as fast as the dense one."
    )
    return [
        "## Products of single layers",
        "",
        "Times as fast as the dense product, lower quartiles of the CPU time of a call. Packed: our kernel. "
        f"Unpacked: the weight is unpacked in each call, then multiplied dense. {verdict}",
        *lines,
    ]
