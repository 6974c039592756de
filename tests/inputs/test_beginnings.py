"""Beginning-of-text tokens: their places in calibration, evaluation, recovery and a study, and the predicted tokens."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from ace_triton.errors import TextError
from ace_triton.evaluate import perplexity, windows_of
from ace_triton.inputs import checkpoint
from ace_triton.inputs.beginnings import Beginning, text_ids
from ace_triton.inputs.calibration import load_calibration, token_stream
from ace_triton.inputs.written_text import text_to_write
from ace_triton.recovery.text import WrittenBatches
from ace_triton.study.samples import Sampler
from ace_triton.study.workbench import Protocol, Workbench

BOS, END = 0, 1
EACH = Beginning("each", (BOS,))


@pytest.fixture
def beginning_tokenizer(tokenizer):
    """The tests' tokenizer, changed to put <s> before a text and </s> after it."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", END)]
    )
    assert changed("ab")["input_ids"] == [BOS, *tokenizer("ab")["input_ids"], END]
    return changed


@pytest.fixture
def beginning_checkpoint(tmp_path, tiny_model, beginning_tokenizer):
    folder = tmp_path / "beginning"
    tiny_model.save_pretrained(folder)
    beginning_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("bos", "beginning", "shown"),
    [
        ("auto", EACH, "each (0)"),
        ("each", EACH, "each (0)"),
        ("stream", Beginning("stream", (BOS,)), "stream (0)"),
        ("none", Beginning(), "none"),
    ],
)
def test_a_tokenizer_that_adds_a_beginning(beginning_tokenizer, tokenizer, bos, beginning, shown):
    assert Beginning.of(beginning_tokenizer, bos) == beginning
    assert str(beginning) == shown
    text = tokenizer("ab")["input_ids"]
    first = [BOS] if bos == "stream" else []
    assert text_ids("ab", beginning_tokenizer, beginning).tolist() == [*first, *text, END]


def test_a_tokenizer_that_adds_none(tokenizer):
    plain = tokenizer("ab")["input_ids"]
    for bos, beginning in (
        ("auto", Beginning()),
        ("none", Beginning()),
        ("stream", Beginning("stream")),
        ("each", EACH),
    ):
        assert Beginning.of(tokenizer, bos) == beginning
        assert text_ids("ab", tokenizer, beginning).tolist() == plain
    assert str(Beginning.of(tokenizer, "stream")) == "stream (the tokenizer adds none)"
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(TextError, match="has no beginning-of-text token; use 'none'"):
        Beginning.of(without, "each")
    with pytest.raises(TextError, match="bos 'both': use auto, each, stream, none"):
        Beginning.of(tokenizer, "both")


def test_several_tokens_may_begin_a_text(tokenizer):
    """A tokenizer with two beginning tokens, like GLM's."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", BOS), ("</s>", END)]
    )
    beginning = Beginning.of(changed)
    assert beginning == Beginning("each", (END, BOS))
    assert str(beginning) == "each (1, 0)"
    assert windows_of(torch.arange(10, 16), 4, beginning).tolist() == [[1, 0, 10, 11], [1, 0, 12, 13], [1, 0, 14, 15]]
    with pytest.raises(TextError, match="2 tokens has no room for text"):
        windows_of(torch.arange(10, 16), 2, beginning)


def log_likelihood(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token])


@pytest.mark.parametrize(
    ("beginning", "windows", "known"),
    [
        (EACH, [[0, 7, 8, 9], [0, 10, 11, 12]], 1),
        (Beginning("stream", (BOS,)), [[0, 7, 8, 9], [10, 11, 12, 13]], 1),
        (Beginning(), [[7, 8, 9, 10], [11, 12, 13, 14]], 1),
        (Beginning("each", (1, 0)), [[1, 0, 7, 8], [1, 0, 9, 10], [1, 0, 11, 12], [1, 0, 13, 14]], 2),
    ],
)
def test_perplexity_by_hand_never_predicts_a_beginning(tiny_model, beginning, windows, known):
    ids = beginning.before_stream(torch.arange(7, 15))
    result = perplexity(tiny_model, ids, length=4, beginning=beginning)
    losses = [-log_likelihood(tiny_model, w[:t], w[t]) for w in windows for t in range(known, 4)]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.tokens, result.bos) == (len(losses), str(beginning))


@pytest.mark.parametrize("apart", [False, True])
def test_every_calibration_sequence_begins(beginning_tokenizer, some_text, apart):
    stream = token_stream([some_text.read_text()], beginning_tokenizer)
    assert BOS not in stream
    cut = [tuple(stream[start : start + 11].tolist()) for start in range(len(stream) - 10)]
    calibration = load_calibration(str(some_text), beginning_tokenizer, samples=5, length=12, apart=apart)
    assert calibration.ids.shape == (5, 12)
    assert (calibration.ids[:, 0] == BOS).all()
    assert all(tuple(sequence.tolist()) in cut for sequence in calibration.ids[:, 1:])
    whole = load_calibration(
        str(some_text), beginning_tokenizer, samples=1, length=len(stream) + 1, apart=apart, bos="stream"
    )
    assert whole.ids[0].tolist() == [BOS, *stream.tolist()]
    plain = load_calibration(
        str(some_text), beginning_tokenizer, samples=1, length=len(stream), apart=apart, bos="none"
    )
    assert plain.ids[0].tolist() == stream.tolist()


def test_what_a_model_writes_begins_too(beginning_tokenizer, tiny_model):
    begun = load_calibration("self", beginning_tokenizer, samples=3, length=9, model=tiny_model).ids
    plain = load_calibration("self", beginning_tokenizer, samples=3, length=8, model=tiny_model, bos="none").ids
    assert (begun[:, 0] == BOS).all()
    assert torch.equal(begun[:, 1:], plain)  # which follows <s> as well, but does not hold it
    text = text_to_write(tiny_model, beginning_tokenizer, 9, EACH)
    assert (text.start, text.keep_start) == ((BOS,), True)
    batches = WrittenBatches(text, tiny_model, tokens_per_step=27, seed=0)
    assert (batches.of(0)[:, 0] == BOS).all()
    assert batches.of(0).shape == (3, 9)


def test_the_commands(command, beginning_checkpoint, some_text, tmp_path):
    told, pruned, out = tmp_path / "told.json", tmp_path / "pruned", tmp_path / "out"
    small = ("--calibration", some_text, "--samples", 4, "--length", 16)

    def run(*words) -> dict:
        code, shown, errors = command(*words, "--json", told)
        assert code == 0, errors
        assert json.loads(told.read_text())["perplexity" if words[0] == "evaluate" else "seconds"]
        return {"shown": shown, **json.loads(told.read_text())}

    pruning = run("prune", beginning_checkpoint, pruned, "--method", "wanda", *small)
    assert pruning["calibration_report"]["bos"] == "each (0)"
    assert "bos: each (0)" in pruning["shown"]
    recovery = run("recover", pruned, out, *small, "--steps", 1)
    assert recovery["bos"] == "each (0)"
    assert "bos: each (0)" in recovery["shown"]
    assert json.loads((out / checkpoint.REPORT_FILE).read_text())["recovery"]["bos"] == "each (0)"
    figures = {
        bos: run("evaluate", pruned, "--text", some_text, "--length", 16, "--bos", bos)
        for bos in ("auto", "each", "stream", "none")
    }
    assert [figure["bos"] for figure in figures.values()] == ["each (0)", "each (0)", "stream (0)", "none"]
    assert figures["auto"]["perplexity"] == figures["each"]["perplexity"]
    assert len({figure["perplexity"] for figure in figures.values()}) == 3
    assert command("evaluate", pruned, "--text", some_text, "--bos", "both")[0] == 2


def test_a_study_begins_its_windows_crops_and_prompts(beginning_checkpoint, tiny_checkpoint, some_text):
    def bench(folder, **words) -> Workbench:
        texts = {"calibration": str(some_text), "evaluation": str(some_text)}
        return Workbench(
            Protocol(str(folder), **texts, samples=4, windows=2, window_length=16, dtype=torch.float32, **words)
        )

    begun, plain = bench(beginning_checkpoint), bench(tiny_checkpoint)
    assert begun.setting.bos == "each (0)"
    assert bench(beginning_checkpoint, bos="none").setting.bos == "none"
    assert plain.setting.bos is None
    assert "bos" not in plain.setting.to_dict()
    assert (begun.calibration(12, 0)[:, 0] == BOS).all()
    assert not (plain.calibration(12, 0) == BOS).any()
    expected = perplexity(begun.model, begun.ids, length=16, windows=2, beginning=EACH).perplexity
    assert begun.perplexity() == expected
    seen = []
    begun.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs | dict(enumerate(args))), with_kwargs=True
    )
    Sampler(begun.model, begun.tokenizer, begun.ids, 16, 2, begun.beginning).dense()
    windows = [call[0] for call in seen if 0 in call]
    assert len(windows) == 2
    assert all(int(window[0, 0]) == BOS for window in windows)
    prompts = [
        call["input_ids"] for call in seen if call.get("input_ids") is not None and call["input_ids"].shape[1] > 1
    ]
    assert len(prompts) == 3
    assert all(int(prompt[0, 0]) == BOS for prompt in prompts)
