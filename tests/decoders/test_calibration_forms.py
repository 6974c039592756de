"""Sources of calibration batches that do not end are refused before they fill the memory."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ace_triton.decoders import calibration_forms
from ace_triton.decoders.calibration_forms import batches_of
from ace_triton.errors import ArgumentError


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.zeros(8, dtype=torch.int64, device="cpu"))


class LongerThanItSays:
    def __len__(self):
        return 3

    def __iter__(self):
        return endless()


def endless():
    return itertools.repeat({"input_ids": torch.zeros(1, 8, dtype=torch.int64, device="cpu")})


@pytest.mark.parametrize(
    "source", [endless, endless(), DataLoader(Endless(), collate_fn=lambda rows: (rows[0][None],))]
)
def test_an_endless_source_is_refused(make_decoder, monkeypatch, source):
    monkeypatch.setattr(calibration_forms, "MOST_BATCHES", 20)
    why = r"calibration has more than 20 batches, .* does not say how many: give a list of fewer"
    with pytest.raises(ArgumentError, match=why):
        batches_of(make_decoder("llama"), source, None)
    monkeypatch.setattr(calibration_forms, "MOST_BATCHES", 10**9)
    monkeypatch.setattr(calibration_forms, "LARGEST_PART_OF_MEMORY", 1e-9)
    with pytest.raises(ArgumentError, match="give a list of fewer"):
        batches_of(make_decoder("llama"), source, None)


def test_a_source_longer_than_its_length_is_refused(make_decoder):
    with pytest.raises(ArgumentError, match=r"more than 3 batches, .* its length is 3"):
        batches_of(make_decoder("llama"), LongerThanItSays(), None)


def test_sources_with_an_end_are_read_whole(make_decoder):
    model, batch = make_decoder("llama"), {"input_ids": torch.zeros(1, 8, dtype=torch.int64, device="cpu")}
    assert len(batches_of(model, itertools.repeat(batch, 30), None)) == 30
    assert len(batches_of(model, lambda: [batch] * 5, None)) == 5
