"""The registry of exporters, and export through it: write, read back, compare, and only then keep the files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, CheckpointError
from ..formats.registry import load_model
from ..inputs.checkpoint import read_report, refusals
from ..inputs.output_folder import files_in, replacing, write_report
from ..packed.unpack_model import unpack_model
from ..provenance import name_of, source_facts, with_provenance
from .checks import ExportedMatrix, check_matrices, largest_difference, layers_of, prompts_for
from .exporter import Exporter
from .gguf import Gguf
from .onnx import Onnx
from .openvino import Openvino

_REGISTRY: dict[str, Exporter] = {exporter.name: exporter for exporter in (Onnx(), Openvino(), Gguf())}

PROMPTS = 4
"""Default number of prompts on which the exported files are compared with the model."""

Stage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote and checked.

    Attributes:
        engine: name of the exporter.
        weight_type: type of the weights in the files.
        files: size in bytes of each file, by name.
        matrices: the weights of all linear layers, as they were read back from the files.
        prompts: number of prompts on which logits were compared.
        largest_difference: largest absolute difference of a logit from the float32 model in PyTorch.
        largest_logit: largest absolute logit of the float32 model.
        advice: how to use the files.
    """

    engine: str
    weight_type: str
    files: dict[str, int]
    matrices: tuple[ExportedMatrix, ...]
    prompts: int
    largest_difference: float
    largest_logit: float
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def register_exporter(exporter: Exporter) -> None:
    """Add an exporter.

    Raises:
        ArgumentError: if there is an exporter of this name.
    """
    if exporter.name in _REGISTRY:
        raise ArgumentError(f"there is an exporter {exporter.name!r} already: choose a name other than {_names()}")
    _REGISTRY[exporter.name] = exporter


def exporter_named(name: str) -> Exporter:
    """The exporter with this name; ArgumentError with all known names if there is none."""
    if name not in _REGISTRY:
        raise ArgumentError(f"unknown engine {name!r}: use one of {_names()}")
    return _REGISTRY[name]


def exporter_names() -> list[str]:
    """Names of all exporters."""
    return list(_REGISTRY)


def check_export(to: str, weight_type: str | None) -> tuple[Exporter, str]:
    """The exporter and the type of the weights, after the checks that need no model.

    Raises:
        ArgumentError: if the engine or the type is unknown.
        CheckpointError: if a package of the exporter is not installed.
    """
    exporter = exporter_named(to)
    chosen = exporter.weight_types[0] if weight_type is None else weight_type
    if chosen not in exporter.weight_types:
        raise ArgumentError(
            f"{to} files have no weights of type {chosen!r}: use one of {', '.join(exporter.weight_types)}"
        )
    exporter.check_installed()
    return exporter, chosen


def export_model(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    weight_type: str | None = None,
    prompts: int = PROMPTS,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    stage: Stage | None = None,
) -> ExportReport:
    """Export a model to another engine's files, read them back, and compare them with the model.

    A packed model is unpacked: the files hold dense weights with zeros. They become ``out`` only if every weight was
    found in them, every n:m layer is n:m along the inputs of its product, and the logits agree.

    Args:
        source: a folder, dense or packed, or another source that :func:`ace_triton.formats.registry.load_model` takes.
        out: folder to write.
        to: name of an exporter, as "onnx".
        weight_type: type of the weights in the files, one of the exporter's; None for its default.
        prompts: number of prompts on which logits are compared.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace an existing ``out``, if :func:`~ace_triton.inputs.checkpoint.check_out` allows it.
        stage: called with the title of each stage; returns a context that lasts as long as the stage.

    Raises:
        ArgumentError: if the engine or the type of weights is unknown, or ``prompts`` is below 1.
        CheckpointError: if the model cannot be loaded or exported, a package is missing, ``out`` cannot be written, or
            the files differ from the model; nothing is written.
    """
    if prompts < 1:
        raise ArgumentError(f"prompts must be at least 1, got {prompts}")
    exporter, chosen = check_export(to, weight_type)
    step = stage or (lambda title: nullcontext())
    with replacing(out, overwrite=overwrite) as folder, refusals(out):
        with step("load the model"):
            model, tokenizer = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
            unpack_model(model)
        refusal = exporter.refusal(model)
        if refusal is not None:
            raise CheckpointError(refusal)
        texts = prompts_for(model, tokenizer, prompts)
        expected = [_logits(model, ids) for ids in texts]
        layers = layers_of(model, exporter.keeps_weights(chosen))
        with step(f"write {to}"):
            exporter.write(model, tokenizer, folder, chosen)
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        with step("read the weights back"):
            matrices = check_matrices(layers, exporter.read_weights(folder), to)
        with step("compare the logits"):
            run = exporter.opened(folder, model)
            difference = largest_difference(expected, [run(ids) for ids in texts], to, exporter.tolerance(chosen))
        report = ExportReport(
            to,
            chosen,
            {name: (folder / name).stat().st_size for name in files_in(folder)},
            tuple(matrices),
            prompts,
            difference,
            max(float(logits.abs().max()) for logits in expected),
            tuple(exporter.advice(Path(out), chosen)),
        )
        write_report(folder, _facts(source, out, report))
    return report


def _facts(source: str | Path, out: str | Path, report: ExportReport) -> dict[str, Any]:
    """The pruning report of the source with what was exported."""
    earlier = (read_report(source) if Path(source).is_dir() else None) or source_facts(source, out)
    own = {name: value for name, value in report.to_dict().items() if name not in ("files", "advice")}
    return {**earlier, "export": with_provenance(own, model=name_of(source))}


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def _names() -> str:
    return ", ".join(_REGISTRY)
