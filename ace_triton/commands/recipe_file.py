"""What ``prune --recipe FILE`` reads: a recipe, and if a prune command wrote the file, its calibration settings too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from ..errors import RecipeError
from ..inputs.beginnings import Bos
from ..inputs.calibration import read_calibration
from ..inputs.model_task import TASK_NAMES
from ..inputs.text import FILE_SUFFIXES
from ..packed.stored_bits import StoredBits
from ..provenance import name_of
from ..recipe import Recipe, read_recipe_file, recipe_in
from .options import DTYPES, LARGEST_SEED

MEDIA = ("images", "audio")
"""Settings that name folders."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Which calibration sequences a model is pruned with.

    Attributes:
        text: the source, as ``--calibration`` takes it.
        samples, length: number of sequences, and tokens of each.
        seed: random seed of the sequences.
        bos: place of beginning-of-text tokens.
        batch_size: sequences in one forward; None for the default.
        sha256: digest of the source's documents, and of the images or audio files; None if it is unknown or the model
            writes the text.
        images, audio: folders of images or audio files, for models that read them; None for text alone.
    """

    text: str = "allenai/c4:en"
    samples: int = 128
    length: int = 128
    seed: int = 0
    bos: Bos = "auto"
    batch_size: int | None = None
    sha256: str | None = None
    images: str | None = None
    audio: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a file or a folder is named without the folders above it, and left out if it is not given."""
        media = {name: getattr(self, name) for name in MEDIA}
        named = {name: name_of(folder) for name, folder in media.items() if folder is not None}
        return {**{k: v for k, v in asdict(self).items() if k not in media}, "text": name_of(self.text), **named}

    @classmethod
    def from_dict(cls, record: Any) -> CalibrationSettings:
        """The inverse of :meth:`to_dict`; RecipeError for an unknown entry or an invalid value."""
        known = [entry.name for entry in fields(cls)]
        if not isinstance(record, Mapping):
            raise RecipeError(f"calibration must be an object with the entries {', '.join(known)}; got {record!r}")
        if unknown := [name for name in record if name not in known]:
            raise RecipeError(f"calibration has no entry {unknown[0]!r}; its entries: {', '.join(known)}")
        settings = cls(**record)
        for name, least, most in (("samples", 1, None), ("length", 2, None), ("seed", 0, LARGEST_SEED)):
            _check_whole(name, getattr(settings, name), least, most)
        if settings.batch_size is not None:
            _check_whole("batch_size", settings.batch_size, 1, None)
        if settings.bos not in get_args(Bos):
            raise RecipeError(f"calibration: bos must be one of {', '.join(get_args(Bos))}; got {settings.bos!r}")
        for name in ("text", "sha256", "images", "audio"):
            value = getattr(settings, name)
            if not isinstance(value, str) and (name == "text" or value is not None):
                raise RecipeError(f"calibration: {name} must be text; got {value!r}")
        return settings


@dataclass(frozen=True)
class SavedRun:
    """The content of a recipe's file.

    Attributes:
        recipe: the recipe.
        calibration: how the sequences were chosen; None if the file does not say.
        dtype: what ``--dtype`` was; None if the file does not say.
        task: what ``--task`` was; None if the task was found.
        stored: bits of the weights that stay dense in a packed model; None if the file names none.
    """

    recipe: Recipe
    calibration: CalibrationSettings | None = None
    dtype: str | None = None
    task: str | None = None
    stored: StoredBits | None = None

    @classmethod
    def read(cls, path: Path) -> SavedRun:
        """From a JSON file; RecipeError if it cannot be read or is invalid."""
        content = read_recipe_file(path)
        recipe = recipe_in(content, path)
        if "recipe" not in content:
            return cls(recipe)
        dtype = content.get("dtype_option")
        if dtype is not None and dtype not in tuple(DTYPES):
            raise RecipeError(f"{path}: dtype_option must be one of {', '.join(DTYPES)}; got {dtype!r}")
        task = content.get("task_option")
        if task is not None and task not in TASK_NAMES:
            raise RecipeError(f"{path}: task_option must be one of {', '.join(TASK_NAMES)}; got {task!r}")
        return cls(recipe, saved_calibration(content, path), dtype, task, _stored_bits(content, path, recipe))


def _stored_bits(content: Mapping[str, Any], path: Path, recipe: Recipe) -> StoredBits | None:
    """The bits of a packed model in the content of a file; None if it has none, RecipeError if they are invalid."""
    if content.get("stored_bits") is None:
        return None
    try:
        stored = StoredBits.from_dict(content["stored_bits"])
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.quantize is not None and recipe.quantize.group != stored.group:
        raise RecipeError(
            f"{path}: quantize has group {recipe.quantize.group}, stored_bits group {stored.group}: a packed model has "
            "one group, so give both the same"
        )
    return stored


def digest_of(documents: Sequence[str]) -> str:
    """SHA-256 of a text's documents."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def saved_calibration(content: Mapping[str, Any], path: Path) -> CalibrationSettings | None:
    """The calibration settings in the content of a file; None if it has none, RecipeError if they are invalid."""
    if content.get("calibration") is None:
        return None
    try:
        settings = CalibrationSettings.from_dict(content["calibration"])
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    media = {name: getattr(settings, name) for name in MEDIA}
    places: dict[str, Any] = {
        name: _found(folder, path, Path.is_dir) for name, folder in media.items() if folder is not None
    }
    return replace(settings, text=_found(settings.text, path), **places)


def read_documents_of(settings: CalibrationSettings) -> tuple[CalibrationSettings, str | list[str]]:
    """The settings with the digest of their text, and its documents.

    Raises:
        TextError: if the text cannot be read.
        RecipeError: if the text is not the recorded one.
    """
    documents = read_calibration(settings.text)
    digest = None if isinstance(documents, str) else digest_of(documents)
    return with_digest(settings, digest), documents


def with_digest(settings: CalibrationSettings, digest: str | None) -> CalibrationSettings:
    """The settings with the digest of what they name; RecipeError if it is not the recorded one."""
    if settings.sha256 in (None, digest):
        return replace(settings, sha256=digest)
    media = [(name, folder) for name in MEDIA if (folder := getattr(settings, name)) is not None]
    for option, folder in media:
        raise RecipeError(
            f"{folder} does not hold the files that the recipe was used with (its content, or the text beside it, "
            f"differs): give the folder to use with --{option}"
        )
    raise RecipeError(
        f"{settings.text} is not the text that the recipe was used with (its content differs): give the text to use "
        "with --calibration"
    )


def _found(text: str, path: Path, exists: Callable[[Path], bool] = Path.is_file) -> str:
    """A text or folder that is named without folders: here, beside the recipe's file, or beside that file's folder."""
    beside = path.absolute().parent
    for place in (Path(text), beside / text, beside.parent / text):
        if exists(place):
            return str(place)
    return text


def is_missing_file(text: str) -> bool:
    """True if the name of a text means a file that is not there."""
    return Path(text).suffix.lower() in FILE_SUFFIXES and not Path(text).exists()


def _check_whole(name: str, value: Any, least: int, most: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"{least} or more" + ("" if most is None else f" and {most} or less")
        raise RecipeError(f"calibration: {name} must be a whole number, {bounds}; got {value!r}")
