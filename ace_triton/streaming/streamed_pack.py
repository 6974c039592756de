"""Pack a pruned checkpoint into a packed one while only the layer in work is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, PatternError
from ..inputs import checkpoint
from ..inputs.checkpoint import refusals
from ..inputs.output_folder import replacing, reserved, writing
from ..packed.manifest import DENSE
from ..packed.pack_model import SparsifyReport, WeightsInMemory, pack_layers
from ..packed.saving import why_not_saved, write_around
from ..process_memory import drop_pages, page_out
from ..provenance import history_with
from ..solvers.quantize import GROUP
from ..sparsity import Sparsity
from .mapped_model import Source, copy_in_pieces, taken_sources
from .weight_files import WeightFiles


class WeightsInFiles(WeightsInMemory):
    """Weights that are read from the files of a checkpoint, and packed layers that are mapped files of a folder.

    Args:
        model: the model.
        sources: for each parameter on the meta device, what reads its values, by name.
        folder: folder for the files of the packed layers.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Source], folder: Path) -> None:
        # By identity, because a packed layer keeps the bias but not its name. The parameters are kept alive here.
        self._sources: dict[int, tuple[nn.Parameter, Source]] = {}
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                self._sources[id(parameter)] = parameter, sources[name]
        self._stands_for: dict[int, nn.Parameter] = {}
        self._folder, self._files = folder, 0

    @contextmanager
    def loaded(self, module: nn.Module, parameter: str | None = None) -> Iterator[None]:
        """As in :class:`~ace_triton.packed.pack_model.WeightsInMemory`."""
        places = module._parameters
        swapped: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        try:
            for name, own in list(places.items()):
                if own is not None and own.is_meta and parameter in (None, name):
                    values = nn.Parameter(self.read(own), requires_grad=own.requires_grad)
                    places[name] = values
                    swapped[name] = values, own
                    self._stands_for[id(values)] = own
            yield
        finally:
            for name, (values, own) in swapped.items():
                if places.get(name) is values:
                    places[name] = own
                del self._stands_for[id(values)]
                page_out(values.data)

    def keep(self, layer: nn.Module) -> None:
        """Move the layer's tensors to a file; those that it shares with the source stay there."""
        own: dict[str, torch.Tensor] = {}
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None and id(parameter) in self._stands_for:
                layer._parameters[name] = self._stands_for[id(parameter)]
            elif parameter is not None:
                own[name] = parameter.data
        own |= {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
        files = WeightFiles.create_one(self._folder / f"{self._files:05d}.safetensors", own)
        self._files += 1
        for name, tensor in own.items():
            mapped = files.tensor(name)
            copy_in_pieces(tensor, mapped)
            if name in layer._buffers:
                layer._buffers[name] = mapped
            else:
                layer._parameters[name] = nn.Parameter(mapped, requires_grad=False)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor of the model, wherever it is."""
        return self._sources[id(tensor)][1]().to(tensor.dtype) if tensor.is_meta else tensor.detach()


class MappedWeights(WeightsInFiles):
    """Weights of a model whose parameters are mapped files; what was read leaves memory when its layer is packed.

    Args:
        model: the model.
        folder: folder for the files of the packed layers.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        super().__init__(model, {}, folder)

    @contextmanager
    def loaded(self, module: nn.Module, parameter: str | None = None) -> Iterator[None]:
        """As in :class:`~ace_triton.packed.pack_model.WeightsInMemory`."""
        try:
            yield
        finally:
            for own in module.parameters(recurse=False):
                drop_pages(own.data)


def pack_checkpoint(
    source: str | Path,
    out: str | Path,
    pattern: str | None = None,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    report: dict[str, Any] | None = None,
    stage: Callable[[str], AbstractContextManager[object]] = nullcontext,
    bits: int | None = None,
    group: int = GROUP,
    head_bits: int | None = None,
    embedding_bits: int | None = None,
    dense_bits: int | None = None,
    all_bits: int | None = None,
) -> SparsifyReport:
    """Pack a pruned checkpoint into a packed one, with one layer of the model in memory at a time.

    Packed layers wait in files beside ``out``, so the disk needs room for them twice. The result has the same bytes as
    packing in memory and saving. It runs on the CPU.

    Args:
        source: a folder with a model pruned to n:m.
        out: folder for the packed model.
        pattern: as for :func:`~ace_triton.packed.pack_model.pack_model`.
        include: as there.
        exclude: as there.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace ``out`` if ace-triton wrote it.
        report: the pruning report, written as ``ace_triton.json`` with one more step in its history. The pattern in it
            is ``pruned_to`` of :func:`~ace_triton.packed.pack_model.pack_model`.
        stage: gives a context for a stage by its name, to show the progress.
        bits: as for :func:`~ace_triton.packed.pack_model.pack_model`.
        group: as there.
        head_bits: as there.
        embedding_bits: as there.
        dense_bits: as there.
        all_bits: as there.

    Returns:
        The packed layers, and the skipped layers with their reasons.

    Raises:
        CheckpointError: if the model cannot be loaded or saved, or ``out`` cannot be written.
        ArgumentError: if no layer can be packed, or ``pattern`` is not an n:m.
    """
    with reserved(out, overwrite=overwrite) as place, writing(place, out):
        place.kept.mkdir()
        with stage("load the model"):
            model, tokenizer = checkpoint.load(
                source, dtype=dtype, trust_remote_code=trust_remote_code, offload_folder=place.kept / "converted"
            )
            weights = WeightsInFiles(model, taken_sources(model), place.kept)
        with stage("pack"):
            result = pack_layers(
                model,
                weights,
                pattern,
                include=include,
                exclude=exclude,
                bits=bits,
                group=group,
                head_bits=head_bits,
                embedding_bits=embedding_bits,
                dense_bits=dense_bits,
                all_bits=all_bits,
                pruned_to=pattern_in(report),
            )
        with stage("save the model"), replacing(out, overwrite=overwrite) as folder, refusals(out):
            told = None if report is None else with_packing(report, result, bits or all_bits, group)
            write_packed_files(model, tokenizer, weights, folder, told)
    return result


def pattern_in(report: Any) -> str | None:
    """The pattern n:m along the inputs that a pruning report names; None without one."""
    for key in ("recipe", "sparsity"):
        report = report.get(key) if isinstance(report, dict) else None
    pattern = report.get("pattern") if isinstance(report, dict) else None
    try:
        found = None if not isinstance(pattern, str) else Sparsity(pattern)
    except PatternError:
        return None
    return None if found is None or found.n is None else f"{found.n}:{found.m}"


def with_packing(report: dict[str, Any], packed: SparsifyReport, bits: int | None, group: int) -> dict[str, Any]:
    """The report beside a model, with packing as the last step of its history."""
    did = "packed" if bits is None else f"packed, {bits} bits in groups of {group}"
    dense = sorted({layer.bits for layer in packed.layers if layer.pattern == DENSE and layer.bits is not None})
    for few in dense:
        names = [layer.name for layer in packed.layers if layer.pattern == DENSE and layer.bits == few]
        shown = names[0] if len(names) == 1 else f"{len(names)} layers"
        did += f"; {shown} stored in {few} bits without pruning"
    history = history_with(report, "pack", did, bytes=[packed.dense_bytes, packed.packed_bytes])
    return {**report, **packing_facts(packed), "history": history}


def packing_facts(packed: SparsifyReport) -> dict[str, Any]:
    """What the report beside a packed model says of its layers: how many have which pattern and bits."""
    kinds: dict[tuple[str, int | None], list[str]] = {}
    for layer in packed.layers:
        kinds.setdefault((layer.pattern, layer.bits), []).append(layer.name)
    return {
        "packed_layers": [
            {"pattern": pattern, "bits": bits, "layers": len(names), **({"name": names[0]} if len(names) == 1 else {})}
            for (pattern, bits), names in kinds.items()
        ]
    }


def write_packed_files(
    model: Any, tokenizer: Any, weights: WeightsInFiles, folder: Path, report: dict[str, Any] | None
) -> None:
    """Write a packed model, some of whose tensors are in files, into an empty folder.

    Args:
        model: a model that :func:`~ace_triton.packed.pack_model.pack_layers` has packed.
        tokenizer: its tokenizer.
        weights: reads its tensors.
        folder: the folder.
        report: the pruning report, written as ``ace_triton.json``.

    Raises:
        CheckpointError: if the model cannot be saved as a packed checkpoint.
    """
    refusal = why_not_saved(model)
    if refusal is not None:
        raise CheckpointError(refusal)
    tokenizer.save_pretrained(folder)
    tensors, tied = _distinct(model)
    write_around(model, folder, tied, report or {}, lambda path: _save(tensors, weights, path))


def _distinct(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct tensor by name, and for each tied name the name of its tensor."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen and tensor.numel():
            tied[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def _save(tensors: dict[str, torch.Tensor], weights: WeightsInFiles, path: Path) -> None:
    files = WeightFiles.create_one(path, tensors)
    for name, tensor in tensors.items():
        copy_in_pieces(weights.read(tensor), files.tensor(name))
