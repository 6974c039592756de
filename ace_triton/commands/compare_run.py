"""What ``ace-triton evaluate --dense`` does: compare a model with the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from ..agreement import (
    EmbeddingAgreement,
    Pooling,
    PredictionAgreement,
    embedding_agreement,
    embeddings,
    prediction_agreement,
)
from ..errors import ArgumentError, CheckpointError, TextError
from ..evaluate import windows_of
from ..formats.registry import format_of, load_model
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning, Bos, text_ids
from ..inputs.companions import Companions
from ..inputs.model_inputs import InputReport, Reads, Sources, model_inputs, sources_of
from ..inputs.model_source import ModelSource
from ..inputs.model_task import CAUSAL, FEATURE_EXTRACTION, TEXT_GENERATION, ModelTask, find_task, task_of
from ..inputs.report_file import read_json_object
from ..inputs.sentences import sentences_of
from ..inputs.text import read_documents
from ..progress import progress_bar, stage
from ..provenance import source_of
from . import report

BATCH_SIZE = 32
POOLING_FILE = "1_Pooling/config.json"


@dataclass(frozen=True)
class Comparison:
    """What to compare, and on what.

    Attributes:
        model: the pruned model, dense or packed.
        dense: the dense model; None for the one that the pruned model's report names.
        task: what both are loaded for; None to find it.
        text: name of the text, whose sentences are the inputs; the windows of a causal language model are cut from it.
        images, audio: folders of inputs, in place of text.
        samples: largest number of sentences, images or audio files.
        length: most tokens of a sentence; tokens of a window.
        windows: largest number of windows.
        bos: place of beginning-of-text tokens in windows.
        neighbors: number of nearest neighbors.
        loading: dtype, device and trust_remote_code of both models.
    """

    model: str
    dense: str | None
    task: str | None
    text: str
    images: Path | None
    audio: Path | None
    samples: int
    length: int
    windows: int | None
    bos: Bos
    neighbors: int
    loading: dict[str, Any]

    def dense_source(self) -> str:
        """The dense model; ArgumentError if none is named, and the report does not say where it is."""
        if self.dense is not None:
            return self.dense
        known = source_of(checkpoint.read_report(self.model) or {}, self.model)
        if known is None or not Path(known).exists():
            raise ArgumentError(
                f"{self.model} has no perplexity to measure, and does not say where the dense model is to compare it "
                "with: give --dense SRC"
            )
        return known

    def run(self, progress: Progress) -> tuple[EmbeddingAgreement | PredictionAgreement, InputReport | None]:
        """Load both models and compare them.

        Raises:
            AceError: if a model cannot be loaded, or the inputs do not fit.
        """
        source = self.dense_source()
        trusted = bool(self.loading["trust_remote_code"])
        task = task_of(source, self.task, trust_remote_code=trusted)
        of_windows = task.name == TEXT_GENERATION and self.images is None and self.audio is None
        sources = None if of_windows else self._sources(task)
        documents = read_documents(self.text) if of_windows else []
        with stage(progress, "load the models"):
            dense, tokenizer = load_model(source, task=task.name, **self.loading)
            pruned, _ = load_model(self.model, task=task.name, **self.loading)
        if of_windows:
            beginning = Beginning.of(tokenizer, self.bos)
            ids = windows_of(
                text_ids("\n\n".join(documents), tokenizer, beginning), self.length, beginning, self.windows
            )
            batches, made = [{"input_ids": window[None]} for window in ids], None
        else:
            assert sources is not None
            companions = Companions(ModelSource.find(source), trusted)
            batches, made = model_inputs(dense, companions, Reads.of(dense.forward, task.name), sources)
        bar = progress_bar(progress, "compare")
        if task.name != FEATURE_EXTRACTION:
            return prediction_agreement(dense, pruned, batches, progress=bar), made
        pooling = pooling_of(ModelSource.find(source).path)
        whole = 2 * len(batches)
        of_dense = embeddings(dense, batches, pooling=pooling, progress=_share_of(bar, 0, whole))
        of_pruned = embeddings(pruned, batches, pooling=pooling, progress=_share_of(bar, len(batches), whole))
        return embedding_agreement(of_dense, of_pruned, neighbors=self.neighbors, pooling=pooling), made

    def _sources(self, task: ModelTask) -> Sources:
        reads = (
            Reads(frozenset({"input_ids"}))
            if task.model_class is None
            else Reads.of(task.model_class.forward, task.name)  # type: ignore[attr-defined]
        )
        return sources_of(
            reads,
            task.auto_class if task.model_class is None else task.model_class.__name__,
            self._sentences,
            text=self.text,
            images=self.images,
            audio=self.audio,
            samples=self.samples,
            length=self.length,
            seed=None,
            batch_size=None if self.images or self.audio else BATCH_SIZE,
        )

    def _sentences(self) -> list[str]:
        """The sentences of the text, the shortest first, so that batches hold little padding."""
        found = sentences_of(read_documents(self.text), self.samples)
        if not found:
            raise TextError(f"{self.text}: has no sentences of 4 to 60 words; give prose")
        return sorted(found, key=len)


def _share_of(bar: Callable[[int, int], None], before: int, whole: int) -> Callable[[int, int], None]:
    return lambda done, _: bar(before + done, whole)


def pooling_of(folder: Path | None) -> Pooling:
    """How a sentence-transformers folder pools its hidden states; the mean if it does not say."""
    stated = None if folder is None else read_json_object(folder / POOLING_FILE)
    if stated is not None and stated.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if stated is not None and stated.get("pooling_mode_lasttoken") else "mean"


def found_task(model: str, task: str | None, *, trust_remote_code: bool) -> ModelTask:
    """What a model in any format is loaded for; a causal language model if its files do not say, so that loading says
    what is wrong with them."""
    if format_of(model).name == "dense":
        try:
            return task_of(model, task, trust_remote_code=trust_remote_code)
        except CheckpointError:
            if task is not None:
                raise
            return CAUSAL
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=True)
        return find_task(model, config, task, trusted=trust_remote_code)
    except (OSError, ValueError):
        return CAUSAL


def agreement_table(result: EmbeddingAgreement | PredictionAgreement) -> Table:
    """One agreement."""
    table = report.facts_table()
    if isinstance(result, EmbeddingAgreement):
        table.add_row("inputs", f"{result.inputs:,}")
        table.add_row("mean cosine to the dense embeddings", f"{result.cosine:.4f}")
        table.add_row("smallest cosine", f"{result.least_cosine:.4f}")
        table.add_row(f"recall at {result.neighbors} of the dense neighbors", f"{result.recall:.3f}")
        if result.pooling is not None:
            table.add_row("pooling", result.pooling)
        return table
    table.add_row("predictions", f"{result.predictions:,}")
    table.add_row("same choice as the dense model", f"{result.top1:.2%}")
    table.add_row("divergence from the dense model", f"{result.divergence:.4f} nats")
    return table


def device_facts(model: str, dense: str, loading: dict[str, Any]) -> dict[str, str]:
    """Names of both models and how they were loaded, as JSON types."""
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "dense": Path(dense).name if Path(dense).exists() else dense,
        "dtype": str(loading["dtype"]).removeprefix("torch."),
        "device": str(torch.device(loading["device"])),
    }
