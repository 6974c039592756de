"""Upload a packed checkpoint, as it was written, to a repository of the hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import PushToHubMixin

from ..errors import CheckpointError

HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""Options of ``save_pretrained(push_to_hub=True)`` that ``push_to_hub`` takes."""


def repository_of(folder: Path, options: Mapping[str, Any]) -> str:
    """The name of the repository: ``repo_id`` among the options, else the folder's name.

    Raises:
        CheckpointError: if it is not a valid name.
    """
    name = options.get("repo_id", folder.name)
    try:
        validate_repo_id("" if name is None else name)
    except HFValidationError as error:
        whose = f"repo_id {name!r}" if "repo_id" in options else f"the name of the folder {str(folder)!r}"
        raise CheckpointError(
            f"push_to_hub: {whose} cannot name a repository; nothing was written: give "
            "repo_id='name' or repo_id='owner/name'"
        ) from error
    return str(name)


class WrittenModel(PushToHubMixin):
    """Files of a folder that transformers uploads as a model.

    Args:
        folder: the folder.
        files: the names of the files to upload; the folder may contain others.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        """Copy the files. ``push_to_hub`` calls this."""
        for name in self._files:
            place = Path(save_directory) / name
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(self._folder / name, place)

    def upload(self, repository: str, tags: Sequence[str], options: Mapping[str, Any]) -> None:
        """Upload the files, in one commit.

        Args:
            repository: its name; it is created if it does not exist.
            tags: tags of the model card, besides those among the options.
            options: those of ``save_pretrained``, of which :data:`HUB_OPTIONS` apply.
        """
        given = {name: options[name] for name in HUB_OPTIONS if name in options}
        self.push_to_hub(repository, **{**given, "tags": [*tags, *_listed(given.get("tags"))]})


def _listed(tags: Any) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or ())
