"""FiniteCheck: what is known of a tensor, by which launch, and what is still to be read."""

from __future__ import annotations

import copy

import torch

from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.finite_check import FiniteCheck

FINE, FOUND = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
"""Flags of a launch that found nothing, and of one that found an invalid number."""


def test_only_tensors_that_no_launch_has_checked_are_read(device):
    weight, term = torch.randn(4, 8, device=device), torch.rand(8, device=device)
    known = FiniteCheck()
    assert all_finite(weight, terms=[term], known=known)
    assert not all_finite(weight, weight / 0, terms=[term], known=known)
    assert not all_finite(weight, terms=[term, -term], known=known)
    weight.fill_(torch.nan)
    assert all_finite(weight, terms=[term], known=known), "known from the first call"
    assert not all_finite(weight, terms=[term], known=FiniteCheck())
    assert all_finite(known=FiniteCheck())


def test_the_flags_of_a_launch_decide(device):
    bad, good = torch.full((4,), torch.nan, device=device), torch.ones(4, device=device)
    assert all_finite(bad, terms=[bad], known=FiniteCheck().record(bad, terms=[bad], flags=FINE.to(device)))
    assert not all_finite(good, known=FiniteCheck().record(good, terms=[good], flags=FOUND.to(device)))
    known = FiniteCheck().record(good, flags=FINE.to(device)).record(bad, flags=FOUND.to(device))
    assert [known.passed(tensor) for tensor in (good, bad, good.clone())] == [True, False, None]


def test_a_finite_weight_is_no_valid_term_but_a_valid_term_is_a_finite_weight():
    signed = torch.tensor([-1.0, 1.0])
    assert not all_finite(terms=[signed], known=FiniteCheck().record(signed))
    assert FiniteCheck().record(terms=[signed]).passed(signed)


def test_results_of_a_shared_term_are_kept_and_those_of_other_tensors_are_not():
    shared, weight = torch.ones(4), torch.ones(4)
    of_input = FiniteCheck()
    of_input.share(shared)
    assert of_input.passed(shared, is_term=True) is None
    assert all_finite(weight, terms=[shared], known=FiniteCheck(FiniteCheck(), of_input))
    assert of_input.passed(shared, is_term=True)
    assert of_input.passed(weight) is None


def test_one_bad_tensor_does_not_vouch_for_the_others():
    shared, bad = torch.ones(4), torch.full((4,), torch.inf)
    of_input = FiniteCheck()
    of_input.share(shared)
    assert not all_finite(bad, terms=[shared], known=FiniteCheck(of_input))
    assert of_input.passed(shared, is_term=True) is None


def test_a_deep_copy_knows_nothing_of_new_tensors():
    check = copy.deepcopy(FiniteCheck().record(torch.ones(4)))
    assert all(check.passed(torch.ones(4)) is None for _ in range(20))
