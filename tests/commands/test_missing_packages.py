"""A command whose packages are missing says in one line which extra installs them."""

import sys

import pytest


@pytest.mark.parametrize(
    ("extra", "package", "words"),
    [
        ("serve", "starlette", ["serve", "MODEL"]),
        ("serve", "uvicorn", ["serve", "MODEL"]),
        ("onnx", "onnxscript", ["export", "MODEL", "OUT", "--to", "onnx"]),
        ("openvino", "openvino", ["export", "MODEL", "OUT", "--to", "openvino"]),
        ("gguf", "gguf", ["export", "MODEL", "OUT", "--to", "gguf"]),
        ("lm-eval", "lm_eval", ["evaluate", "MODEL", "--tasks", "arc_easy"]),
    ],
)
def test_the_extra_is_named(command, tiny_checkpoint, tmp_path, monkeypatch, extra, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out"
    places = {"MODEL": str(tiny_checkpoint), "OUT": str(out)}
    code, printed, errors = command(*(places.get(word, word) for word in words))
    assert code == 1
    assert errors.startswith("error: ")
    assert package in errors
    assert errors.endswith(f"pip install 'ace-triton[{extra}]'\n")
    assert errors.count("\n") == 1
    assert not printed
    assert not out.exists()
