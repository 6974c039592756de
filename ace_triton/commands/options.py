"""Options that several commands share, and their checks, which run before a command starts its work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..decoders.kept_tensors import Offload
from ..errors import ArgumentError
from ..generation import DECODERS
from ..inputs.beginnings import Bos
from ..inputs.model_source import check_device
from ..inputs.model_task import TASK_NAMES
from ..kernels import cpu_library
from ..kernels.few_bits import STEP, check_bits
from ..methods.plugins import load_plugins
from ..methods.registry import metric
from ..option_types import Range, read_options
from ..processes import own_device
from ..solvers.update import UPDATES, Update
from .report import check_json_target

DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LARGEST_SEED = 2**63 - 1

NO_UPDATE = "none"

TEXT_SOURCES = "a text, .jsonl or .json file (also .gz), a dataset as name[:config[:split]], or pydoc:{half}"


def within(**bounds: float) -> Callable[[Any], Any]:
    """A check of a number, or of None, by :class:`~ace_triton.option_types.Range`'s bounds; infinity is refused."""
    allowed = Range(**bounds)

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value in allowed):
            raise typer.BadParameter(f"it must be {allowed}; got {value}")
        return value

    return check


def number(help: str, *, flag: str | None = None, show_default: bool | str = True, **bounds: float) -> Any:
    """A typer option that takes a number within bounds."""
    flags = () if flag is None else (flag,)
    return typer.Option(*flags, help=help, callback=within(**bounds), show_default=show_default)


JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
DeviceOption = Annotated[
    str, typer.Option(help="Device to run on: cpu, cuda, cuda:1, or auto for CUDA if it is available.")
]
DtypeOption = Annotated[
    str, typer.Option(help=f"Type to load the weights in, one of {', '.join(DTYPES)}; auto keeps the model's own.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model; without it, never.")
]
FuseOption = Annotated[
    bool,
    typer.Option("--fuse", help="Fuse the packed products of queries, keys and values, and of gate and up, in memory."),
]
DecoderOption = Annotated[
    str,
    typer.Option(
        help="Decoder of each new token: compiled, one call of the compiled CPU library; transformers; or "
        "auto, compiled if a trial run gives the model's own logits. Texts of the two may differ at near ties in bf16, "
        "in fp16 and with few bits.",
        metavar="|".join(DECODERS),
    ),
]
InputBitsOption = Annotated[
    int | None,
    typer.Option(
        help="Bits to which the compiled products with 8-bit and 4-bit weights round their inputs in calls of a few "
        "rows: 30, about the precision of fp32, or 8, faster and less precise.",
        show_default="30",
        metavar="30|8",
    ),
]
OffloadOption = Annotated[
    Offload,
    typer.Option(help="Where the hidden states of the text are kept between two blocks: memory, or files on the disk."),
]
BitsOption = Annotated[
    int | None,
    typer.Option(help="Store each kept weight in 8 or 4 bits.", show_default="the weights' own type", metavar="8|4"),
]
GroupOption = Annotated[
    int, typer.Option(help="For all bits: number of inputs that share a scale, a multiple of 32.", metavar="INPUTS")
]
HeadBitsOption = Annotated[
    int | None,
    typer.Option(
        help="Store the output head in 8 or 4 bits; the embedding too if they share a weight.",
        show_default="the head's own type",
        metavar="8|4",
    ),
]
EmbeddingBitsOption = Annotated[
    int | None,
    typer.Option(help="Store the embedding in 8 or 4 bits.", show_default="its own type", metavar="8|4"),
]
DenseBitsOption = Annotated[
    int | None,
    typer.Option(help="Bits of the linear layers that were not pruned.", show_default="their own type", metavar="8|4"),
]
AllBitsOption = Annotated[
    int | None,
    typer.Option(
        help="Store every weight in 8 or 4 bits, pruned or not: the same as all other options of bits; what cannot be "
        "stored so keeps its type and is listed.",
        show_default="the weights' own type",
        metavar="8|4",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help="Model: a checkpoint folder, a hub name, a .gguf file, or smollm2.")
]
AnyModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="Model: a checkpoint folder, dense or packed, a hub name, a .gguf file, or smollm2."
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Shell pattern of layer names to work on, as '*.mlp.*'; repeatable.",
        show_default="all layers",
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Shell pattern of layer names to leave as they are; repeatable.",
        show_default="no layer",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help=f"Task that the model is loaded for, one of {', '.join(TASK_NAMES)}.",
        show_default="found from its config.json",
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        metavar="DIR",
        help="Folder of images for models that read them; a .txt file of the same name holds an image's text.",
        show_default="no images",
    ),
]
AudioOption = Annotated[
    Path | None,
    typer.Option(
        "--audio",
        metavar="DIR",
        help="Folder of audio files for models that read them; a .txt file of the same name holds a file's transcript.",
        show_default="no audio",
    ),
]
SeedOption = Annotated[int, number("Random seed of the calibration sequences.", least=0, most=LARGEST_SEED)]
WikitextOption = Annotated[
    bool, typer.Option("--wikitext", help="Read the evaluation text as a raw WikiText file, whose lines are rows.")
]
BosOption = Annotated[
    Bos,
    typer.Option(
        "--bos",
        help="Place of beginning-of-text tokens: 'each' puts one in every sequence or window, 'stream' one before the "
        "whole text, which is then cut; or 'none'. 'auto' is 'each' if the tokenizer adds one itself.",
    ),
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py|MODULE",
        help="Python code that registers metrics, which is run; repeatable.",
        show_default="no plugin",
        callback=load_plugins,
    ),
]


def parse_options(method: str, pairs: list[str] | None) -> dict[str, Any]:
    """A method's ``["a=0.5"]`` as ``{"a": 0.5}``; ArgumentError if an option or its value is invalid."""
    return read_options(metric(method).types, pairs or [], f"method {method!r}", "--option")


def parse_update(kind: str | None, pairs: list[str] | None, usual: Update | None = None) -> Update | None:
    """``--update`` with its ``--update-option`` pairs.

    Args:
        kind: the update's name, "none", or None for the usual one.
        pairs: its options, as ``name=value``.
        usual: the update if ``--update`` is not given.

    Raises:
        ArgumentError: if the update, an option or its value is invalid, or there are options but no update.
    """
    options = read_options(Update.types(), pairs or [], "--update", "--update-option")
    if kind not in (None, NO_UPDATE, *UPDATES):
        raise ArgumentError(f"--update {kind!r}: use one of {', '.join(UPDATES)} or {NO_UPDATE}")
    update = usual if kind is None else None if kind == NO_UPDATE else Update(kind)  # type: ignore[arg-type]
    if update is None:
        if options:
            raise ArgumentError("--update-option without --update: name the update too (--update lstsq)")
        return None
    return replace(update, **options)


def parse_bits(bits: int | None, group: int, option: str = "--bits") -> int | None:
    """The bits that an option gave; ArgumentError if they or ``--group`` are invalid."""
    if bits is not None:
        for name, of_group in ((option, STEP), ("--group", group)):
            try:
                check_bits(bits, of_group)
            except ArgumentError as error:
                raise ArgumentError(f"{name}: {error}") from error
    return bits


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """A number of bytes such as "300MB" or "1.5 GiB"; ArgumentError if it is invalid."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ArgumentError(
            f"{option} {text!r}: give a number of bytes above 0, with or without one of {', '.join([*UNITS][1:])}"
        )
    return int(float(found[1]) * UNITS[found[2]])


def parse_dtype(name: str) -> Any:
    """The ``dtype`` argument for transformers; ArgumentError if the name is unknown."""
    if name not in DTYPES:
        raise ArgumentError(f"--dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(name: str) -> str:
    """The device of this process, after a check that it is available; CheckpointError if it is not."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    return own_device(check_device(usual if name == "auto" else name))


def check_decoder(decoder: str) -> None:
    """Raise ArgumentError if ``--decoder`` is unknown."""
    if decoder not in DECODERS:
        raise ArgumentError(f"--decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")


def choose_input_bits(bits: int | None) -> None:
    """Use the bits that ``--input-bits`` gave, if any.

    Raises:
        ArgumentError: if they are invalid.
        BackendError: if the compiled CPU library is not available.
    """
    if bits is None:
        return
    if bits not in cpu_library.INPUT_BITS:
        raise ArgumentError(f"--input-bits must be {' or '.join(map(str, cpu_library.INPUT_BITS))}; got {bits}")
    cpu_library.use_input_bits(bits)


def check_json(path: Path | None) -> None:
    """ArgumentError if the file of ``--json`` could not be written; called before any work is done."""
    if path is not None:
        check_json_target(path)
