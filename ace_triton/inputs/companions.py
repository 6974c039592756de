"""The files beside a model's weights: its tokenizer, its processors, and what other libraries keep there.

They are copied as they are, so that a pruned model runs with the files that the dense one has.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .model_card import CARD_FILE
from .model_source import ModelSource, reason
from .report_file import MANIFEST_FILE, REPORT_FILE

MODULES_FILE = "modules.json"
"""Names the folders of a sentence-transformers model."""

CHAT_TEMPLATES = "additional_chat_templates"

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ckpt", ".npz"}
NOT_COPIED = {"config.json", "generation_config.json", CARD_FILE, REPORT_FILE, MANIFEST_FILE}
HUB_IGNORED = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]


@dataclass(frozen=True)
class Companions:
    """What a model needs beside its weights. It takes the place of the tokenizer where a model is saved.

    Attributes:
        source: where the model is.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    source: ModelSource
    trust_remote_code: bool = False

    @property
    def _options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": self.source.offline}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; CheckpointError if it cannot be loaded."""
        return self._loaded("AutoTokenizer", "tokenizer")

    @cached_property
    def processor(self) -> Any:
        """The processor of several kinds of inputs, or what transformers loads in its place."""
        return self._loaded("AutoProcessor", "processor")

    @cached_property
    def image_processor(self) -> Any:
        """The image processor; CheckpointError if it cannot be loaded."""
        return self._loaded("AutoImageProcessor", "image processor")

    @cached_property
    def feature_extractor(self) -> Any:
        """The feature extractor of audio; CheckpointError if it cannot be loaded."""
        return self._loaded("AutoFeatureExtractor", "feature extractor")

    def _loaded(self, auto_class: str, what: str) -> Any:
        import transformers

        where = str(self.source.path or self.source.name)
        try:
            return getattr(transformers, auto_class).from_pretrained(where, **self._options)
        except Exception as error:
            raise CheckpointError(
                f"{self.source.name}: its {what} cannot be loaded ({reason(error)}): are all its files there?"
            ) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files into a folder; files that are there already stay."""
        place = self.source.path or self._from_hub()
        for path in sorted(place.iterdir()):
            if path.is_file() and is_companion(path.name) and not (Path(folder) / path.name).exists():
                shutil.copyfile(path, Path(folder) / path.name)
        for name in _folders(place):
            if not (Path(folder) / name).exists():
                shutil.copytree(place / name, Path(folder) / name, copy_function=shutil.copyfile)

    def _from_hub(self) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(self.source.name, local_files_only=self.source.offline, ignore_patterns=HUB_IGNORED)
        )


def is_companion(name: str) -> bool:
    """True if a file of this name is copied: it holds no weights of the model, and is not written anew."""
    if name.startswith(".") or name in NOT_COPIED or name.endswith(".index.json"):
        return False
    return Path(name).suffix.lower() not in WEIGHT_SUFFIXES


def _folders(place: Path) -> list[str]:
    """Names of the subfolders that belong to the model: those of sentence-transformers' modules, and chat templates."""
    names = [CHAT_TEMPLATES]
    try:
        modules = json.loads((place / MODULES_FILE).read_text())
    except (OSError, ValueError):
        modules = []
    for module in modules if isinstance(modules, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path and ".." not in PurePosixPath(path).parts and not path.startswith("/"):
            names.append(path)
    return [name for name in dict.fromkeys(names) if (place / name).is_dir()]
