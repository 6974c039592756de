"""Prune a checkpoint into another checkpoint while only the block in work is in memory."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..decoders.calibration_forms import CalibrationSet
from ..decoders.kept_tensors import Offload, check_offload
from ..errors import ArgumentError, CheckpointError
from ..inputs import checkpoint
from ..inputs.model_source import ModelSource, check_device
from ..inputs.model_task import TEXT_GENERATION
from ..inputs.output_folder import Reservation, publish, reserved, write_report, writing
from ..model_report import ModelReport
from ..packed.pack_model import SparsifyReport, pack_layers
from ..packed.packable import check_packed
from ..packed.stored_bits import StoredBits
from ..presets import DEFAULT_PRESET, recipe_of
from ..processes import Processes, are_on_one_machine
from ..provenance import source_facts, versions, with_provenance
from ..prune_blocks import Progress, prune_stored
from ..recipe import Recipe
from ..solvers.quantize import Quantization
from ..timing import Moment
from .file_store import FileStore, finished_units
from .journal import Journal, Results
from .mapped_model import MappedModel
from .streamed_pack import MappedWeights, packing_facts, pattern_in, write_packed_files

JOURNAL, OWN_FORM = "journal.jsonl", "own_form"
PACKED_LAYERS, PACKED = "packed_layers", "packed"

FIRST_BYTES, PAGE, SAMPLED_PAGES = 64 * 2**10, 4096, 64
"""What :func:`sampled_digest` reads of a file."""


@dataclass
class StreamedModel:
    """A model whose weights stay in files, from :func:`streamed`.

    Attributes:
        model: the model. Its weights have their values once :meth:`start` was called.
        tokenizer: its tokenizer, or another object that saves what belongs beside the weights.
    """

    model: Any
    tokenizer: Any
    _place: Reservation
    _source: str
    _out: Path
    _overwrite: bool
    _processes: Processes
    _device: torch.device
    _offload: Offload = "memory"
    _mapped: MappedModel | None = None
    _store: FileStore | None = None

    def start(self, facts: Mapping[str, Any]) -> FileStore:
        """Read the weights from the source into the files of the new checkpoint.

        Args:
            facts: everything that decides the result, as JSON types. An interrupted run is resumed only if its facts
                were the same.

        Raises:
            CheckpointError: if an interrupted run had other facts (the difference is named), or its files are damaged.
        """
        processes, place = self._processes, self._place
        with writing(place, self._out):
            journal: Results | None = None
            if processes.is_first:
                # Nothing is written before the facts are compared: a refused run must not touch the other's state.
                revision = getattr(self.model.config, "_commit_hash", None)
                source = {**source_state(self._source), "revision": revision}
                journal = Journal(place.kept / JOURNAL, {"source": source, **facts, "versions": versions()})
                resumes = bool(finished_units(journal))
                if not resumes:
                    empty(place.new, place.kept / OWN_FORM)
                self._mapped = MappedModel(self.model, place.new, place.kept / OWN_FORM, existing=resumes)
                empty(place.new, keep=self._mapped.files.names)
            known = Results(processes.first_does(lambda: journal.results if journal is not None else {}))
            if self._mapped is None:
                self._mapped = MappedModel(self.model, place.new, place.kept / OWN_FORM, existing=True, is_copy=True)
            folder = place.kept if self._offload == "disk" else None
            self._store = FileStore(
                self._mapped,
                known if journal is None else journal,
                self._keep,
                processes,
                self._device,
                folder,
                partial(writing, place, self._out),
            )
            try:
                finished = self._store.finished_parameters
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{place.kept / JOURNAL}: is damaged: add --restart") from error
            if processes.is_first:
                all_but_weights(self.model, self.tokenizer, place, self._out)
                self._mapped.fill(except_for=finished)
            else:
                self._store.adopt(finished)
            processes.wait()
        return self._store

    def publish(
        self,
        report: dict[str, Any],
        *,
        packed: bool = False,
        quantize: Quantization | None = None,
        stored: StoredBits | None = None,
    ) -> SparsifyReport | None:
        """Complete the checkpoint and rename it to its final name.

        Args:
            report: as for :func:`~ace_triton.inputs.checkpoint.save`. The units that an interrupted run had finished
                are added.
            packed: pack the pruned weights, and publish a packed checkpoint instead of the dense one. The model's
                layers are replaced.
            quantize: how the weights were quantized, for ``packed``; None if they were not.
            stored: bits of the weights that stay dense, for ``packed``; None to keep their type.

        Returns:
            What was packed, in the first process; None for a dense checkpoint.

        Raises:
            CheckpointError: if the checkpoint cannot be written. The same run resumes.
            ArgumentError: if no layer can be packed.
        """
        assert self._store is not None, "start() comes first"
        packing = None
        if self._processes.is_first:
            report = {**report, "streamed": {"resumed_units": list(self._store.resumed)}}
            with writing(self._place, self._out):
                if packed:
                    packing = self._complete_packed(report, (stored or StoredBits()).packing(quantize))
                else:
                    self._complete(report)
        self._processes.wait()
        return packing

    def _complete(self, report: dict[str, Any]) -> None:
        assert self._mapped is not None
        self._mapped.write_converted()
        write_report(self._place.new, report)
        publish(self._place, self._out, overwrite=self._overwrite)

    def _complete_packed(self, report: dict[str, Any], bits: dict[str, Any]) -> SparsifyReport:
        """Pack the dense weights of the work folder into a folder beside them. They stay until that is published."""
        layers, folder = self._place.kept / PACKED_LAYERS, self._place.kept / PACKED
        for path in (layers, folder):
            shutil.rmtree(path, ignore_errors=True)  # Left by a run that was interrupted while it packed.
            path.mkdir()
        weights = MappedWeights(self.model, layers)
        packing = pack_layers(self.model, weights, **bits, pruned_to=pattern_in(report))
        with checkpoint.refusals(self._out):
            report = {**report, **packing_facts(packing)}
            write_packed_files(self.model, self.tokenizer, weights, folder, report)
        publish(self._place, self._out, overwrite=self._overwrite, fresh=folder)
        return packing

    def _keep(self) -> None:
        self._place.resumable = True


@contextmanager
def streamed(
    source: str,
    out: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    offload: Offload = "memory",
    task: str | None = TEXT_GENERATION,
) -> Iterator[StreamedModel]:
    """Open a model whose weights stay in the files of a new checkpoint.

    All processes of a run map the same files, so they must have one file system with shared memory: one machine.

    Args:
        source, dtype, trust_remote_code, task: as for :func:`~ace_triton.inputs.checkpoint.load`.
        out: folder for the new checkpoint; it is reserved until the context ends.
        device: where blocks run and are pruned, one at a time.
        overwrite: as for :func:`~ace_triton.inputs.output_folder.check_out`.
        restart: throw away the state of an interrupted run.
        offload: where the hidden states of the calibration set are kept; "disk" is the disk of ``out``.

    Raises:
        ArgumentError: if ``offload`` is unknown, or the processes are on several hosts.
        CheckpointError: if the model cannot be loaded or streamed, or ``out`` cannot be written.
    """
    check_offload(offload)
    where = torch.device(check_device(device))
    processes = Processes.now()
    if not are_on_one_machine():
        raise ArgumentError(
            "a streamed run needs all its processes on one machine, because they map the same files: use one host, or "
            "--no-stream if each host can hold the model"
        )
    with ExitStack() as running:
        if processes.is_first:
            place = running.enter_context(reserved(out, overwrite=overwrite, resumable=True, restart=restart))
            place.keep()
        else:
            place = Reservation.of(out)
        processes.wait()
        with writing(place, out):
            converted = place.kept / f"converted-{processes.rank}"
            model, tokenizer = checkpoint.load(
                source, dtype=dtype, trust_remote_code=trust_remote_code, offload_folder=converted, task=task
            )
        yield StreamedModel(model, tokenizer, place, source, out, overwrite, processes, where, offload)


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    calibration: torch.Tensor | CalibrationSet | None,
    recipe: Recipe | str = DEFAULT_PRESET,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    packed: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    offload: Offload = "memory",
    progress: Progress | None = None,
) -> ModelReport:
    """Prune a checkpoint into another one, with one block of the model in memory at a time.

    The weights are copied to the new checkpoint first, and pruned there block by block. The result has the same bytes
    as pruning in memory and saving. If the run is interrupted in any way, the same call resumes it at the block it was
    in, and the result still has the same bytes.

    Args:
        source: a folder or hub name that transformers loads, or a GGUF file.
        out: folder for the pruned model.
        calibration: as for :func:`~ace_triton.prune_blocks.prune_model`.
        recipe: a :class:`~ace_triton.recipe.Recipe`, or the name of a preset or of a method.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        device: where blocks run and are pruned, one at a time, and what is outside the blocks lies.
        batch_size: sequences in one forward; None for as many as make about 2,048 tokens, or
            16,384 on a GPU.
        trust_remote_code: run Python code that comes with the checkpoint.
        packed: write a packed checkpoint (:func:`~ace_triton.packed.saving.save_packed`); for n:m only.
        overwrite: replace ``out`` if ace-triton wrote it.
        restart: throw away the state of an interrupted run.
        offload: where the hidden states of the calibration set are kept between blocks: in memory, or on the "disk" of
            ``out``. The result is the same.
        progress: as for :func:`~ace_triton.prune_blocks.prune_model`. A resumed run first calls it with the number of
            blocks that were pruned before.

    Raises:
        ArgumentError: if ``offload`` is unknown, or a model pruned so cannot be packed.
        CheckpointError: if the model cannot be loaded or streamed, ``out`` cannot be written, or an interrupted run
            did something else (the difference is named).
        AceError: as :func:`~ace_triton.prune_blocks.prune_model`. Blocks that were pruned before stay so, and the same
            call resumes the run.
    """
    whole = recipe_of(recipe, {})
    digests = calibration_digests(calibration, "prune_checkpoint")
    started = Moment.now()
    with streamed(
        str(source),
        Path(out),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        restart=restart,
        offload=offload,
    ) as stream:
        model = stream.model
        if packed:
            check_packed(whole, model.dtype)
        store = stream.start(
            {
                "recipe": whole.to_dict(),
                "calibration": digests,
                "batch_size": batch_size,
                "dtype": str(model.dtype),
            }
        )
        load = started.since()
        with store.open():
            report = prune_stored(model, calibration, whole, store, batch_size=batch_size, progress=progress)
        report = report.with_load(*load)
        facts = with_provenance(report.to_dict(), **source_facts(source, out))
        packing = stream.publish(facts, packed=packed, quantize=whole.quantize)
    if packing is not None and (dense := packing.skipped_of({layer.name for layer in report.layers})):
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        warnings.warn(f"{dense[0].name}{more}: pruned, but not packed: {dense[0].reason}", stacklevel=2)
    return report


def all_but_weights(model: Any, tokenizer: Any, place: Reservation, out: Path) -> None:
    """Write the configuration, the tokenizer and what else belongs to a checkpoint to its new folder."""
    with tempfile.TemporaryDirectory(dir=place.kept) as private, checkpoint.refusals(out):
        rest = Path(private) / "files"  # copytree copies the mode of its folder, and a temporary one is private.
        model.save_pretrained(rest, state_dict={})
        tokenizer.save_pretrained(rest)
        weights = shutil.ignore_patterns("model*.safetensors", "model*.index.json")
        shutil.copytree(rest, place.new, ignore=weights, dirs_exist_ok=True)


def source_state(source: str) -> dict[str, Any]:
    """Which files a model is loaded from; a hub name alone for a model of the hub.

    Each file has a size, a time of change and a digest of samples, because tools can restore both others.
    """
    found = ModelSource.find(source)
    if found.path is None:
        return {"name": found.name}
    paths = [found.path] if found.is_gguf else [path for path in sorted(found.path.iterdir()) if path.is_file()]
    states = {path.name: (path.stat(), sampled_digest(path)) for path in paths}
    return {"files": {name: [state.st_size, state.st_mtime_ns, digest] for name, (state, digest) in states.items()}}


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's first :data:`FIRST_BYTES`, where the header of a weight file is, and of pages after them."""
    size, found = path.stat().st_size, hashlib.sha256()
    step = max(PAGE, (size - FIRST_BYTES) // SAMPLED_PAGES)
    with path.open("rb") as file:
        found.update(file.read(FIRST_BYTES))
        for start in range(FIRST_BYTES, size, step):
            file.seek(start)
            found.update(file.read(PAGE))
    return found.hexdigest()


def empty(*folders: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in these folders, except for files of some names."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def calibration_digests(calibration: Any, caller: str) -> list[str | None]:
    """Digests of the token ids and of the mask of a calibration text, by which a resumed run knows it.

    Raises:
        ArgumentError: if it has no token ids; the message names the function that was called.
    """
    ids = calibration if calibration is None else getattr(calibration, "ids", calibration)
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.is_meta):
        raise ArgumentError(
            f"{caller} takes token ids, int64 [n_sequences, length], or an object with such ids; got a "
            f"{type(calibration).__name__}"
        )
    mask = None if ids is calibration else getattr(calibration, "mask", None)
    return [None if tensor is None else _digest(tensor) for tensor in (ids, mask)]


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    values = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + values).hexdigest()
