"""``ace-triton bench``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from ..byte_sizes import shown_bytes
from ..decoding_times import DecodingTimes, decoding_times
from ..errors import ArgumentError
from ..formats.registry import format_of, load_model
from ..generation import prompt_ids
from ..inputs.text import read_documents
from ..packed.bench import (
    ROWS,
    LayerKind,
    LayerTimes,
    RowTimes,
    TotalTimes,
    bench_layer,
    best_limits,
    fastest,
    kinds_of,
    totals,
)
from ..packed.inspect import surely_not_pruned
from ..packed.pack_model import sparsify
from ..packed.packed_linear import PackedLinear
from ..packed.products import registry
from ..progress import progress_bar, stage
from ..provenance import name_of, with_provenance
from ..solvers.quantize import GROUP
from ..sparsity import Sparsity
from ..timing import Moment
from . import report
from .console import console, print_backend, print_line, print_note, progress_bars
from .options import (
    DTYPES,
    BitsOption,
    DeviceOption,
    FuseOption,
    GroupOption,
    InputBitsOption,
    JsonOption,
    TrustOption,
    check_json,
    choose_input_bits,
    number,
    parse_bits,
    parse_device,
    parse_dtype,
)
from .sources import check_length, check_source
from .sources import fuse as fuse_packed

SHAPE = "4096x4096"

PROMPT_TOKENS = 16
"""Tokens of the prompt that ``--tokens`` continues."""

LEAST_PACKED_ZEROS = 1 / 32
"""Least share of zeros in a layer that packs: m of n:m is at most 32."""

LEAST_SHARE = 0.8
"""Least CPU time of the process over wall-clock time at which the times of a CPU are taken as undisturbed."""

COUNT, LARGEST = r"[1-9]\d{0,8}", 10**9 - 1


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Model whose layers to time: a folder, pruned or packed.", show_default="no model"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape of one layer to time, as OUTxIN.", show_default=SHAPE, metavar="OUTxIN")
    ] = None,
    sparsity: Annotated[
        str, typer.Option(help="Pattern n:m, or pruned fraction, for --shape; the layers of --model have their own.")
    ] = "2:4",
    bits: BitsOption = None,
    group: GroupOption = GROUP,
    rows: Annotated[
        str, typer.Option(help="Comma-separated numbers of rows to time: the tokens in one call.")
    ] = ",".join(map(str, ROWS)),
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Type of weights and tokens, one of {', '.join(DTYPES)}; auto is the model's own, else float32 on a "
            "CPU and bfloat16 on a GPU."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    tokens: Annotated[
        int | None,
        number(
            "Number of tokens to decode with the packed and the dense --model, instead of timing its layers.",
            least=2,
            show_default="time layers",
        ),
    ] = None,
    input_bits: InputBitsOption = None,
    fuse: FuseOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = None,
) -> None:
    """Time packed layers beside dense ones, and show at which numbers of rows sparse is slower.

    With --tokens it decodes with both, and shows where the time of a token goes.
    """
    check_json(json)
    choose_input_bits(input_bits)
    counts = _counts(rows)
    where = parse_device(device)
    if model is not None and shape is not None:
        raise ArgumentError("--model and --shape: give only one of them")
    weights_dtype = parse_dtype(dtype)
    if tokens is not None:
        if model is None:
            raise ArgumentError("--tokens decodes with a whole model: name it with --model")
        few = parse_bits(bits, group)
        _time_decoding(model, tokens, weights_dtype, where, trust_remote_code, json, fuse, input_bits, few, group)
        return
    if fuse:
        raise ArgumentError("--fuse: for decoding with a whole model: add --tokens")
    if model is None:
        default = "float32" if where == "cpu" else "bfloat16"
        kind = _one_kind(shape or SHAPE, Sparsity(sparsity), default if dtype == "auto" else dtype)
        if bits is not None and kind.n is None:
            raise ArgumentError(f"--bits needs a pattern n:m, as --sparsity 8:16; got --sparsity {sparsity}")
        kinds = [dataclasses.replace(kind, bits=parse_bits(bits, group), group=0 if bits is None else group)]
    else:
        _check_model(model, bits)
    print_backend(where)
    with progress_bars() as progress:
        if model is not None:
            kinds = _kinds(model, weights_dtype, trust_remote_code, parse_bits(bits, group), group, progress)
        started = Moment.now()
        found = [
            bench_layer(
                kind, where, rows=counts, progress=progress_bar(progress, f"bench {kind.shape}", "numbers of rows")
            )
            for kind in kinds
        ]
        elapsed = started.since()
    if json:
        content = {
            "input_bits": input_bits,
            "layers": [layer.to_dict() for layer in found],
            "totals": [dataclasses.asdict(entry) for entry in totals(found)],
        }
        name = None if model is None else name_of(model)
        report.write_json(json, with_provenance(content, model=name, device=where))
    for layer in found:
        _show(layer)
    _show_refusals(found)
    if model is not None:
        _show_totals(found)
    _note_other_work(*elapsed, where)


def _time_decoding(
    source: str,
    tokens: int,
    dtype: Any,
    device: str,
    trust_remote_code: bool,
    json: Path | None,
    fused: bool,
    input_bits: int | None,
    bits: int | None,
    group: int,
) -> None:
    """Time decoding with a model and its dense copy, and print and write the times."""
    _check_model(source, bits)
    check_length(source, tokens + PROMPT_TOKENS, "--tokens")
    print_backend(device)
    with progress_bars() as progress:
        with stage(progress, "load the model"):
            model, tokenizer = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            if not any(isinstance(module, PackedLinear) for module in model.modules()):
                sparsify(model, bits=bits, group=group)
            if fused:
                fuse_packed(model, source)
        ids = prompt_ids(tokenizer, read_documents("pydoc:evaluation", most=1)[0])[:PROMPT_TOKENS]
        started = Moment.now()
        found = decoding_times(model, tokenizer, ids, tokens, progress=progress_bar(progress, "decode", "texts"))
        elapsed = started.since()
    facts = {"dtype": str(model.dtype).removeprefix("torch."), "device": device, "threads": torch.get_num_threads()}
    facts |= {"fused": fused, "input_bits": input_bits}
    if json:
        report.write_json(json, with_provenance({"decoding": found.to_dict()}, model=name_of(source), **facts))
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    title = f"greedy decoding, {tokens} tokens, {facts['dtype']}, {threads}"
    table = report.headed_table("", "dense", "packed", title=title)
    sides = (found.dense, found.packed)
    table.add_row("tokens a second", *(f"{side.tokens_per_second:.1f}" for side in sides))
    for label, part in (
        ("ms a token in the packed layers", "packed_layers"),
        ("ms in other linear layers", "other_layers"),
        ("ms in everything else", "rest"),
    ):
        table.add_row(label, *(f"{getattr(side, part):.2f}" for side in sides))
    measured = (side.packed_layers + side.other_layers + side.rest for side in sides)
    table.add_row("ms a token in all, while the parts are timed", *(f"{whole:.2f}" for whole in measured))
    console.print(table)
    faster = found.packed.tokens_per_second / found.dense.tokens_per_second
    print_line(f"packed is {faster:.2f} times as fast as dense, both in transformers")
    print_line(f"tokens before the first difference: {found.same_tokens} of {tokens}")
    _show_step(found)
    _note_other_work(*elapsed, device)


def _show_step(found: DecodingTimes) -> None:
    """Print the times of the compiled step."""
    if found.dense_step is None or found.packed_step is None:
        print_line(f"the compiled step does not decode this model: {found.refusal}")
        return
    table = report.headed_table("", "dense", "packed", title="the same with the compiled step")
    sides = (found.dense_step, found.packed_step)
    table.add_row("tokens a second", *(f"{side.tokens_per_second:.1f}" for side in sides))
    for label, part in (
        ("ms a token in products", "products"),
        ("ms in attention", "attention"),
        ("ms in everything else", "rest"),
    ):
        table.add_row(label, *(f"{getattr(side, part):.2f}" for side in sides))
    console.print(table)
    speed = found.packed_step.tokens_per_second
    faster, across = speed / found.dense_step.tokens_per_second, speed / found.dense.tokens_per_second
    print_line(f"packed is {faster:.2f} times as fast as dense, both with the compiled step")
    print_line(f"tokens before the first difference from packed in transformers: {found.same_tokens_of_step}")
    print_line(
        f"packed with the compiled step is {across:.2f} times as fast as dense in transformers, by packing and the "
        "decoder together"
    )


def _note_other_work(wall: float, cpu: float, device: str) -> None:
    """Print a note if the process waited for a processor so long that the times of a CPU say little.

    Args:
        wall: wall-clock seconds of the timing.
        cpu: CPU seconds of the process in that time, all threads together.
        device: where the products ran.
    """
    if torch.device(device).type == "cpu" and cpu < LEAST_SHARE * wall:
        print_note(
            f"the process had a processor for {cpu / wall:.0%} of the time: other work runs on this machine, and the "
            "times have its noise; repeat it when the machine is idle"
        )


def _check_model(source: str, bits: int | None) -> None:
    """Raise an AceError if a model cannot be timed with these bits, before it is loaded if that is known."""
    check_source(source, any_format=True)
    if bits is not None and format_of(source).name == "packed":
        raise ArgumentError(
            f"--bits {bits}: {source} is packed already, and is timed as it is stored: leave --bits out, or name the "
            "pruned folder that it was packed from"
        )
    if format_of(source).name == "dense" and surely_not_pruned(source, LEAST_PACKED_ZEROS):
        raise ArgumentError(
            f"{source} is not pruned, so it has no layers to pack and time: prune it first (ace-triton prune "
            "--sparsity 2:4), or store it in 8 bits (ace-triton pack --all-bits 8)"
        )


def _kinds(
    source: str, dtype: object, trust_remote_code: bool, bits: int | None, group: int, progress: Progress
) -> list[LayerKind]:
    with stage(progress, "load the model"):
        model, _ = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            sparsify(model, bits=bits, group=group)
    return kinds_of(model)


def _one_kind(text: str, pattern: Sparsity, dtype: str) -> LayerKind:
    match = re.fullmatch(rf"({COUNT})x({COUNT})", text)
    if not match:
        raise ArgumentError(f"--shape {text!r}: write OUTxIN, each from 1 to {LARGEST:,}, as {SHAPE}")
    out_features, in_features = int(match[1]), int(match[2])
    if pattern.m is not None and in_features % pattern.m:
        raise ArgumentError(f"--shape {text!r}: the {in_features} inputs are not a multiple of {pattern.m}")
    kept = None if pattern.n is not None else round(1 - pattern.fraction, 2)
    return LayerKind((out_features, in_features), pattern.n, pattern.m, parse_dtype(dtype), kept=kept)


def _counts(text: str) -> list[int]:
    if not re.fullmatch(rf"{COUNT}(,{COUNT})*", text):
        raise ArgumentError(f"--rows {text!r}: write numbers from 1 to {LARGEST:,} with commas, as 1,16,256")
    return [int(count) for count in text.split(",")]


def _show(layer: LayerTimes) -> None:
    kind = layer.kind
    layers = f"{kind.count} layers " if kind.count > 1 else ""
    labels = {product.name: product.label for product in registry.products}
    headings = ("rows", "dense", *labels.values(), "NMLinear takes", "times as fast")
    title = f"{layers}{kind} on {layer.device}; milliseconds, medians"
    table = report.headed_table(*headings, title=title, left=("NMLinear takes",))
    for entry in layer.times:
        times = entry.products
        cells = [f"{entry.dense:.3f}", *(f"{times[name]:.3f}" if name in times else "-" for name in labels)]
        table.add_row(str(entry.rows), *cells, labels[entry.product], f"{entry.dense / entry.taken:.2f}x")
    console.print(table)
    share = layer.packed_bytes / layer.dense_bytes
    print_line(f"weight {shown_bytes(layer.packed_bytes)}, {share:.1%} of dense")
    print_line(f"sparse is {_losses(layer.times)}")
    better = [f"{entry.rows} ({labels[fastest(entry.products)]})" for entry in layer.times if not entry.fits]
    if not better:
        print_line("no other product of NMLinear is faster: its row limits fit these times")
        return
    print_line(f"another product is faster at rows {', '.join(better)}; to use row limits that fit these times:")
    print_line(f"    ace_triton.set_row_limits(model, ace_triton.{best_limits(layer.times)})")


def _losses(times: Sequence[RowTimes | TotalTimes]) -> str:
    """At which numbers of rows NMLinear is slower than dense, in words."""
    slower = [f"{entry.rows} ({entry.taken / entry.dense:.2f}x the time)" for entry in times if entry.loses]
    return f"slower than dense at rows {', '.join(slower)}" if slower else "never slower than dense"


def _show_refusals(layers: list[LayerTimes]) -> None:
    """Print once why a product was not timed, if it is for several layers."""
    labels = {product.name: product.label for product in registry.products}
    lines = [f"{labels[name]} was not timed: {why}" for layer in layers for name, why in layer.refusals.items()]
    for line in dict.fromkeys(lines):
        print_line(line)


def _show_totals(layers: list[LayerTimes]) -> None:
    summed = totals(layers)
    count = sum(layer.kind.count for layer in layers)
    title = f"all {count} packed layers, milliseconds"
    table = report.headed_table("rows", "dense", "NMLinear", "times as fast", title=title)
    for entry in summed:
        cells = (f"{entry.dense:.2f}", f"{entry.taken:.2f}", f"{entry.dense / entry.taken:.2f}x")
        table.add_row(str(entry.rows), *cells)
    console.print(table)
    print_line(f"all packed layers together are {_losses(summed)}")
