"""``ace-triton bench``."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from .. import report
from ..linear_bench import ROWS, LayerKind, LayerTimes, bench_layer, best_limits, kinds_of, totals
from ..nm_linear import NMLinear
from ..packed_checkpoint import load_model
from ..progress import progress_bar, stage
from ..sparsify import sparsify
from ..sparsity import Sparsity
from .console import console, progress_bars
from .options import DTYPES, DeviceOption, JsonOption, TrustOption, check_json, parse_device, parse_dtype

SHAPE = "4096x4096"


def bench(
    model: Annotated[
        str | None, typer.Option(help="A folder, pruned to n:m or packed: each of its kinds of layers.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="One layer, as OUTxIN.", show_default=SHAPE, metavar="OUTxIN")
    ] = None,
    sparsity: Annotated[str, typer.Option(help="n:m of the layer; a model's are its own.")] = "2:4",
    rows: Annotated[str, typer.Option(help="Numbers of rows (tokens of a call).")] = ",".join(map(str, ROWS)),
    dtype: Annotated[str, typer.Option(help=f"Of weights and tokens: {', '.join(DTYPES)}.")] = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Time packed layers beside dense ones, and say where sparse loses."""
    check_json(json)
    counts = _counts(rows)
    where = parse_device(device)
    if model is not None and shape is not None:
        raise ValueError("--model and --shape: give one of them")
    with progress_bars() as progress:
        if model is None:
            usual = "float32" if where == "cpu" else "bfloat16"
            wanted = parse_dtype(usual if dtype == "auto" else dtype)
            pattern = Sparsity(sparsity)
            if pattern.n is None or pattern.m is None:
                raise ValueError(f"--sparsity {sparsity!r}: packed layers are n:m, as 2:4")
            kinds = [LayerKind(_shape(shape or SHAPE), pattern.n, pattern.m, wanted)]
        else:
            kinds = _kinds(model, dtype, trust_remote_code, progress)
        found = [
            bench_layer(kind, where, rows=counts, progress=progress_bar(progress, f"bench {kind.shape}"))
            for kind in kinds
        ]
    if json:
        sums = [dataclasses.asdict(entry) for entry in totals(found)]
        report.write_json(json, {"layers": [layer.to_dict() for layer in found], "totals": sums})
    for layer in found:
        _show(layer)
    if model is not None:
        _show_totals(found)


def _kinds(source: str, dtype: str, trust_remote_code: bool, progress: Progress) -> list[LayerKind]:
    with stage(progress, "load the model"):
        model, _ = load_model(source, dtype=parse_dtype(dtype), trust_remote_code=trust_remote_code)
        if not any(isinstance(module, NMLinear) for module in model.modules()):
            sparsify(model)
    return kinds_of(model)


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"--shape {text!r}: write OUTxIN, as {SHAPE}")
    return int(match[1]), int(match[2])


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--rows {text!r}: write numbers from 1 on, as 1,16,256")
    return [int(count) for count in text.split(",")]


def _show(layer: LayerTimes) -> None:
    kind = layer.kind
    layers = f"{kind.count} layers " if kind.count > 1 else ""
    table = Table(title=f"{layers}{kind} on {layer.device}; milliseconds, medians")
    for heading in ("rows", "dense", "ours", "unpacked", "torch 2:4", "NMLinear takes", "times as fast"):
        table.add_column(heading, justify="left" if heading == "NMLinear takes" else "right")
    names = {"packed": "ours", "unpacked": "unpacked", "dense": "unpacked", "semi_structured": "torch 2:4"}
    for entry in layer.times:
        torchs = "-" if entry.semi_structured is None else f"{entry.semi_structured:.3f}"
        cells = (f"{entry.dense:.3f}", f"{entry.packed:.3f}", f"{entry.unpacked:.3f}", torchs, names[entry.product])
        table.add_row(str(entry.rows), *cells, f"{entry.dense / entry.taken:.2f}x")
    console.print(table)
    share = layer.packed_bytes / layer.dense_bytes
    console.print(f"weight {layer.packed_bytes / 2**20:.2f} MiB, {share:.1%} of dense", highlight=False)
    if layer.why_no_semi_structured:
        console.print(f"torch 2:4 was not timed: {layer.why_no_semi_structured}", highlight=False)
    slower = [f"{entry.rows} ({entry.taken / entry.dense:.2f}x the time)" for entry in layer.times if entry.loses]
    losses = f"slower than dense at rows {', '.join(slower)}" if slower else "nowhere slower than dense"
    console.print(f"sparse is {losses}", highlight=False, soft_wrap=True)
    console.print(f"limits that fit these times: {best_limits(layer.times)}", highlight=False, soft_wrap=True)


def _show_totals(layers: list[LayerTimes]) -> None:
    count = sum(layer.kind.count for layer in layers)
    table = Table(title=f"all {count} packed layers, milliseconds")
    for heading in ("rows", "dense", "NMLinear", "times as fast"):
        table.add_column(heading, justify="right")
    for entry in totals(layers):
        cells = (f"{entry.dense:.2f}", f"{entry.taken:.2f}", f"{entry.dense / entry.taken:.2f}x")
        table.add_row(str(entry.rows), *cells)
    console.print(table)
