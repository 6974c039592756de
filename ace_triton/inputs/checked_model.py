"""Check that a configuration and tensors make one model, and say in one line why a model cannot be loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..structures.uneven import SHAPES, shapes_in
from .model_source import open_safetensors, reason, safetensors_files
from .model_task import FEATURE_EXTRACTION, TEXT_GENERATION, ModelTask, other_kind
from .report_file import listing


def check_config(source: str | Path, config: Any, tensors: set[str] | None, trusted: bool) -> None:
    """Raise CheckpointError if a configuration is not of a causal language model, or has more layers than tensors.

    Args:
        source: name of the checkpoint, for the message.
        config: a configuration of transformers.
        tensors: names of the tensors in the checkpoint's files, if known.
        trusted: True if the class of the model may come with the checkpoint.
    """
    own_code = trusted and "auto_map" in config.to_dict()
    if (other := other_kind(config, trusted=own_code)) is not None:
        raise CheckpointError(f"{source}: is {other}, not a causal language model")
    check_depth(source, config, tensors)


def check_depth(source: str | Path, config: Any, tensors: set[str] | None) -> None:
    """Raise CheckpointError if a configuration has more layers than the checkpoint has tensors."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if tensors is not None and isinstance(layers, int) and layers > len(tensors):
        raise CheckpointError(
            f"{source}: config.json asks for {layers:,} layers, but the checkpoint holds only {len(tensors):,} tensors"
        )


def check_widths(config: Any, folder: Path | None) -> None:
    """Raise CheckpointError if the shapes in a configuration are not those of the tensors in the files.

    Args:
        config: a configuration of transformers.
        folder: the folder with the files; None if it is unknown. Only safetensors files are checked.
    """
    shapes = shapes_in(config)
    for path in safetensors_files(folder) if shapes and folder is not None else ():
        with open_safetensors(path) as file:
            for name in sorted(shapes.keys() & set(file.keys())):
                if (stored := list(file.get_slice(name).get_shape())) != shapes[name]:
                    raise CheckpointError(
                        f"{path}: {name} is {stored}, but {SHAPES} in config.json says {shapes[name]}; a file belongs "
                        "to another model"
                    )


def _causal_class(config: Any) -> str | None:
    """Name of the causal language model class for a configuration; None if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return getattr(model_class, "__name__", None)


def checked_model(source: str, where: str | None, task: ModelTask, kind: Any = None, **options: Any) -> Any:
    """Load a model, and check that the files have exactly the model's tensors.

    Tied weights are not checked, nor are tensors that transformers declares ignorable. A model of another task than its
    checkpoint's may leave out the checkpoint's head, and a model for embeddings may lack the pooler, which it does not
    use and then has not.

    Args:
        source: name of the checkpoint, for messages.
        where: folder or hub name; None if the options have a state dict.
        task: how the checkpoint is loaded.
        kind: the model's class; None for the class that the task and the configuration give.
        options: those of ``from_pretrained``.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of another shape; the message names them.
    """
    loaded: Any = (kind or task.loader).from_pretrained(
        where, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = loaded
    mismatched = [f"{name} {tuple(given)} instead of {tuple(own)}" for name, given, own in info["mismatched_keys"]]
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if task.name == FEATURE_EXTRACTION:
        missing = _without_pooler(model, missing)
    if task.is_chosen:
        unexpected = []
    refuse_unfit(
        source,
        model,
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", mismatched),
    )
    return model


def _without_pooler(model: Any, missing: Iterable[str]) -> list[str]:
    """The missing tensors without those of a pooler, which is removed if the model runs without: it has random weights,
    and would be saved with them."""
    names = list(missing)
    others = [name for name in names if not name.startswith("pooler.")]
    if len(others) < len(names) and "add_pooling_layer" in signature(type(model).__init__).parameters:
        model.pooler = None
    return others


def refuse_unfit(source: str, model: Any, *found: tuple[str, Iterable[str]]) -> None:
    """Raise CheckpointError if tensors of a checkpoint do not fit a model.

    Args:
        source: name of the checkpoint.
        model: the model.
        found: what is wrong with which tensors.
    """
    wrong = "; ".join(f"{len(names)} {kind} ({listing(names)})" for kind, group in found if (names := sorted(group)))
    if not wrong:
        return
    own, saved_as = type(model).__name__, (model.config.architectures or [""])[0]
    if saved_as and saved_as != own:
        causal = own == _causal_class(model.config)
        kind = f"a causal language model ({own})" if causal else f"a {own}"
        what_next = (
            "" if causal else "; leave --task (task) out to load it as it was saved, or train it for the task first"
        )
        raise CheckpointError(f"{source}: was saved as a {saved_as}, not as {kind}: {wrong}{what_next}")
    raise CheckpointError(
        f"{source}: its tensors do not fit the {own} of its config.json: {wrong}; a file is missing, or belongs to "
        "another model"
    )


_LOADING_LOGS = (
    "transformers.modeling_utils",
    "transformers.distributed.tensor_parallel",  # Warns of every layer that stays in its file.
    "accelerate.big_modeling",
)


@contextmanager
def loading_reports() -> Iterator[list[str]]:
    """Collect the loading reports of the libraries in a list instead of the log, for use in our error messages."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().splitlines())

    loggers, keeper = [logging.getLogger(name) for name in _LOADING_LOGS], Keeper()
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(keeper)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield lines
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(keeper)
            logger.setLevel(level)
            logger.propagate = propagate


def loading_message(
    source: str | Path, error: Exception, reports: Sequence[str] = (), task: str | None = TEXT_GENERATION
) -> str:
    """One line that says why transformers could not load a model, from its error and its loading reports."""
    if "trust_remote_code" in str(error):
        return f"{source}: needs its own Python code; if you trust it, pass --trust-remote-code (trust_remote_code)"
    unconverted = [line.partition("|")[0].strip() for line in reports if "| CONVERSION |" in line]
    if unconverted:
        return (
            f"{source}: tensors that belong together do not fit each other: {listing(unconverted)}; copy or download "
            "the checkpoint again"
        )
    kind = " as a causal language model" if task == TEXT_GENERATION else ""
    return f"{source}: cannot be loaded{kind} ({reason(error)})"
