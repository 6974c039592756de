"""Read text for calibration and evaluation: from files, from datasets, and from Python's own documentation."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from ..byte_sizes import shown_bytes
from ..errors import TextError

PYDOC_SPLITS = ("calibration", "evaluation")

MOST_BYTES = 2**27
"""Limit on the uncompressed text of one source: 128 MiB. It also limits what a small ``.gz`` may expand to."""

FILE_SUFFIXES = {".txt", ".jsonl", ".json", ".gz", ".md"}
"""A name with one of these suffixes means a file, not a dataset."""


class _TooMuchError(TextError):
    def __init__(self, source: str | Path) -> None:
        super().__init__(f"{source}: has more than {shown_bytes(MOST_BYTES)} of text; give a part of it")


def read_documents(source: str | Path, *, most: int | None = None) -> list[str]:
    """Read the documents of a source.

    Args:
        source: a text file (one document), a ``.jsonl`` file (JSON lines, each with the document under "text") or a
            ``.json`` file (a list of such records, or JSON lines), each also as ``.gz``. Or ``pydoc:calibration`` or
            ``pydoc:evaluation``, two halves of the English reference topics in Python's documentation. Or the name of
            a dataset, ``name[:config[:split]]``, whose "text" column is read.
        most: stop after this many documents, or before the document that exceeds MOST_BYTES. None reads all documents,
            and refuses a source with more than MOST_BYTES.

    Raises:
        TextError: if the source does not exist, or has no text, too much text, or content that is not text.
    """
    name = str(source)
    path = Path(name)
    check_text(name)
    if name.startswith("pydoc:"):
        documents = _pydoc(name.removeprefix("pydoc:"))[:most]
    elif path.is_file():
        documents = _from_file(path, most)
    else:
        documents = _from_dataset(name, most)
    if not any(document.strip() for document in documents):
        raise TextError(f"{name}: has no text; give a source with text in it")
    for number, document in enumerate(documents, 1):
        if has_lone_surrogate(document):
            raise TextError(
                f"{name}, document {number}: has a lone surrogate (\\ud800 to \\udfff without its pair), which is "
                "not valid Unicode text; remove the character"
            )
    return documents


def check_text(source: str) -> None:
    """Raise TextError if a source is known to be missing. Datasets are not looked up."""
    path = Path(source)
    if source.startswith("pydoc:"):
        split = source.removeprefix("pydoc:")
        if split not in PYDOC_SPLITS:
            raise TextError(f"pydoc:{split}: use {' or '.join('pydoc:' + s for s in PYDOC_SPLITS)}")
    elif path.is_dir():
        raise TextError(f"{source} is a folder: name a text, .jsonl or .json file in it")
    elif path.exists() and not path.is_file():
        raise TextError(f"{source} is not a regular file: save the text to a file first")
    elif not path.exists() and (path.suffix.lower() in FILE_SUFFIXES or source.startswith((".", "/"))):
        raise TextError(f"{source}: no such file")


def has_lone_surrogate(text: str) -> bool:
    """True if a text cannot be encoded as UTF-8. Tokenizers refuse such text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def wikitext_rows(text: str) -> list[str]:
    """Split a raw WikiText file into the rows of its dataset: each line with its line feed, and "" for a blank line."""
    *lines, last = text.split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines]
    return [*rows, last] if last.strip() else rows


def _pydoc(split: str) -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    start = PYDOC_SPLITS.index(split)
    distinct = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    return distinct[start::2]


def _from_file(path: Path, most: int | None) -> list[str]:
    name = path.name.lower()
    content = name.removesuffix(".gz")
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            if content.endswith(".jsonl"):
                return _taken(_json_lines(_lines(file, path), path), most)
            if content.endswith(".json"):
                return _taken(_json_records(file, path), most)
            return [_decoded(_all_of(file, path), path)]
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"{path}: cannot be read ({error})") from error


def _taken(documents: Iterable[str], most: int | None) -> list[str]:
    """The first ``most`` documents, fewer if the limit on bytes comes first; all documents if ``most`` is None."""
    if most is None:
        return list(documents)
    taken: list[str] = []
    try:
        for document in islice(documents, most):
            taken.append(document)
    except _TooMuchError:
        if not taken:
            raise
    return taken


def _all_of(file: BinaryIO | gzip.GzipFile, path: Path, start: bytes = b"") -> bytes:
    data = start + file.read(MOST_BYTES + 1 - len(start))
    if len(data) > MOST_BYTES:
        raise _TooMuchError(path)
    return data


def _lines(file: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    """Split a file at line feeds only, because JSON strings may contain the other line separators of Unicode."""
    left = MOST_BYTES
    while line := file.readline(left + 1):
        left -= len(line)
        if left < 0:
            raise _TooMuchError(path)
        yield line


def _decoded(data: bytes, where: str | Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{where}: cannot be read as UTF-8 text ({error})") from error


def _json_lines(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        text = _decoded(line, where)
        if text.strip():
            yield _document(_parsed(text, where), where)


def _json_records(file: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[str]:
    """Read a ``.json`` file: as JSON lines if its first line is a record, otherwise as one list of records."""
    lines = _lines(file, path)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    start = b"".join(head)
    try:
        is_lines = isinstance(json.loads(_decoded(start, path)), dict)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _json_lines(chain(head, lines), path)
        return
    content = _parsed(_decoded(_all_of(file, path, start), path), path)
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield _document(record, f"{path}, record {number}")


def _parsed(text: str, where: str | Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not JSON ({error})") from error


def _document(record: object, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TextError(f'{where}: must be a record {{"text": "..."}}')
    return record["text"]


def _from_dataset(name: str, most: int | None) -> list[str]:
    from datasets import load_dataset

    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=most is not None)
        rows = rows.take(most) if most is not None else rows
        return _taken(_rows(rows, name), most)
    except TextError:
        raise
    except Exception as error:
        raise TextError(
            f"{name}: not a file, and cannot be loaded as a dataset ({type(error).__name__}: {error}); "
            "give a text or .jsonl file, or a dataset as name[:config[:split]]"
        ) from error


def _rows(rows: Iterable[object], name: str) -> Iterator[str]:
    left = MOST_BYTES
    for number, row in enumerate(rows, 1):
        document = _document(row, f"{name}, row {number}")
        left -= len(document)
        if left < 0:
            raise _TooMuchError(name)
        yield document
