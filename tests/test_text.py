import gzip
import json

import pytest

from ace_triton.text import TextError, read_documents, wikitext_rows


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


def test_python_s_own_topics_fall_in_two_halves():
    one, other = (read_documents(f"pydoc:{half}") for half in ("calibration", "evaluation"))
    assert not set(one) & set(other)
    assert sum(map(len, one)) > 100_000
    assert sum(map(len, other)) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "holds no text"),
        ("latin.txt", "Äpfel".encode("latin-1"), "UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2: not JSON"),
        ("b.jsonl", b'{"content": "x"}\n', "line 1: wanted"),
        ("c.txt.gz", b"not gzip", "cannot be read"),
    ],
)
def test_bad_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_documents(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(TextError, match="no such file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(TextError, match="is a folder"):
        read_documents(tmp_path)
    with pytest.raises(TextError, match="pydoc:evaluation"):
        read_documents("pydoc:all")


def test_a_dataset_that_does_not_load(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TextError, match="neither a file here nor a dataset"):
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


def test_wikitext_rows_are_those_of_the_dataset():
    text = " \n = Title = \n \n Some words . \n"
    assert wikitext_rows(text) == ["", " = Title = \n", "", " Some words . \n"]
