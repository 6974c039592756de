"""Sources of calibration batches that do not end, or that cannot be read, are refused before they fill the memory."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ace_triton.decoders import calibration_forms
from ace_triton.decoders.calibration_forms import batches_of
from ace_triton.errors import ArgumentError

BATCH = {"input_ids": torch.zeros(1, 16, dtype=torch.int64, device="cpu")}
"""A batch of 128 bytes."""


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat(torch.zeros(8, dtype=torch.int64, device="cpu"))


class OfLength:
    """Batches with a length that may be wrong."""

    def __init__(self, length, batches):
        self.length, self.batches = length, batches

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __iter__(self):
        return iter(self.batches)


def endless():
    return itertools.repeat(BATCH)


@pytest.mark.parametrize(
    "source", [endless, endless(), DataLoader(Endless(), collate_fn=lambda rows: (rows[0][None],))]
)
def test_an_endless_source_is_refused(make_decoder, monkeypatch, source):
    monkeypatch.setattr(calibration_forms, "MOST_BATCHES", 20)
    with pytest.raises(ArgumentError, match=r"calibration has more than 20 batches, .*: give a list of fewer"):
        batches_of(make_decoder("llama"), source, None)


@pytest.mark.parametrize("length", [None, 10**4])
def test_a_source_that_takes_too_much_memory_is_refused(make_decoder, monkeypatch, length):
    source = endless() if length is None else OfLength(length, endless())
    monkeypatch.setattr(calibration_forms, "available_memory", lambda: 1000)
    with pytest.raises(ArgumentError, match=r"has 4 or more batches of .* KB in all, .*: give a list of fewer"):
        batches_of(make_decoder("llama"), source, None)


class OnlyFirst:
    """An iterator that may be asked for one batch."""

    def __init__(self, batch):
        self.batches = iter([batch])

    def __iter__(self):
        return self

    def __next__(self):
        for batch in self.batches:
            return batch
        raise AssertionError("batch 1 was read")


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"x": np.ones(3)}, r"calibration\[0\]\['x'\] is a ndarray; each input must be a tensor"),
        ({0: torch.ones(1, 3)}, r"calibration\[0\] has the key 0: its keys must be names .*\(input_ids, "),
        ({}, r"calibration\[0\] is an empty dict"),
        (np.ones(3), r"calibration\[0\] is a ndarray; calibration must be"),
        ((np.ones(3),), r"calibration\[0\] is a tuple of other things than tensors"),
        (torch.ones(1, 3), r"calibration\[0\] is a tensor; each batch is"),
    ],
)
def test_a_wrong_batch_is_refused_before_the_next_is_read(make_decoder, batch, why):
    with pytest.raises(ArgumentError, match=why):
        batches_of(make_decoder("llama"), OnlyFirst(batch), None)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (OfLength(1, [BATCH] * 3), "gives more batches than its length, 1: correct its __len__, or give a list"),
        (OfLength(3, itertools.repeat(BATCH)), "gives more batches than its length, 3: correct"),
        (OfLength(10**12, itertools.repeat(BATCH)), "has 1,000,000,000,000 batches, more than 10,000, .*: give a list"),
        (OfLength(-1, [BATCH]), "length cannot be read; correct its __len__, .*: ValueError: "),
        (OfLength(RuntimeError("no"), [BATCH]), "length cannot be read; correct its __len__, .*: RuntimeError: no"),
        (OfLength(1, 5), "calibration, a OfLength, cannot be iterated over: TypeError"),
        (map({0: BATCH}.__getitem__, [0, 1]), r"calibration\[1\] cannot be read: KeyError: 1"),
        (lambda path: [BATCH], "a function, cannot be called without arguments: TypeError: .* 'path'"),
        (torch.nn.Linear(2, 2), "calibration must be .*; got a model, a Linear"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(make_decoder, source, why):
    with pytest.raises(ArgumentError, match=why):
        batches_of(make_decoder("llama"), source, None)


def test_sources_with_an_end_are_read_whole(make_decoder):
    model = make_decoder("llama")
    assert len(batches_of(model, itertools.repeat(BATCH, 30), None)) == 30
    assert len(batches_of(model, lambda: [BATCH] * 5, None)) == 5
    assert len(batches_of(model, OfLength(NotImplementedError(), [BATCH] * 4), None)) == 4
