"""Which options of ``ace-triton evaluate`` have an effect on which kind of evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..errors import ArgumentError
from ..inputs.model_inputs import Reads
from ..inputs.model_task import FEATURE_EXTRACTION, TEXT_GENERATION, ModelTask


@dataclass(frozen=True)
class Kind:
    """A kind of evaluation.

    Attributes:
        words: what it measures, for messages.
        traits: what options may need: "tasks", "perplexity", "comparison", "windows" of a text, "text", "inputs" that
            are counted (sentences or files), "neighbors".
    """

    words: str
    traits: frozenset[str]


PERPLEXITY = Kind("a perplexity", frozenset({"perplexity", "windows", "text"}))
TASKS = Kind("--tasks", frozenset({"tasks"}))

NEEDS: dict[str, str] = {
    "text": "text",
    "dense": "comparison",
    "images": "comparison",
    "audio": "comparison",
    "samples": "inputs",
    "neighbors": "neighbors",
    "length": "text",
    "windows": "windows",
    "wikitext": "text",
    "bos": "windows",
    "offload": "perplexity",
    "tasks_folder": "tasks",
    "shots": "tasks",
    "limit": "tasks",
    "batch_size": "tasks",
}
"""The trait that an evaluation must have, by the option that has an effect only then."""


def kind_of(task: ModelTask, *, dense: bool, images: bool, audio: bool) -> Kind:
    """The kind of an evaluation without ``--tasks``.

    Args:
        task: what the model is loaded for.
        dense, images, audio: whether the options of these names are given.
    """
    media = "images" if images else "audio" if audio else None
    if task.name == TEXT_GENERATION and media is None:
        if not dense:
            return PERPLEXITY
        return Kind("a comparison on windows of text", frozenset({"comparison", "windows", "text"}))
    traits = {"comparison", "inputs"}
    if media is None or _reads_text(task):
        traits.add("text")
    if task.name == FEATURE_EXTRACTION:
        traits.add("neighbors")
    what = "embeddings" if task.name == FEATURE_EXTRACTION else "predictions"
    return Kind(f"a comparison of {what} on {media or 'sentences'}", frozenset(traits))


def check_effect(given: Collection[str], kind: Kind) -> None:
    """ArgumentError if an option that was given has no effect on an evaluation of this kind.

    Args:
        given: names of the parameters on the command line.
        kind: the kind of the evaluation.
    """
    idle = [name for name, trait in NEEDS.items() if name in given and trait not in kind.traits]
    if not idle:
        return
    options = [f"--{name.replace('_', '-')}" for name in idle]
    if all(NEEDS[name] == "tasks" for name in idle):
        verb = "need" if len(options) > 1 else "needs"
        raise ArgumentError(f"{_listed(options)} {verb} --tasks")
    verb, them = ("have", "them") if len(options) > 1 else ("has", "it")
    raise ArgumentError(f"{_listed(options)} {verb} no effect on {kind.words}: leave {them} out")


def _listed(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} and {options[-1]}"


def _reads_text(task: ModelTask) -> bool:
    """Whether a model reads text beside images or audio; True if its class is not known before it is loaded."""
    if task.model_class is None:
        return True
    reads = Reads.of(task.model_class.forward, task.name)  # type: ignore[attr-defined]
    return reads.text or reads.decoder_text
