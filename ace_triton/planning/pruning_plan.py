"""The plan of a pruning run: what it prunes and what it takes, without reading the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..available_memory import available_memory
from ..byte_sizes import shown_bytes
from ..decoders.account import Account
from ..decoders.batches import Batch, Inputs, check_positions, longest_sequence, trial_ids
from ..decoders.kept_tensors import Offload, check_offload
from ..decoders.plan import Excluded, Misfit, Skipped
from ..errors import ArgumentError, CheckpointError
from ..inputs.calibration import MOST_DOCUMENTS, SELF, read_calibration
from ..inputs.checkpoint import why_not_dequantized
from ..inputs.model_inputs import Reads
from ..inputs.model_source import check_device
from ..inputs.model_task import TEXT_GENERATION
from ..inputs.output_folder import check_out
from ..inputs.text import check_text
from ..packed.stored_bits import StoredBits
from ..presets import DEFAULT_PRESET, recipe_of
from ..process_memory import resident_bytes
from ..prune_blocks import rehearse
from ..recipe import Recipe
from ..streaming.fits import fits_in_memory
from .disk import Disk, disk_of
from .layers import PlannedModel, planned
from .memory import Calibrated, Memory, Need
from .probe import Estimate, estimate
from .skeleton import Skeleton, skeleton

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_DOCUMENT = 500
"""Assumed sizes of a text that is not tokenized, or not read, for a plan."""


@dataclass(frozen=True)
class PruningPlan:
    """What a pruning run would do and take, from :func:`plan_pruning`.

    Attributes:
        source: name of the model.
        recipe: how to prune.
        dtype: dtype of the weights in the run.
        blocks: number of blocks.
        towers: number of blocks by name of the tower, in the order in which towers run.
        layers: names of the layers that are pruned, in order.
        skipped: weights that stay dense although their names are selected, with reasons.
        excluded: matrices of the blocks that ``include`` and ``exclude`` rule out.
        account: number of parameters pruned, skipped and excluded.
        in_memory: CPU memory of a run that loads the whole model.
        streamed: CPU memory of a run whose weights stay in files.
        device: memory of a GPU that the whole model is loaded on.
        available_bytes: CPU memory that is available now.
        streams: True if the run would keep the weights in files.
        disk: disk space of the run.
        time: estimated time; None without a probe.
        unchecked: what only the run can tell.
        warnings: problems that are known before the run.
    """

    source: str
    recipe: Recipe
    dtype: str
    blocks: int
    towers: Mapping[str, int]
    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    excluded: tuple[Excluded, ...]
    account: Account
    in_memory: Memory
    streamed: Memory
    device: Memory
    available_bytes: int
    streams: bool
    disk: Disk
    time: Estimate | None
    unchecked: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def memory(self) -> Memory:
        """CPU memory of the run that would be chosen."""
        return self.streamed if self.streams else self.in_memory

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "dtype": self.dtype,
            "blocks": self.blocks,
            "towers": dict(self.towers),
            "layers": list(self.layers),
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "excluded": [asdict(excluded) for excluded in self.excluded],
            "account": self.account.to_dict(),
            "memory": {
                "in_memory": self.in_memory.to_dict(),
                "streamed": self.streamed.to_dict(),
                "device": self.device.to_dict(),
                "available_bytes": self.available_bytes,
            },
            "streams": self.streams,
            "disk": self.disk.to_dict(),
            "time": None if self.time is None else self.time.to_dict(),
            "unchecked": list(self.unchecked),
            "warnings": list(self.warnings),
        }


def plan_pruning(
    source: str | Path,
    recipe: Recipe | str = DEFAULT_PRESET,
    *,
    samples: int = 128,
    length: int = 128,
    batch_size: int | None = None,
    text: str | None = None,
    out: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    packed: bool = False,
    stored: StoredBits | None = None,
    overwrite: bool = False,
    stream: bool | None = None,
    offload: Offload = "memory",
    trust_remote_code: bool = False,
    probe: bool = False,
    task: str | None = TEXT_GENERATION,
    inputs: Inputs | None = None,
) -> PruningPlan:
    """Say what pruning a checkpoint would prune, and what memory, disk and time it would take.

    The model is built from its configuration; its weights are not read. A few tokens run through one block of each kind
    with zeros as weights. Sizes are estimates. They include what this process holds now.

    Args:
        source: as for :func:`~ace_triton.streaming.streamed_prune.prune_checkpoint`.
        recipe: a :class:`~ace_triton.recipe.Recipe`, or the name of a preset or of a method.
        samples: number of calibration sequences.
        length: tokens in each.
        batch_size: sequences in one forward; None for as many as make about 2,048 tokens, or
            16,384 on a GPU.
        text: name of the calibration text, as ``--calibration`` takes it, whose tokens and check are counted too; None
            if the sequences are given to :func:`~ace_triton.prune_blocks.prune_model`. A dataset is not read.
        out: folder for the output; None if none is known.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        device: device of the run; a run on a GPU is not streamed.
        packed: True if a packed checkpoint is written.
        stored: bits of the weights that stay dense in it; None to keep their type.
        overwrite: True if an existing ``out`` is replaced.
        stream: True to stream, False not to, None to decide by the available memory.
        offload: where the hidden states of the calibration set are kept.
        trust_remote_code: run Python code that comes with the checkpoint.
        probe: also estimate the time. Two blocks are read and pruned on a few tokens. Only for causal language models
            on text.
        task: what the model is loaded for, as for :func:`~ace_triton.inputs.checkpoint.load`.
        inputs: arguments of the model's forward, as its processor makes them from a first image, sound or text, each
            [n_inputs, ...]; None for token ids alone. The memory is estimated as if all inputs had their sizes.

    Raises:
        CheckpointError: if the model is not found, is not for the task, or cannot be built.
        AceError: if the recipe is invalid, no layer can be pruned, or a name pattern matches no layer.
    """
    whole = recipe_of(recipe, {})
    if samples < 1 or length < 2:
        raise ArgumentError(f"calibration needs at least 1 sequence of 2 tokens, got {samples} of {length}")
    check_offload(offload)
    where = check_device(device)
    on_gpu = where != "cpu"
    rehearse(whole)
    tokens, unread = (None, ()) if text is None or not whole.calibrated else _text_tokens(text)
    calibrated = Calibrated(samples, length, batch_size, tokens, offload == "disk") if whole.calibrated else None
    of_text_alone = task == TEXT_GENERATION and inputs is None
    if probe and not of_text_alone:
        raise ArgumentError("--probe estimates the time for causal language models on text alone: leave it out")
    built = skeleton(source, dtype=dtype, trust_remote_code=trust_remote_code, task=task)
    layers = planned(built.model, whole, _trial(built.model, inputs) if not of_text_alone else None)
    if calibrated is not None and layers.hidden is not None:
        calibrated = replace(calibrated, length=layers.hidden[0], width=layers.hidden[1], text_tokens=None)
    need = Need(
        built.model,
        layers,
        whole,
        calibrated,
        resident_bytes(),
        stored_bytes=built.stored_bytes or 0,
        converts=built.converts or built.resaved_bytes > 0,
        is_gguf=built.source.is_gguf,
        packed=packed,
        stored=stored,
    )
    in_memory = need.in_memory()
    streamed = need.streamed()
    may_stream = not on_gpu
    streams = stream if stream is not None else may_stream and not fits_in_memory(in_memory.peak)
    place = None if out is None else Path(out)
    disk = disk_of(built, layers, whole, place, packed=packed, streams=streams, stored=stored)
    available = available_memory()
    chosen = streamed if streams else in_memory
    warnings = [
        *_of_model(built, layers, calibrated if inputs is None else None),
        *_of_out(place, disk, overwrite),
        *_of_gpu(need.device(), where),
        *([] if on_gpu else _of_memory(chosen, available, streams=streams, may_stream=may_stream)),
    ]
    plan = layers.plan
    names = tuple(layer.name for unit in layers.units for layer in unit.layers if layer.is_pruned)
    account = plan.close()
    return PruningPlan(
        str(source),
        whole,
        str(built.model.dtype).removeprefix("torch."),
        layers.blocks,
        {tower.name: len(tower.blocks) for tower, _ in plan.towers},
        names,
        tuple(plan.skipped),
        tuple(plan.excluded),
        account,
        in_memory,
        streamed,
        need.device(),
        available,
        streams,
        disk,
        estimate(built, layers, whole, calibrated) if probe else None,
        (*layers.unchecked, *unread, *(["inputs that are larger than the first one"] if inputs is not None else [])),
        tuple(warnings),
    )


def _trial(model: Any, inputs: Inputs | None) -> Batch:
    """A batch of the inputs, or of the first token ids for a model of text.

    Raises:
        ArgumentError: if the model reads more than text, and no inputs are given.
    """
    if inputs is not None:
        return Batch({k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    ids = trial_ids(model)
    reads = Reads.of(model.forward, "")
    if not reads.text or reads.images or reads.audio:
        raise ArgumentError(
            f"a {type(model).__name__} reads more than text: give inputs=, a dict of tensors as its processor makes "
            "them from one image or sound"
        )
    return Batch({"input_ids": ids, **({"decoder_input_ids": ids} if reads.decoder_text else {})})


def _text_tokens(text: str) -> tuple[int, tuple[str, ...]]:
    """About how many tokens a calibration text has, and what is not known of it.

    Raises:
        TextError: if the text does not exist, or a file has no text.
    """
    if text == SELF:
        return 0, ()
    check_text(text)
    if text.startswith("pydoc:") or Path(text).is_file():
        return sum(map(len, read_calibration(text))) // CHARACTERS_PER_TOKEN, ()
    assumed = MOST_DOCUMENTS * TOKENS_PER_DOCUMENT
    return assumed, (f"the text {text}, which was not read; {MOST_DOCUMENTS:,} documents are assumed",)


def _of_model(built: Skeleton, layers: PlannedModel, calibrated: Calibrated | None) -> Iterator[str]:
    if (why := why_not_dequantized(built.source.name, built.quantization)) is not None:
        yield why
    unfit: dict[str, list[Skipped]] = {}
    for skipped in layers.plan.skipped:
        if isinstance(skipped.reason, Misfit):
            unfit.setdefault(skipped.reason, []).append(skipped)
    for reason, of_reason in unfit.items():
        yield f"the pattern does not fit {_first_of([skipped.name for skipped in of_reason])}: {reason}"
    if calibrated is not None:
        try:
            check_positions(longest_sequence(built.model), calibrated.length)
        except ArgumentError as error:
            yield str(error)


def _of_out(out: Path | None, disk: Disk, overwrite: bool) -> Iterator[str]:
    if out is None:
        return
    try:
        check_out(out, overwrite=overwrite)
    except CheckpointError as error:
        yield str(error)
    if disk.free_bytes is not None and disk.work_bytes > disk.free_bytes:
        work, free = shown_bytes(disk.work_bytes), shown_bytes(disk.free_bytes)
        yield f"{out} needs {work} of disk, but only {free} are free there"


def _of_memory(need: Memory, available: int, *, streams: bool, may_stream: bool) -> Iterator[str]:
    if need.peak > available:
        how = "streamed, the run" if streams else "the run"
        advice = "; add --stream to keep the weights in files" if may_stream and not streams else ""
        yield f"{how} needs {shown_bytes(need.peak)} of memory, but only {shown_bytes(available)} are available{advice}"


def _of_gpu(need: Memory, device: str) -> Iterator[str]:
    if device.startswith("cuda") and need.peak > (free := torch.cuda.mem_get_info(device)[0]):
        most = shown_bytes(need.peak)
        yield f"the run needs {most} on {device}, but only {shown_bytes(free)} are free there; use --device cpu"


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def weights_stay_in_files(needed: float, available: int) -> str:
    """The note that a run streams because it needs more bytes than are available."""
    return (
        f"the model does not fit in memory ({shown_bytes(needed)} of {shown_bytes(available)} available), so its "
        "weights stay in files (--stream)"
    )
