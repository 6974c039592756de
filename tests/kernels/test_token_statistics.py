"""token_statistics against the fp64 reference, over several batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.token_statistics import (
    NUMBERS,
    RunningMoments,
    TokenStatistics,
    no_layer_sums,
    no_moments,
    token_statistics,
    token_statistics_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 12 if interpreting() else 200


def check(got: TokenStatistics, expected: TokenStatistics) -> None:
    near = {"rtol": 2e-5, "atol": 1e-6}
    assert torch.equal(got.moments.count, expected.moments.count)
    assert torch.equal(got.sequence_count, expected.sequence_count)
    assert got.sequence_count.dtype == torch.int64
    for mine, theirs in zip(got.moments, expected.moments, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(got.sequence_square, expected.sequence_square, **near)
    width = got.moments.mean.shape[0] + NUMBERS
    torch.testing.assert_close(got.layers[:, 4:width], expected.layers[:, 4:width], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.layers[:, 1], expected.layers[:, 1], rtol=1e-5, atol=0)
    assert torch.equal(got.layers[:, [0, 2]], expected.layers[:, [0, 2]])
    assert (got.token_weights is None) == (expected.token_weights is None)
    if got.token_weights is not None:
        torch.testing.assert_close(got.token_weights, expected.token_weights, rtol=1e-4, atol=1e-6)


@settings(max_examples=4 if interpreting() else 30)
@given(
    sequences=st.integers(1, 4),
    length=st.integers(1, MOST),
    channels=st.integers(1, 20),
    widths=st.lists(st.integers(1, 40), max_size=4),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    token_weights=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_reference(make_matrix, sequences, length, channels, widths, dtype, masked, token_weights, seed):
    n_tokens, moments, layers = sequences * length, None, None
    for batch in range(2):
        tokens = make_matrix(n_tokens, channels, dtype, seed=seed + batch).reshape(sequences, length, channels)
        outputs = [make_matrix(n_tokens, width, dtype, seed=seed + k) for k, width in enumerate(widths)]
        moments = moments or no_moments(channels, tokens.device)
        layers = no_layer_sums(len(widths), channels, tokens.device) if layers is None else layers
        valid = None
        for output in outputs:
            output[::5] = 0
        if masked:
            generator = torch.Generator().manual_seed(seed + batch)
            valid = (torch.rand(sequences, length, generator=generator) < 0.7).to(tokens.device)
            tokens[~valid] = torch.nan
            for output in outputs:
                output[~valid.flatten()] = torch.inf
        arguments = tokens, valid, moments, tuple(outputs), layers
        expected = token_statistics_reference(*arguments, token_weights)
        got = token_statistics(*arguments, token_weights=token_weights)
        check(got, expected)
        moments, layers = got.moments, got.layers


@pytest.mark.parametrize("length", [1, 37] if interpreting() else [1, 130, 2048])
def test_large_means_do_not_cancel(make_matrix, length):
    moments = no_moments(48, make_matrix(1, 1, torch.float32).device)
    every = [make_matrix(2 * length, 48, torch.float32, seed=batch) + 1000 for batch in range(3)]
    for tokens in every:
        moments = token_statistics(tokens, None, moments).moments
    exact = torch.cat(every).double()
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.deviation, (exact - exact.mean(0)).square().sum(0), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_noted(make_matrix, bad):
    tokens, outputs = make_matrix(12, 8, torch.float32), [make_matrix(12, 5, torch.float32) for _ in range(2)]
    outputs[1][3, 2] = bad
    before = no_moments(8, tokens.device), outputs, no_layer_sums(2, 8, tokens.device)
    layers = token_statistics(tokens, None, *before).layers
    assert layers[:, 2].tolist() == [1, 0]
    again = token_statistics(tokens, None, before[0], [outputs[0]] * 2, layers)
    assert again.layers[:, 2].tolist() == [1, 0]


def test_no_argument_is_changed_and_every_run_gives_the_same(make_matrix):
    tokens, outputs = make_matrix(20, 24, torch.bfloat16), [make_matrix(20, 7, torch.bfloat16)]
    first = token_statistics(tokens, None, no_moments(24, tokens.device), outputs, no_layer_sums(1, 24, tokens.device))
    moments, layers = RunningMoments(*(part.clone() for part in first.moments)), first.layers.clone()
    runs = [token_statistics(tokens, None, first.moments, outputs, first.layers) for _ in range(2)]
    assert torch.equal(first.layers, layers)
    assert all(map(torch.equal, first.moments, moments))
    assert torch.equal(runs[0].layers, runs[1].layers)
    assert all(map(torch.equal, runs[0].moments, runs[1].moments))


def test_rows_of_outputs_may_have_any_stride(make_matrix):
    wide = make_matrix(24, 60, torch.float32)
    tokens, outputs = wide[:, 3:20], (wide[:, 5:38:2], wide[:, 8:])
    arguments = tokens, None, no_moments(17, tokens.device), outputs, no_layer_sums(2, 17, tokens.device)
    check(token_statistics(*arguments), token_statistics_reference(tokens[None], *arguments[1:], False))


@pytest.mark.parametrize(
    ("outputs", "rows", "message"),
    [
        ([(6, 3)], 0, "running sums of each"),
        ([(5, 3)], 1, "outputs must be"),
        ([(6, 3)] * 9, 9, "at most 8 layers"),
    ],
)
def test_says_what_is_wrong(outputs, rows, message):
    tokens, device = torch.zeros(6, 4), torch.device("cpu")
    made = [torch.zeros(shape) for shape in outputs]
    with pytest.raises(ValueError, match=message):
        token_statistics(tokens, None, no_moments(4, device), made, no_layer_sums(rows, 4, device))
