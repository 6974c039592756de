"""all_finite against torch.isfinite."""

from __future__ import annotations

import threading

import pytest
import torch

from ace_triton.kernels import finite
from ace_triton.kernels.backend import interpreting
from ace_triton.kernels.finite import all_finite, find_not_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (1, 7, 33, 200) if interpreting() else (1, 7, 33, 200, 70001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_finds_one_bad_element_anywhere(make_matrix, dtype, length):
    tensor = make_matrix(1, length, dtype)[0]
    tensor[length // 3] = torch.finfo(dtype).max
    assert all_finite(tensor)
    for index in {0, length // 2, length - 1}:
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            spoilt = tensor.clone()
            spoilt[index] = bad
            assert not all_finite(spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 5, 7)])
def test_any_shape(device, dtype, shape):
    assert all_finite(torch.ones(shape, dtype=dtype, device=device))


@pytest.mark.parametrize("layout", ["row stride", "transposed", "column stride"])
def test_looks_only_at_the_view(make_matrix, layout):
    wide = make_matrix(20, 50, torch.float32)
    view = {"row stride": wide[:, 3:40], "transposed": wide[:, 3:40].t(), "column stride": wide[:, 1::2]}[layout]
    wide[:, 0] = torch.nan
    wide[:, 48:] = torch.where(torch.arange(48, 50, device=wide.device) == 48, torch.nan, 0.0)
    assert all_finite(view)
    view[-1, -1] = torch.nan
    assert not all_finite(view)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
@pytest.mark.parametrize("sizes", [(200, 33), (1, 200), (0, 5), (5, 0)])
def test_looks_at_every_tensor(make_matrix, dtypes, sizes):
    tensors = [make_matrix(1, size, dtype) for size, dtype in zip((*sizes, 40), (*dtypes, dtypes[0]), strict=True)]
    assert all_finite(*tensors)
    for tensor in tensors:
        for index in {0, tensor.numel() - 1} if tensor.numel() else ():
            kept = tensor[0, index].clone()
            tensor[0, index] = torch.nan
            assert not all_finite(*tensors)
            tensor[0, index] = kept
    assert all_finite(*tensors)


@pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="the CPU library waits by itself")
def test_a_call_that_was_interrupted_is_forgotten(monkeypatch, device):
    def interrupt(flag: torch.Tensor) -> None:
        raise KeyboardInterrupt

    fine = torch.ones(9, device=device)
    monkeypatch.setattr(torch.Tensor, "item", interrupt)
    with pytest.raises(KeyboardInterrupt):
        all_finite(fine.log().sub(torch.inf))
    monkeypatch.undo()
    assert all_finite(fine)


def test_marks_start_again_after_the_last(monkeypatch, device):
    monkeypatch.setattr(finite, "LAST_MARK", 3)
    fine = torch.ones(9, device=device)
    assert [all_finite(x) for x in (fine, fine / 0) * 4] == [True, False] * 4


def test_threads_do_not_share_a_flag():
    flags = {}

    def take(name: str) -> None:
        flags[name] = [finite._flags.next(torch.device("cpu")) for _ in range(2)]

    thread = threading.Thread(target=take, args=("other",))
    thread.start()
    thread.join()
    take("this")
    addresses = {name: {flag.data_ptr() for flag, _ in taken} for name, taken in flags.items()}
    assert addresses["this"].isdisjoint(addresses["other"])
    assert all(len(of) == 1 for of in addresses.values())
    assert all(first != second for (_, first), (_, second) in flags.values())


@pytest.mark.parametrize("length", LENGTHS)
def test_score_terms_may_not_be_below_zero(make_matrix, length):
    weight, term = make_matrix(3, length, torch.bfloat16), make_matrix(1, length, torch.float32)[0].abs()
    term[length // 2] = -0.0
    assert all_finite(weight, terms=[term, term])
    assert all_finite(terms=[term])
    for bad in (-1e-45, -1.0, torch.nan, torch.inf, -torch.inf):
        spoilt = term.clone()
        spoilt[length - 1] = bad
        assert not all_finite(terms=[spoilt])
        assert not all_finite(weight, terms=[term, spoilt])


def test_a_check_that_is_not_read(device):
    weight, term = torch.randn(4, 8, device=device), torch.rand(8, device=device)
    found = find_not_finite(weight, terms=[term])
    assert found.tolist() == [0]
    assert find_not_finite(weight, also=found).tolist() == [0]
    bad = find_not_finite(weight, terms=[-term])
    assert bad.tolist() == [1]
    assert find_not_finite(weight, also=bad).tolist() == [1]
    assert find_not_finite(weight / 0).tolist() == [1]
    assert found.tolist() == [0], "flags are not shared"
