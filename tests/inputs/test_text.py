import gzip
import json
import random

import pytest

from ace_triton.errors import TextError
from ace_triton.inputs import text
from ace_triton.inputs.text import read_documents, wikitext_rows


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("drei Äpfel".encode()))
    lines = [json.dumps({"text": t}) for t in ("one", "two\nlines", "three")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read_documents(tmp_path / "a.txt.gz") == ["drei Äpfel"]
    assert read_documents(tmp_path / "a.jsonl") == ["one", "two\nlines", "three"]
    assert read_documents(tmp_path / "a.jsonl.gz", most=2) == ["one", "two\nlines"]


def test_json_lines_end_at_line_feeds_only(tmp_path):
    """JSON strings may contain the other line separators of Unicode."""
    documents = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = "\r\n".join(json.dumps({"text": document}, ensure_ascii=False) for document in documents)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    assert read_documents(tmp_path / "a.jsonl") == documents


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "A.Json.GZ", "a.jsonl.gz"])
def test_json_by_any_name_and_with_a_byte_order_mark(tmp_path, name):
    content = b"\xef\xbb\xbf" + b'{"text": "one", "url": "x"}\n\n{"text": "two"}'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert read_documents(tmp_path / name) == ["one", "two"]
    assert read_documents(tmp_path / name, most=1) == ["one"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_hold_one_list_or_one_record(tmp_path, indent):
    (tmp_path / "list.json").write_text("\n" + json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
    (tmp_path / "record.json").write_text(json.dumps({"text": "one", "id": 3}, indent=indent))
    assert read_documents(tmp_path / "list.json") == ["one", "two"]
    assert read_documents(tmp_path / "record.json") == ["one"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.TXT").write_bytes("\ufeffone".encode())
    assert read_documents(tmp_path / "a.TXT") == ["one"]


def test_reading_stops_where_enough_is_read(tmp_path):
    """Data after the last requested document is not decompressed: here it is damaged."""
    noise = random.Random(0).randbytes(300_000).hex()
    packed = gzip.compress(b"\n".join(json.dumps({"text": t}).encode() for t in ("one", "two", noise)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-100_000])
    assert read_documents(tmp_path / "a.jsonl.gz", most=2) == ["one", "two"]
    with pytest.raises(TextError, match="cannot be read"):
        read_documents(tmp_path / "a.jsonl.gz", most=3)


def test_what_a_small_file_unpacks_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_BYTES", 2**20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b" a" * 2**19))
    assert len(read_documents(tmp_path / "a.txt.gz")[0]) == 2**20
    lines = b'{"text": "' + b"a" * 2**18 + b'"}\n'
    for name, content in (
        ("b.txt.gz", b"a" * (2**20 + 1)),
        ("b.jsonl.gz", b'{"text": "' + b"a" * 2**20 + b'"}'),
        ("b.json.gz", b"[" + b" " * 2**20),
        ("c.jsonl.gz", 5 * lines),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(TextError, match=r"has more than 1\.0 MB of text; give a part of it"):
            read_documents(tmp_path / name)
    assert [len(document) for document in read_documents(tmp_path / "c.jsonl.gz", most=9)] == 3 * [2**18]


def test_python_s_own_topics_fall_in_two_halves():
    one, other = (read_documents(f"pydoc:{half}") for half in ("calibration", "evaluation"))
    assert not set(one) & set(other)
    assert sum(map(len, one)) > 100_000
    assert sum(map(len, other)) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "has no text"),
        ("latin.txt", "Äpfel".encode("latin-1"), "UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2: not JSON"),
        ("b.jsonl", b'{"content": "x"}\n', "line 1: must be a record"),
        ("c.txt.gz", b"not gzip", "cannot be read"),
        ("d.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-20], "cannot be read"),
        ("e.txt.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99, "cannot be read"),
        ("f.jsonl", b'{"text": "one"}\n{"text": "a\\ud800b"}', "document 2: has a lone surrogate"),
        ("g.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
        ("h.jsonl", b'{"text": "one"}\n\xff', "line 2: cannot be read as UTF-8"),
        ("i.json", b'["one", "two"]', "record 1: must be a record"),
        ("j.json", b'[{"text": "one"},', "not JSON"),
    ],
)
def test_bad_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_documents(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(TextError, match="no such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(TextError, match="no such file"):
        read_documents("NONE.JSONL")
    with pytest.raises(TextError, match="is a folder"):
        read_documents(tmp_path)
    with pytest.raises(TextError, match="is not a regular file"):
        read_documents("/dev/null")
    with pytest.raises(TextError, match="pydoc:evaluation"):
        read_documents("pydoc:all")


def test_a_dataset_that_does_not_load(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match="not a file, and cannot be loaded as a dataset"):
        read_documents("nobody/nothing", most=3)


def test_a_dataset_is_read_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split, streaming))
        return datasets.Dataset.from_dict({"text": ["one", "two", "three"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents("allenai/c4:en", most=2) == ["one", "two"]
    assert read_documents("Salesforce/wikitext:wikitext-2-raw-v1:test") == ["one", "two", "three"]
    assert asked == [("allenai/c4", "en", "train", True), ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["one", None]}))
    with pytest.raises(TextError, match="row 2: must be a record"):
        read_documents("allenai/c4:en")


def test_wikitext_rows_are_those_of_the_dataset():
    raw = " \n = Title = \n \n Some words . \n"
    assert wikitext_rows(raw) == ["", " = Title = \n", "", " Some words . \n"]
    assert wikitext_rows(raw + " The last line") == ["", " = Title = \n", "", " Some words . \n", " The last line"]
