"""Agreement of a pruned model with its dense model: embeddings, neighbors, predictions, and ``evaluate --dense``."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from ace_triton.agreement import embedding_agreement, embeddings, prediction_agreement
from ace_triton.errors import ArgumentError
from ace_triton.inputs.sentences import sentences_of
from tests.decoders import small_towers
from tests.inputs.small_checkpoints import KINDS, bert_tokenizer, save, write_images

LONG, SHORT = torch.tensor([[1, 6, 7, 8, 9, 2]]), torch.tensor([[1, 10, 11, 2]])


@pytest.fixture
def both():
    """Two sequences in a padded batch, and alone."""
    padded = torch.cat([LONG, torch.nn.functional.pad(SHORT, (0, 2))])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return [{"input_ids": padded, "attention_mask": mask}], [{"input_ids": LONG}, {"input_ids": SHORT}]


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_towers.bert().eval()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_do_not_see_padding(both, pooling):
    model = bert()
    padded, alone = (embeddings(model, batches, pooling=pooling) for batches in both)
    assert torch.allclose(padded, alone, atol=1e-5)
    hidden = model(SHORT).last_hidden_state[0]
    expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    assert torch.allclose(padded[1], expected / expected.norm(), atol=1e-5)


def test_agreement_is_that_of_a_plain_search(monkeypatch):
    monkeypatch.setattr("ace_triton.agreement.ROWS_AT_ONCE", 50)
    torch.manual_seed(0)
    dense = torch.randn(120, 8)
    pruned = dense + 0.4 * torch.randn(120, 8)
    result = embedding_agreement(dense, pruned, neighbors=3)

    def nearest(rows: torch.Tensor, index: int) -> set[int]:
        cosines = torch.nn.functional.cosine_similarity(rows[index][None], rows)
        return set([int(i) for i in cosines.argsort(descending=True) if i != index][:3])

    kept = sum(len(nearest(dense, i) & nearest(pruned, i)) for i in range(120))
    assert result.recall == pytest.approx(kept / 360)
    cosines = torch.nn.functional.cosine_similarity(dense, pruned)
    assert result.cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert result.least_cosine == pytest.approx(float(cosines.min()), abs=1e-6)
    same = embedding_agreement(dense, 3 * dense)
    assert (same.recall, round(same.cosine, 6)) == (1, 1)


def test_predictions_of_tokens_leave_padding_out(both):
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(**small_towers.TEXT, **small_towers.VOCABULARY, max_position_embeddings=32)
    dense, pruned = BertForMaskedLM(config).eval(), BertForMaskedLM(config).eval()
    padded, alone = (prediction_agreement(dense, pruned, batches) for batches in both)
    assert padded.predictions == alone.predictions == 10
    with torch.no_grad():
        one, other = (torch.cat([m(LONG).logits[0], m(SHORT).logits[0]]) for m in (dense, pruned))
    log_one, log_other = one.log_softmax(1), other.log_softmax(1)
    expected = torch.nn.functional.kl_div(log_other, log_one, log_target=True, reduction="batchmean")
    assert padded.divergence == pytest.approx(float(expected), rel=1e-4)
    assert padded.top1 == pytest.approx(float((one.argmax(1) == other.argmax(1)).float().mean()))
    same = prediction_agreement(dense, dense, both[0])
    assert same.top1 == 1
    assert math.isclose(same.divergence, 0, abs_tol=1e-6)


def test_mistakes_are_one_line(both):
    rows = torch.randn(5, 4)
    with pytest.raises(ArgumentError, match="5 inputs have no 10 neighbors"):
        embedding_agreement(rows, rows)
    with pytest.raises(ArgumentError, match="must have one shape"):
        embedding_agreement(rows, rows[:4], neighbors=2)
    with pytest.raises(ArgumentError, match="pooling 'max'"):
        embeddings(bert(), both[0], pooling="max")
    with pytest.raises(ArgumentError, match=r"holds no logits.*--task embedding"):
        prediction_agreement(bert(), bert(), both[0])


def test_sentences_are_distinct_and_not_too_short():
    text = "This is a sentence. Is this one too? No.\nA heading\nThis is a sentence. And yet another short one!"
    expected = ["This is a sentence.", "Is this one too?", "And yet another short one!"]
    assert sentences_of([text, text]) == expected
    assert sentences_of([text], 2) == expected[:2]


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "text.txt"
    letters = "abcdefghijkl"
    path.write_text("\n".join(f"{a}b c{b} d e{a}" for a in letters for b in letters[:3]))
    return path


def test_evaluate_compares_an_encoder_with_its_source(command, sentences, tmp_path):
    """The report of the pruned model says where its source is."""
    KINDS["bert"][0](tmp_path / "dense")
    words = ("--calibration", sentences, "--samples", 4, "--length", 16, "--method", "wanda")
    assert command("prune", tmp_path / "dense", tmp_path / "out", *words)[0] == 0
    code, out, errors = command("evaluate", tmp_path / "out", "--text", sentences, "--json", tmp_path / "a.json")
    assert code == 0, errors
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["inputs"]["inputs"]["sequences"], found["neighbors"], found["dense"]) == (36, 10, "dense")
    assert 0.5 < found["recall"] < 1
    assert 0.9 < found["cosine"] < 1
    assert "mean cosine to the dense embeddings" in out
    same = command("evaluate", tmp_path / "dense", "--dense", tmp_path / "dense", "--text", sentences)
    assert "1.000 " in same[1]
    rows = {"model": "dense", "dense model": "dense", "task": "feature-extraction", "text": "text.txt"}
    for title, value in {**rows, "largest length, in tokens": "32"}.items():
        assert re.search(rf"│ {title} +│ +{value} │", same[1]), title
    code, _, errors = command("evaluate", tmp_path / "dense", "--text", sentences)
    assert code == 1
    assert "does not say where the dense model is to compare it with: give --dense SRC" in errors


def test_evaluate_compares_classifiers_of_text_and_of_images(command, sentences, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**small_towers.TEXT, **small_towers.VOCABULARY, max_position_embeddings=32, num_labels=3)
    save(BertForSequenceClassification(config), tmp_path / "text", bert_tokenizer())
    KINDS["vit"][0](tmp_path / "vision")
    images = write_images(tmp_path / "pictures")
    for name, words, count in (("text", ("--text", sentences), 36), ("vision", ("--images", images), 6)):
        source, out, result = tmp_path / name, tmp_path / f"{name}-out", tmp_path / f"{name}.json"
        assert command("prune", source, out, "--method", "magnitude")[0] == 0
        code, _, errors = command("evaluate", out, "--dense", source, *words, "--json", result)
        assert code == 0, errors
        found = json.loads(result.read_text())
        assert found["predictions"] == count
        assert 0 < found["divergence"] < 1, name


def test_evaluate_compares_causal_models_on_windows(command, tiny_checkpoint, some_text, tmp_path):
    words = ("--text", some_text, "--length", 16, "--windows", 3, "--json", tmp_path / "a.json")
    code, _, errors = command("evaluate", tiny_checkpoint, "--dense", tiny_checkpoint, *words)
    assert code == 0, errors
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["predictions"], found["top1"]) == (48, 1)
    assert (found["text"], found["length"], found["windows"]) == (some_text.name, 16, 3)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("bert", ("--windows", 3, "--bos", "each"), "--windows and --bos have no effect on a comparison of embeddings"),
        ("bert", ("--offload", "disk"), "--offload has no effect on a comparison of embeddings on sentences: leave it"),
        ("bert", ("--shots", 2), "--shots needs --tasks"),
        ("bert", ("--stream",), "--stream measures a perplexity, not a comparison of embeddings on sentences"),
        ("masked bert", ("--neighbors", 3), "--neighbors has no effect on a comparison of predictions on sentences"),
        ("vit", ("--images", ".", "--text", "pydoc:evaluation", "--length", 8), "--text and --length have no effect"),
        ("llama", ("--samples", 3, "--batch-size", 2), "--samples and --batch-size have no effect on a perplexity"),
        ("llama", ("--dense", ".", "--samples", 3), "--samples has no effect on a comparison on windows of text"),
        ("llama", ("--tasks", "piqa", "--text", "a", "--length", 8), "--text and --length have no effect on --tasks"),
    ],
)
def test_evaluate_refuses_options_without_effect(kind, words, message, command, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint
    if kind != "llama":
        source = tmp_path / "dense"
        KINDS[kind][0](source)
    code, _, errors = command("evaluate", source, *words)
    assert code == 1
    assert message in errors, errors
    assert errors.count("error:") == 1


def test_a_packed_encoder_is_compared(command, sentences, tmp_path):
    torch.manual_seed(0)
    KINDS["bert"][0](tmp_path / "dense")
    assert command("prune", tmp_path / "dense", tmp_path / "out", "--method", "magnitude", "--packed")[0] == 0
    code, _, errors = command("evaluate", tmp_path / "out", "--dense", tmp_path / "dense", "--text", sentences)
    assert code == 0, errors
