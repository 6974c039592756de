"""Which AutoModel class of transformers loads a checkpoint: found from its configuration, or named by a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .model_source import SMOLLM2, ModelSource, reason

TEXT_GENERATION = "text-generation"
FEATURE_EXTRACTION = "feature-extraction"

TASKS: dict[str, tuple[str, ...]] = {
    TEXT_GENERATION: ("AutoModelForCausalLM",),
    "image-text-to-text": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "multiple-choice": ("AutoModelForMultipleChoice",),
    "image-classification": ("AutoModelForImageClassification",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
    "object-detection": ("AutoModelForObjectDetection",),
    "image-segmentation": ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
    "depth-estimation": ("AutoModelForDepthEstimation",),
    "masked-image-modeling": ("AutoModelForMaskedImageModeling",),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
    "audio-classification": ("AutoModelForAudioClassification",),
    FEATURE_EXTRACTION: ("AutoModel",),
    "pretraining": ("AutoModelForPreTraining",),
}
"""AutoModel classes by the name of the task, as model hubs name it. The first class that fits an architecture loads it;
"pretraining" comes last, since its classes include many of the others."""

SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "lm": (TEXT_GENERATION,),
    "embedding": (FEATURE_EXTRACTION,),
    "classification": ("text-classification", "image-classification", "audio-classification"),
    "speech": ("automatic-speech-recognition",),
    "image-text": ("image-text-to-text", "zero-shot-image-classification"),
}
"""Short names of tasks. The first task that has a class for the configuration is meant."""

TASK_NAMES = (*TASKS, *SHORT_NAMES)


@dataclass(frozen=True)
class ModelTask:
    """How a checkpoint is loaded.

    Attributes:
        name: the task, one of :data:`TASKS`.
        auto_class: name of the AutoModel class.
        is_chosen: True if the user named the task; False if it was found.
        model_class: the class of the model; None if it is not known before the model is loaded.
    """

    name: str
    auto_class: str
    is_chosen: bool = False
    model_class: type | None = None

    @property
    def loader(self) -> Any:
        """The AutoModel class."""
        import transformers

        return getattr(transformers, self.auto_class)


CAUSAL = ModelTask(TEXT_GENERATION, "AutoModelForCausalLM")


def task_of(source: str | Path, task: str | None = None, *, trust_remote_code: bool = False) -> ModelTask:
    """The task of a checkpoint; its weights are not read.

    Args:
        source, trust_remote_code: as for :func:`~ace_triton.inputs.checkpoint.load`.
        task: one of :data:`TASK_NAMES`; None to find it.

    Raises:
        CheckpointError: if the checkpoint is not found, or no AutoModel class loads it so.
    """
    found = ModelSource.find(source)
    if found.is_gguf or str(source) == SMOLLM2:
        return find_task(str(source), None, task, trusted=trust_remote_code)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(found.path or found.name), trust_remote_code=trust_remote_code, local_files_only=found.offline
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{source}: needs its own Python code; if you trust it, pass --trust-remote-code (trust_remote_code)"
            ) from error
        raise CheckpointError(f"{source}: its config.json cannot be loaded ({reason(error)})") from error
    return find_task(str(source), config, task, trusted=trust_remote_code)


def find_task(source: str, config: Any, task: str | None, *, trusted: bool = False) -> ModelTask:
    """The task of a configuration.

    Args:
        source: name of the checkpoint, for the message.
        config: a configuration of transformers; None for a GGUF file, which is a causal language model.
        task: one of :data:`TASK_NAMES`; None to find it.
        trusted: True if the class of the model may come with the checkpoint.

    Raises:
        CheckpointError: if the task is unknown, or no AutoModel class loads the checkpoint so.
    """
    names = _tasks_named(task) if task is not None else tuple(TASKS)
    if config is None:
        if TEXT_GENERATION not in names:
            raise CheckpointError(f"{source}: is a GGUF file, which loads for the task {TEXT_GENERATION} alone")
        return CAUSAL
    own = getattr(config, "auto_map", None) or {}
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    for name in names:
        for auto_class in TASKS[name]:
            if trusted and auto_class in own:
                if task is not None or saved_as in ("", str(own[auto_class]).rpartition(".")[2]):
                    return ModelTask(name, auto_class, task is not None)
                continue
            known = _classes(auto_class, config)
            named = [model_class for model_class in known if model_class.__name__ == saved_as]
            if named or (task is not None and known):
                return ModelTask(name, auto_class, task is not None, (named or known)[0])
    if task is not None:
        able = [name for name, autos in TASKS.items() if any(_classes(auto, config) for auto in autos)]
        raise CheckpointError(
            f"{source}: transformers has no {config.model_type} model for the task {task!r}; it has "
            f"{', '.join(able) or 'none that ace-triton loads'}"
        )
    if not saved_as or _classes("AutoModelForCausalLM", config):
        return CAUSAL
    raise CheckpointError(
        f"{source}: was saved as a {saved_as}, which no AutoModel class of ace-triton's tasks loads: name the task "
        "with --task"
    )


def task_of_class(model_class: type, config: Any) -> ModelTask | None:
    """The first task whose AutoModel class makes models of this class; None if there is none."""
    for name, auto_classes in TASKS.items():
        for auto_class in auto_classes:
            if any(issubclass(model_class, known) for known in _classes(auto_class, config)):
                return ModelTask(name, auto_class, model_class=model_class)
    return None


def other_kind(config: Any, *, trusted: bool = False) -> str | None:
    """What a checkpoint is, as "a BertModel (feature-extraction)", if it surely is no causal language model.

    None if it is one, or if only its tensors can tell: the body of a decoder alone, whose head may be tied to its
    embeddings.

    Args:
        config: a configuration of transformers.
        trusted: True if the class of the model may come with the checkpoint.
    """
    try:
        task = find_task("", config, None, trusted=trusted)
    except CheckpointError:
        task = None
    if task is not None and task.name == TEXT_GENERATION:
        return None if _classes("AutoModelForCausalLM", config) or trusted else f"a {config.model_type} model"
    others = ("AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
    decodes = bool(_classes("AutoModelForCausalLM", config)) and not any(_classes(name, config) for name in others)
    if task is None or (task.name == FEATURE_EXTRACTION and decodes) or task.model_class is None:
        return None
    return f"a {task.model_class.__name__} ({task.name})"


def _tasks_named(task: str) -> tuple[str, ...]:
    if task in TASKS:
        return (task,)
    if task not in SHORT_NAMES:
        raise CheckpointError(f"unknown task {task!r}: use one of {', '.join(TASK_NAMES)}")
    return SHORT_NAMES[task]


def _classes(auto_class: str, config: Any) -> tuple[type, ...]:
    """The classes that an AutoModel class makes for a configuration; empty if there is none."""
    import transformers

    loader: Any = getattr(transformers, auto_class, None)
    found = None if loader is None else loader._model_mapping.get(type(config), None)
    return tuple(found) if isinstance(found, (tuple, list)) else () if found is None else (found,)
