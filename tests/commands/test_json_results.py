"""Where --json may write, and how."""

import json
import os
import stat
import threading

import pytest

from ace_triton.commands.report import check_json_target, write_json


def test_a_file_is_replaced_atomically_and_keeps_its_mode(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    path.chmod(0o600)
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_pipe_a_device_and_a_link_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", [1])
    reader.join()
    assert json.loads(read[0]) == [1]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    write_json(tmp_path / "link", [2])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text()) == [2]
    write_json("/dev/null", [3])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_json("/dev/full", [4])
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "ace_triton.json"])
def test_a_checkpoint_s_file_is_refused_at_once(command, tiny_checkpoint, tmp_path, name):
    path = tiny_checkpoint / name
    path.touch()
    before = path.read_bytes()
    words = ("--method", "magnitude", "--json", path)
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "out", *words)
    assert code == 1
    assert "has the name of a checkpoint's file" in errors
    assert path.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_what_holds_no_json_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex: exists and holds no JSON"):
        check_json_target(tmp_path / "thesis.tex")
    (tmp_path / "weights").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="holds no JSON"):
        write_json(tmp_path / "weights", {})
    with pytest.raises(ValueError, match="in a folder that exists"):
        check_json_target(tmp_path / "nosuch" / "result.json")
    (tmp_path / "empty").touch()
    write_json(tmp_path / "empty", [])
    assert json.loads((tmp_path / "empty").read_text()) == []
