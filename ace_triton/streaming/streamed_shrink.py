"""Make a smaller dense model of a checkpoint while only the block in work is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..decoders.calibration_forms import Calibration
from ..decoders.device_blocks import DeviceBlocks
from ..decoders.kept_tensors import Offload, check_offload
from ..errors import ArgumentError
from ..inputs import checkpoint
from ..inputs.output_folder import Reservation, publish, reserved, write_report, writing
from ..provenance import history_with, source_facts, versions, with_provenance
from ..structures.choice import Choice
from ..structures.compensation import Repair, Stored
from ..structures.report import ShrinkReport
from ..structures.run import Progress, Run
from ..structures.settings import ShrinkSettings, settings_of
from ..structures.smaller import bare, kept_tensors, values_in
from .journal import Journal
from .kept_choice import CHOICE, RANKING, KeptChoice
from .loaded_copies import LoadedCopies
from .mapped_model import MappedModel
from .streamed_evaluate import OpenCheckpoint
from .streamed_prune import JOURNAL, OWN_FORM, all_but_weights, calibration_digests, empty, source_state

DENSE = "dense"


@dataclass
class StreamedShrink:
    """A dense model whose weights stay in its files, and the files of the smaller model, from :func:`shrinking`.

    Attributes:
        model: the dense model. It has its weights while it runs.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any
    _weights: LoadedCopies
    _place: Reservation
    _source: str
    _out: Path
    _overwrite: bool
    _journal: Journal | None = None
    _mapped: MappedModel | None = None
    _resumed: list[str] = field(default_factory=list)

    def start(self, facts: Mapping[str, Any]) -> int:
        """Open the journal.

        Args:
            facts: everything that decides the result, as JSON types. An interrupted run is resumed only if its facts
                were the same.

        Returns:
            number of steps that an interrupted run had finished.

        Raises:
            CheckpointError: if an interrupted run had other facts, or its state is damaged.
        """
        revision = getattr(self.model.config, "_commit_hash", None)
        source = {**source_state(self._source), "revision": revision}
        path = self._place.kept / JOURNAL
        self._journal = Journal(path, {"command": "shrink", "source": source, **facts, "versions": versions()})
        self._resumed = list(self._journal.results)
        return len(self._resumed)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result, as JSON types, that a resumed run does not compute again."""
        assert self._journal is not None, "start() comes first"
        if name not in self._journal.results:
            self._journal.add(name, compute())
            self._place.resumable |= name in (RANKING, CHOICE)
        return self._journal.results[name]

    @property
    def dense(self) -> OpenCheckpoint:
        """The dense model, for the measurement of its perplexity."""
        return OpenCheckpoint(self.model, self.tokenizer, self._weights, None)

    @property
    def folder(self) -> Path:
        """The folder with the smaller model before it is published."""
        return self._place.new

    def run(
        self, calibration: Calibration | None, settings: ShrinkSettings, progress: Progress | None = None
    ) -> ShrinkReport:
        """Write the smaller model's files, all but the report.

        Args:
            calibration, settings, progress: as for :func:`~ace_triton.structures.shrink.shrink_model`.

        Raises:
            ArgumentError: as there, or if gradients are needed and blocks cannot run one at a time.
        """
        try:
            return self._run(calibration, settings, progress)
        except ArgumentError:
            self._place.resumable = False  # The same run would fail again.
            raise

    def _run(
        self, calibration: Calibration | None, settings: ShrinkSettings, progress: Progress | None
    ) -> ShrinkReport:
        with writing(self._place, self._out):
            run = Run(self.model, calibration, settings, progress, weights=self._weights)
            choice = KeptChoice(self.once, self._place.kept).choice(run)
            self._mapped = mapped = self._files(bare(self.model, choice.changes))
            on_cpu = dict.fromkeys(mapped.model.parameters(), torch.device("cpu"))
            with run.stage("write the blocks") as step:
                self._write_blocks(run, choice, step)
            with run.stage("check"), DeviceBlocks(mapped.model, on_cpu, mapped.drop).placed():
                self.once("checked", lambda: self._checked(run, choice))
            errors: list[tuple[float, float]] = []
            if settings.chosen_update != "none" and choice.kept_columns:
                with run.stage("update") as step, torch.no_grad():
                    errors = self._update(run, choice, step)
            mapped.write_converted()
            all_but_weights(mapped.model, self.tokenizer, self._place, self._out)
        return run.report(choice, mapped.model, errors)

    def dry_run(
        self, calibration: Calibration | None, settings: ShrinkSettings, progress: Progress | None = None
    ) -> ShrinkReport:
        """What :meth:`run` would remove, with estimates; nothing is written."""
        _, report = Run(self.model, calibration, settings, progress, weights=self._weights).result(dry_run=True)
        return report

    def publish(self, report: dict[str, Any]) -> None:
        """Write the report and rename the checkpoint to its final name.

        Raises:
            CheckpointError: if the checkpoint cannot be written. The same run resumes.
        """
        with writing(self._place, self._out):
            write_report(self._place.new, {**report, "streamed": {"resumed_units": self._resumed}})
            publish(self._place, self._out, overwrite=self._overwrite)

    def _files(self, small: nn.Module) -> MappedModel:
        """The smaller model in the files of the new checkpoint."""
        assert self._journal is not None
        existing = "files" in self._journal.results
        own_form = self._place.kept / OWN_FORM
        if not existing:
            empty(self._place.new, own_form)
        mapped = MappedModel(small, self._place.new, own_form, existing=existing)
        if existing:
            mapped.read_buffers()
        self.once("files", lambda: True)
        return mapped

    def _checked(self, run: Run, choice: Choice) -> bool:
        assert self._mapped is not None
        run.check(self._mapped.model, choice)
        return True

    def _write_blocks(self, run: Run, choice: Choice, step: Callable[..., None]) -> None:
        """Write what is left of each block, and what is outside the blocks, as it is in the dense model."""
        blocks, shapes = run.tower.blocks, run.shapes(choice)

        def write(part: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[], bool]:
            def writing_part() -> bool:
                with self._weights.loaded(part):
                    left = kept_tensors(tensors, choice.structures, blocks, choice.all_kept)
                    biases = [n for n in shapes if part is not self.model and n.startswith(f"{names[part]}.")]
                    zeros = {
                        n: torch.zeros(shapes[n].shape, dtype=shapes[n].dtype, device="cpu")
                        for n in biases
                        if n not in left
                    }
                    self._write({**left, **({} if choice.blocks is not None else zeros)})
                return True

            return writing_part

        names = {block.module: block.name for block in blocks}
        inside = tuple(f"{block.name}." for block in blocks)
        with self._weights.loaded(self.model):
            outside = {n: t for n, t in self.model.state_dict().items() if not n.startswith(inside)}
            self.once("outside", write(self.model, outside))
        for index, block in enumerate(blocks):
            if choice.blocks is None or index in choice.blocks:
                with self._weights.loaded(block.module):
                    self.once(f"block {index}", write(block.module, values_in(self.model, block)))
            step(index + 1, len(blocks))

    def _update(self, run: Run, choice: Choice, step: Callable[..., None]) -> list[tuple[float, float]]:
        """Write the repaired layers; returns their errors before and after."""
        assert self._journal is not None
        assert self._mapped is not None
        journal, mapped, blocks = self._journal, self._mapped, run.tower.blocks

        def stored(index: int) -> Stored | None:
            if f"update {index}" not in journal.results:
                return None
            inside = [n for n in choice.kept_columns if n.startswith(f"{blocks[index].name}.")]
            names = [f"{n}.weight" for n in inside] + [f"{n}.bias" for n in inside if n in choice.with_bias]
            return {name: mapped.in_files(name) for name in names}

        def solved(index: int, repaired: Mapping[str, Repair]) -> None:
            dense = values_in(self.model, blocks[index])
            biases = {
                f"{name}.bias": dense.get(f"{name}.bias", torch.zeros_like(repair.bias))
                for name, repair in repaired.items()
                if repair.bias is not None
            }
            self._write(run.repaired_tensors(choice, repaired, biases))
            self.once(f"update {index}", lambda: {"errors": [[r.lost, r.left] for r in repaired.values()]})

        run.update(choice, solved, step, stored)
        records = [journal.results[f"update {index}"] for index in range(len(blocks))]
        return [(before, after) for record in records for before, after in record["errors"]]

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors of the smaller model, and wait until they are on disk."""
        assert self._mapped is not None
        buffers = dict(self._mapped.model.named_buffers())
        for name, tensor in tensors.items():
            if name in buffers:
                buffers[name].copy_(tensor)
        self._mapped.sync([name for name, tensor in tensors.items() if self._mapped.write(name, tensor)])


@contextmanager
def shrinking(
    source: str,
    out: Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    offload: Offload = "memory",
    keep: bool = True,
) -> Iterator[StreamedShrink]:
    """Open a model whose weights stay in its files, and reserve ``out`` for a smaller one.

    Args:
        source, out, dtype, trust_remote_code, overwrite, restart, offload: as for :func:`shrink_checkpoint`.
        keep: False for a dry run, which leaves ``out`` alone and has its temporary files elsewhere.

    Raises:
        ArgumentError: if ``offload`` is unknown.
        CheckpointError: if the model cannot be loaded or streamed, or ``out`` cannot be written.
    """
    check_offload(offload)
    if not keep:
        with tempfile.TemporaryDirectory(prefix="ace-triton-") as temporary:
            place = Reservation(Path(temporary), Path(temporary))
            place.keep()
            yield _opened(source, out, place, dtype, trust_remote_code, overwrite, offload)
        return
    with reserved(out, overwrite=overwrite, resumable=True, restart=restart) as place:
        place.keep()
        yield _opened(source, out, place, dtype, trust_remote_code, overwrite, offload)


def _opened(
    source: str,
    out: Path,
    place: Reservation,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    overwrite: bool,
    offload: Offload,
) -> StreamedShrink:
    with writing(place, out):
        folder = place.kept / DENSE
        folder.mkdir(exist_ok=True)
        model, tokenizer = checkpoint.load(
            source, dtype=dtype, trust_remote_code=trust_remote_code, offload_folder=folder / "converted"
        )
        weights = LoadedCopies(model, folder, folder if offload == "disk" else None)
    return StreamedShrink(model, tokenizer, weights, place, source, out, overwrite)


def shrink_checkpoint(
    source: str | Path,
    out: str | Path,
    calibration: Calibration | None = None,
    *,
    ratio: float = 0.2,
    method: str = "saap",
    settings: ShrinkSettings | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    offload: Offload = "memory",
    progress: Progress | None = None,
    **options: Any,
) -> ShrinkReport:
    """Make a smaller dense model of a checkpoint, with one block of the model in memory at a time.

    The weights are read from the source, and the smaller model's are written to the new checkpoint block by block. The
    result has the same bytes as :func:`~ace_triton.structures.shrink.shrink_model` and saving. If the run is
    interrupted in any way, the same call resumes it, and the result still has the same bytes. It runs on the CPU.

    Args:
        source: a folder or hub name that transformers loads, or a GGUF file.
        out: folder for the smaller model.
        calibration: token ids, as for ``shrink_model``. None is allowed for method "magnitude" without an update.
        ratio: least share of the blocks' parameters to remove.
        method: as for ``shrink_model``. Methods with gradients keep the hidden states between all blocks.
        settings: all settings at once, instead of ratio, method and options.
        dtype: dtype of the weights; "auto" keeps the checkpoint's.
        trust_remote_code: run Python code that comes with the checkpoint.
        overwrite: replace ``out`` if ace-triton wrote it.
        restart: throw away the state of an interrupted run.
        offload: where the hidden states of the calibration set are kept between blocks: in memory, or on the "disk" of
            ``out``. The result is the same.
        progress: called with the name of a stage, and the number of steps done and of all steps.
        options: other fields of :class:`~ace_triton.structures.settings.ShrinkSettings`.

    Raises:
        RecipeError: if a setting is invalid.
        ArgumentError: as ``shrink_model``, or if gradients are needed and blocks cannot run one at a time.
        CheckpointError: if the model cannot be loaded or streamed, ``out`` cannot be written, or an interrupted run did
            something else (the difference is named).
    """
    chosen = settings_of(settings, ratio, method, options)
    digests = calibration_digests(calibration, "shrink_checkpoint")
    with shrinking(
        str(source),
        Path(out),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        restart=restart,
        offload=offload,
    ) as stream:
        stream.start({"settings": chosen.to_dict(), "calibration": digests, "dtype": str(stream.model.dtype)})
        report = stream.run(calibration, chosen, progress)
        earlier = checkpoint.read_report(source)
        facts = with_provenance(
            {"shrink": report.to_dict()},
            **source_facts(source, out),
            dtype=str(stream.model.dtype).removeprefix("torch."),
            device="cpu",
            history=history_with(earlier, "shrink", **report.step()),
        )
        stream.publish(facts)
    return report
