import pytest
import torch

from ace_triton.errors import TextError
from ace_triton.inputs.calibration import Calibration, crop, load_calibration, pieces, token_stream


def test_documents_end_with_the_end_of_text(tokenizer):
    stream = token_stream(["ab", "c"], tokenizer)
    end = tokenizer.eos_token_id
    assert stream.tolist() == [*tokenizer("ab")["input_ids"], end, *tokenizer("c")["input_ids"], end]


def test_pieces_have_every_token_once():
    stream = torch.arange(1000)
    cut = pieces(stream, 2000, 16, seed=3)
    assert cut.shape == (62, 16)
    assert len(cut.unique()) == cut.numel()
    assert torch.equal(cut, cut[:, :1] + torch.arange(16))
    assert torch.equal(cut, pieces(stream, 2000, 16, seed=3))
    assert not torch.equal(cut, pieces(stream, 2000, 16, seed=4))
    assert pieces(stream, 5, 16, seed=3).tolist() == cut[:5].tolist()
    assert torch.equal(pieces(stream, 1, 1000, seed=0)[0], stream)
    with pytest.raises(TextError, match="one sequence needs 1001"):
        pieces(stream, 1, 1001, seed=0)


def test_crops_lie_in_the_text_and_follow_the_seed():
    stream = torch.arange(1000)
    crops = crop(stream, 50, 16, seed=3)
    assert crops.shape == (50, 16)
    assert torch.equal(crops, crops[:, :1] + torch.arange(16))
    assert torch.equal(crops, crop(stream, 50, 16, seed=3))
    assert not torch.equal(crops, crop(stream, 50, 16, seed=4))
    assert torch.equal(crop(stream, 1, 1000, seed=0)[0], stream)


def test_a_file_and_its_errors(tokenizer, some_text, tmp_path):
    calibration = load_calibration(str(some_text), tokenizer, samples=5, length=12)
    assert calibration.ids.shape == (5, 12)
    assert calibration.tokens == 60
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(TextError, match="has 6 tokens, one sequence needs 12"):
        load_calibration(str(tmp_path / "short.txt"), tokenizer, samples=5, length=12)
    with pytest.raises(TextError, match="at least 1 sequence"):
        load_calibration(str(some_text), tokenizer, samples=0, length=12)


def test_padding_is_not_counted():
    mask = torch.tensor([[True, False], [True, True]])
    assert Calibration(torch.zeros(2, 2, dtype=torch.int64), mask).tokens == 3


def test_the_model_writes_its_own(tokenizer, tiny_model):
    one = load_calibration("self", tokenizer, samples=40, length=9, seed=1, model=tiny_model)
    assert one.ids.shape == (40, 9)
    assert int(one.ids.max()) < 320
    again = load_calibration("self", tokenizer, samples=40, length=9, seed=1, model=tiny_model)
    assert torch.equal(one.ids, again.ids)
    with pytest.raises(TextError, match="model="):
        load_calibration("self", tokenizer, samples=2, length=9)
