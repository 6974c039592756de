"""``ace-triton pack``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..byte_sizes import shown_bytes
from ..errors import ArgumentError
from ..formats.registry import format_of, save_model
from ..inputs import checkpoint
from ..inputs.model_card import quantize_entry
from ..inputs.model_source import weight_file_bytes
from ..packed.manifest import DENSE, TENSORS_FILE
from ..packed.pack_model import sparsify
from ..progress import stage
from ..provenance import name_of, source_facts, source_of, with_provenance
from ..solvers.quantize import GROUP
from ..sparsity import Sparsity
from ..streaming.streamed_pack import pack_checkpoint, pattern_in, with_packing
from . import report
from .console import console, print_backend, print_line, print_note, progress_bars
from .options import (
    AllBitsOption,
    BitsOption,
    DenseBitsOption,
    DeviceOption,
    DtypeOption,
    EmbeddingBitsOption,
    ExcludeOption,
    GroupOption,
    HeadBitsOption,
    IncludeOption,
    JsonOption,
    OverwriteOption,
    TrustOption,
    check_json,
    parse_bits,
    parse_device,
    parse_dtype,
)
from .sources import check_causal, check_source


def pack(
    src: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of a pruned model; with --all-bits, also of a dense one.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the packed model.")],
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Pattern n:m of all layers.",
            show_default="found for each layer",
        ),
    ] = None,
    bits: BitsOption = None,
    group: GroupOption = GROUP,
    head_bits: HeadBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    dense_bits: DenseBitsOption = None,
    all_bits: AllBitsOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep the weights in files and only one layer in memory; on the CPU.")
    ] = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = None,
) -> None:
    """Pack the n:m layers of a pruned checkpoint into a smaller one. Load it with ace_triton.load to run it sparse.

    --bits rounds each kept weight to the nearest value, because there is no calibration text here. 'ace-triton prune
    --bits' chooses better values; pack its result with the same --bits and --group, which keeps them. --head-bits,
    --embedding-bits and --dense-bits round weights that were not pruned, also to the nearest value. --all-bits 8 stores
    all weights in 8 bits, also of a model that was not pruned.
    """
    check_json(json)
    if format_of(src).name == "packed":
        raise ArgumentError(f"{src} is packed already: use it as it is, or name the dense folder it was packed from")
    if sparsity is not None and Sparsity(sparsity).n is None:
        raise ArgumentError(f"--sparsity {sparsity!r}: packed layers need a pattern n:m, as 2:4")
    few = parse_bits(bits, group)
    of_head, of_embedding, of_dense, of_all = (
        parse_bits(given, group, option)
        for given, option in (
            (head_bits, "--head-bits"),
            (embedding_bits, "--embedding-bits"),
            (dense_bits, "--dense-bits"),
            (all_bits, "--all-bits"),
        )
    )
    weights_dtype, where = parse_dtype(dtype), parse_device(device)
    checkpoint.check_out(out, overwrite=overwrite)
    check_source(src, hub=False)
    if stream and torch.device(where).type != "cpu":
        raise ArgumentError("--stream packs on the CPU: add --device cpu, or leave --stream out")
    if stream:
        advice = "leave --stream out, so the model is loaded"
        check_causal(src, "pack --stream", advice, trust_remote_code=trust_remote_code)
    print_backend(where)
    facts = checkpoint.read_report(src) or {}
    source = source_of(facts, src) if facts else src
    if source is not None:
        facts = {**facts, **source_facts(source, out)}
    with checkpoint.reserved(out, overwrite=overwrite), progress_bars() as progress:
        if stream:
            result = pack_checkpoint(
                src,
                out,
                sparsity,
                include=include or None,
                exclude=exclude or None,
                dtype=weights_dtype,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                report=facts,
                stage=partial(stage, progress),
                bits=few,
                group=group,
                head_bits=of_head,
                embedding_bits=of_embedding,
                dense_bits=of_dense,
                all_bits=of_all,
            )
        else:
            with stage(progress, "load the model"):
                model, tokenizer = checkpoint.load(
                    src, dtype=weights_dtype, device=where, trust_remote_code=trust_remote_code, task=None
                )
            with stage(progress, "pack"):
                result = sparsify(
                    model,
                    sparsity,
                    include=include or None,
                    exclude=exclude or None,
                    bits=few,
                    group=group,
                    head_bits=of_head,
                    embedding_bits=of_embedding,
                    dense_bits=of_dense,
                    all_bits=of_all,
                    pruned_to=pattern_in(facts),
                )
            facts = with_packing(facts, result, few or of_all, group)
            with stage(progress, "save the model"):
                save_model(model, tokenizer, out, "packed", report=facts, overwrite=overwrite)
    if json:
        report.write_json(json, with_provenance(result.to_dict(), model=name_of(src)))
    console.print(report.packing_table(result))
    for line in report.skipped_lines(result.skipped):
        print_line(f"left as it is: {line}")
    few = few or of_all
    pruned = any(layer.bits is not None and layer.pattern != DENSE for layer in result.layers)
    if pruned and quantization_of(facts) != (few, group):
        print_note(
            f"weights were rounded to the nearest value of {few} bits; ace-triton prune --bits {few} loses less, "
            f"because it uses the calibration text, and ace-triton recover --bits {few} trains the rounded weights"
        )
    sizes = (weight_file_bytes(src), (out / TENSORS_FILE).stat().st_size)
    print_line(f"weight files: {' -> '.join(map(shown_bytes, sizes))}")
    if 0 < sizes[0] < result.dense_bytes:
        print_note(
            f"the files of {name_of(src)} store the weights in fewer bits than the loaded model has, whose layers in "
            f"the table take {shown_bytes(result.dense_bytes)}"
        )
    print_line(f"written to {out}")


def quantization_of(facts: Mapping[str, Any] | None) -> tuple[Any, Any] | None:
    """Bits and group that a report says the kept weights are quantized with; None if they are not."""
    by = quantize_entry(facts)
    return (by.get("bits"), by.get("group")) if by else None
