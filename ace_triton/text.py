"""Text to calibrate on and to evaluate: files, datasets, and what every Python brings along."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

PYDOC_SPLITS = ("calibration", "evaluation")


class TextError(ValueError):
    """Text that cannot be read, with what can."""


def read_documents(source: str | Path, *, most: int | None = None) -> list[str]:
    """The documents of a source.

    Args:
        source: a text file (one document), a ``.jsonl`` file (one document a line, under "text"), either
            of them also as ``.gz``; ``pydoc:calibration`` or ``pydoc:evaluation``, two halves of Python's
            own English reference topics; or the name of a dataset, ``name[:config[:split]]``, whose
            "text" column is read.
        most: stop after so many documents.

    Raises:
        TextError: no such source, or no text in it.
    """
    name = str(source)
    path = Path(name)
    if name.startswith("pydoc:"):
        documents = _pydoc(name.removeprefix("pydoc:"))
    elif path.is_file():
        documents = _from_file(path)
    elif path.exists():
        raise TextError(f"{name} is a folder: name a text or .jsonl file in it")
    elif path.suffix in {".txt", ".jsonl", ".gz", ".md"} or name.startswith((".", "/")):
        raise TextError(f"{name}: no such file")
    else:
        documents = _from_dataset(name, most)
    documents = documents[:most]
    if not any(document.strip() for document in documents):
        raise TextError(f"{name}: holds no text")
    return documents


def wikitext_rows(text: str) -> list[str]:
    """The lines of a raw WikiText file as the rows of its dataset: a line with its end, or "" for a blank one."""
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def _pydoc(split: str) -> list[str]:
    if split not in PYDOC_SPLITS:
        raise TextError(f"pydoc:{split}: use {' or '.join('pydoc:' + s for s in PYDOC_SPLITS)}")
    topics = importlib.import_module("pydoc_data.topics").topics
    start = PYDOC_SPLITS.index(split)
    distinct = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    return distinct[start::2]


def _from_file(path: Path) -> list[str]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise TextError(f'{path}, line {number}: wanted {{"text": "..."}}')
        documents.append(record["text"])
    return documents


def _from_dataset(name: str, most: int | None) -> list[str]:
    from datasets import load_dataset

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=most is not None)
        rows = rows.take(most) if most is not None else rows
        return [row["text"] for row in rows]
    except KeyError:
        raise TextError(f'{name}: the dataset has no "text" column') from None
    except Exception as error:
        raise TextError(
            f"{name}: neither a file here nor a dataset that loads ({type(error).__name__}: {error}); "
            "give a text or .jsonl file, or a dataset as name[:config[:split]]"
        ) from error
