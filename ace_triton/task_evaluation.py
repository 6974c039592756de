"""Tasks of lm-evaluation-harness on a model that is in memory: dense, pruned or packed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ArgumentError, TextError


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task, metric: their names in lm-evaluation-harness, the metric with its filter if it has one.
        value: the score.
        error: its standard error, or None.
        samples: number of questions, or None for a group of tasks.
        shots: number of examples before each question, or None for a group of tasks.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None
    shots: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def check_tasks_installed() -> None:
    """Raise ArgumentError if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ArgumentError("--tasks needs lm_eval: pip install 'ace-triton[lm-eval]'")


def known_tasks(names: Sequence[str], folder: str | Path | None) -> Any:
    """lm-evaluation-harness's manager of tasks, with those of a folder.

    Args:
        names: names of tasks or groups of tasks.
        folder: a folder with the YAML files of further tasks, or None.

    Raises:
        ArgumentError: if a task is unknown or the folder does not exist.
    """
    if folder is not None and not Path(folder).is_dir():
        what = "is a file" if Path(folder).exists() else "no such folder"
        raise ArgumentError(f"{folder}: {what}; name the folder with the YAML files of your tasks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ArgumentError(
            f"unknown task {', '.join(unknown)}: 'lm-eval ls tasks' lists all; give the folder of your own with "
            "--tasks-folder"
        )
    return manager


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> list[TaskScore]:
    """Score a model on tasks.

    Args:
        model: from transformers; layers may be packed.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of tasks.
        manager: from :func:`known_tasks`.
        shots: number of examples before each question; None for the task's own.
        limit: number of questions of each task, from the start; None for all.
        batch_size: number of sequences in one call of the model.

    Raises:
        TextError: if the data of a task cannot be loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(
                model=runner,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "out of memory" in str(error):
                raise
            raise TextError(f"the tasks {', '.join(tasks)} cannot be evaluated: {error}") from error
    return [score for task, metrics in found["results"].items() for score in _scores(task, metrics, found)]


def _scores(task: str, metrics: dict[str, Any], found: dict[str, Any]) -> list[TaskScore]:
    samples = found.get("n-samples", {}).get(task, {}).get("effective")
    shots = found.get("n-shot", {}).get(task)
    scores = []
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if name.endswith("_stderr") or not isinstance(value, (int, float)) or name in ("alias", "sample_len"):
            continue
        error = metrics.get(f"{name}_stderr,{filtered}")
        label = name if filtered in ("", "none") else f"{name} ({filtered})"
        scores.append(TaskScore(task, label, float(value), error if isinstance(error, float) else None, samples, shots))
    return scores
