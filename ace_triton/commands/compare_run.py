"""What ``ace-triton evaluate --dense`` does: compare a model with the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from ..errors import ArgumentError, TextError
from ..evaluate import windows_of
from ..formats.registry import load_model
from ..inputs import checkpoint
from ..inputs.beginnings import Beginning, Bos, text_ids
from ..inputs.companions import Companions
from ..inputs.model_inputs import InputReport, Reads, Sources, model_inputs, sources_of
from ..inputs.model_source import ModelSource
from ..inputs.model_task import FEATURE_EXTRACTION, TEXT_GENERATION, ModelTask, task_of
from ..inputs.report_file import read_json_object
from ..inputs.sentences import sentences_of
from ..inputs.text import read_documents, wikitext_rows
from ..progress import progress_bar, stage
from ..provenance import name_of, source_of
from . import report

BATCH_SIZE = 32
SHOWN = {
    "model": "model",
    "dense": "dense model",
    "task": "task",
    "text": "text",
    "length": "largest length, in tokens",
    "windows": "windows",
    "images": "images",
    "audio": "audio",
    "bos": "bos",
    "dtype": "dtype",
}
"""Facts that the table of a comparison shows, with their titles."""
POOLING_FILE = "1_Pooling/config.json"


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        agreement: how far the models agree.
        inputs: the inputs that were read; None for windows of a text.
        read: number of windows and their beginnings; empty for other inputs.
    """

    agreement: EmbeddingAgreement | PredictionAgreement
    inputs: InputReport | None
    read: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What to compare, and on what.

    Attributes:
        model: the pruned model, dense or packed.
        dense: the dense model; None for the one that the pruned model's report names.
        task: what both are loaded for, as found for the pruned model.
        text: name of the text, whose sentences are the inputs; the windows of a causal language model are cut from it.
        images, audio: folders of inputs, in place of text.
        samples: largest number of sentences, images or audio files.
        length: most tokens of a sentence; tokens of a window.
        windows: largest number of windows.
        bos: place of beginning-of-text tokens in windows.
        neighbors: number of nearest neighbors.
        wikitext: True if the text is a raw WikiText file.
        loading: dtype, device and trust_remote_code of both models.
    """

    model: str
    dense: str | None
    task: str
    text: str
    images: Path | None
    audio: Path | None
    samples: int
    length: int
    windows: int | None
    bos: Bos
    neighbors: int
    wikitext: bool
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

    def run(self, progress: Progress) -> Compared:
        """Load both models and compare them.

        Raises:
            AceError: if a model cannot be loaded, or the inputs do not fit.
        """
        source, read = self.dense_source(), {}
        trusted = bool(self.loading["trust_remote_code"])
        task = task_of(source, self.task, trust_remote_code=trusted)
        of_windows = task.name == TEXT_GENERATION and self.images is None and self.audio is None
        sources = None if of_windows else self._sources(task)
        documents = self._documents() if of_windows else []
        with stage(progress, "load the models"):
            dense, tokenizer = load_model(source, task=task.name, **self.loading)
            pruned, _ = load_model(self.model, task=task.name, **self.loading)
        if of_windows:
            beginning = Beginning.of(tokenizer, self.bos)
            ids = windows_of(
                text_ids("\n\n".join(documents), tokenizer, beginning), self.length, beginning, self.windows
            )
            batches, made = [{"input_ids": window[None]} for window in ids], None
            read = {"windows": len(ids), "bos": str(beginning)}
        else:
            assert sources is not None
            companions = Companions(ModelSource.find(source), trusted)
            batches, made = model_inputs(dense, companions, Reads.of(dense.forward, task.name), sources)
        bar = progress_bar(progress, "compare", "batches")
        if task.name != FEATURE_EXTRACTION:
            return Compared(prediction_agreement(dense, pruned, batches, progress=bar), made, read)
        pooling = pooling_of(ModelSource.find(source).path)
        whole = 2 * len(batches)
        of_dense = embeddings(dense, batches, pooling=pooling, progress=_share_of(bar, 0, whole))
        of_pruned = embeddings(pruned, batches, pooling=pooling, progress=_share_of(bar, len(batches), whole))
        agreement = embedding_agreement(of_dense, of_pruned, neighbors=self.neighbors, pooling=pooling)
        return Compared(agreement, made, read)

    def facts(self, compared: Compared) -> dict[str, Any]:
        """What the numbers depend on, as JSON types: models, inputs, and how the models were loaded."""
        made, media = compared.inputs, self.images or self.audio
        facts: dict[str, Any] = {"model": name_of(self.model), "dense": name_of(self.dense_source()), "task": self.task}
        if media is not None:
            facts["images" if self.images else "audio"] = name_of(media)
        if made is None or made.documents:
            facts |= {"text": name_of(self.text), "wikitext": self.wikitext}
        if made is None or made.tokens:
            facts["length"] = self.length
        return {
            **facts,
            **compared.read,
            "dtype": str(self.loading["dtype"]).removeprefix("torch."),
            "device": str(torch.device(self.loading["device"])),
        }

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

    def _documents(self) -> list[str]:
        documents = read_documents(self.text)
        return wikitext_rows("".join(documents)) if self.wikitext else documents

    def _sentences(self) -> list[str]:
        """The sentences of the text, the shortest first, so that batches hold little padding."""
        found = sentences_of(self._documents(), self.samples)
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


def agreement_table(result: EmbeddingAgreement | PredictionAgreement, facts: Mapping[str, Any]) -> Table:
    """One agreement, with what it depends on by name."""
    table = report.facts_table()
    if isinstance(result, EmbeddingAgreement):
        table.add_row("inputs", f"{result.inputs:,}")
        table.add_row("mean cosine to the dense embeddings", f"{result.cosine:.4f}")
        table.add_row("smallest cosine", f"{result.least_cosine:.4f}")
        table.add_row(f"recall at {result.neighbors} of the dense neighbors", f"{result.recall:.3f}")
        if result.pooling is not None:
            table.add_row("pooling", result.pooling)
    else:
        table.add_row("predictions", f"{result.predictions:,}")
        table.add_row("same choice as the dense model", f"{result.top1:.2%}")
        table.add_row("divergence from the dense model", f"{result.divergence:.4f} nats")
    for name, value in facts.items():
        if name in SHOWN:
            table.add_row(SHOWN[name], str(value))
    return table
