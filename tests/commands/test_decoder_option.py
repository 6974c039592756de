"""--decoder chooses what decodes, and a line says which one did."""

import json

import pytest

from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE


@pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")
def test_generate_says_which_one_decoded(command, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    words = ("generate", tiny_checkpoint, "--prompt", "a fox", "--max-new-tokens", 5, "--json", tmp_path / "found.json")
    texts = set()
    for options, line, decoder in (
        ((), "decoded by the compiled step", "compiled"),
        (("--decoder", "transformers"), "decoded by transformers", "transformers"),
    ):
        code, out, errors = command(*words, *options)
        assert code == 0, errors
        assert line in errors
        assert json.loads((tmp_path / "found.json").read_text())["decoder"] == decoder
        texts.add(out)
    assert len(texts) == 1


def test_another_backend_is_named_and_transformers_decodes(command, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    words = ("generate", tiny_checkpoint, "--prompt", "a fox", "--max-new-tokens", 2)
    reason = "the backend is 'reference', not the compiled CPU library"
    code, _, errors = command(*words)
    assert code == 0, errors
    assert f"decoded by transformers, not by the compiled step: {reason}" in " ".join(errors.split())
    code, _, errors = command(*words, "--decoder", "compiled")
    assert code == 1
    assert reason in " ".join(errors.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("generate", "m", "--prompt", "a", "--decoder", "fast"),
            "must be one of auto, compiled, transformers; got 'fast'",
        ),
        (("generate", "m", "--prompt", "a", "--decoder", "compiled", "--compile"), "give only one of them"),
        (("generate", "m", "--prompt", "a", "--input-bits", "16"), "--input-bits must be 30 or 8; got 16"),
        (("serve", "m", "--input-bits", "4"), "--input-bits must be 30 or 8; got 4"),
        (("bench", "--input-bits", "0"), "--input-bits must be 30 or 8; got 0"),
    ],
)
def test_a_mistake_is_one_line(command, words, message):
    code, _, errors = command(*words)
    assert code == 1
    assert message in " ".join(errors.split())
