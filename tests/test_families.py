"""The page of families: what it counts as pruned, and what it says of those that are not."""

import pytest
import torch

from benchmarks.families import judged, page, small_model

OPTIONS = {"method": "wanda", "sparsity": "2:4"}


@pytest.fixture
def ids():
    return torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "bloom"])
def test_a_small_model_of_a_family_is_pruned(ids, name):
    model = small_model(name, ids)
    assert model is not None
    family = judged(name, model, ids, OPTIONS)
    assert family.error is None
    assert family.layers >= 8
    assert not family.whole
    assert f"block by block** (1): {name}." in "\n".join(page([family], [], OPTIONS))


def test_says_what_went_wrong(ids):
    model = small_model("llama", ids)
    broken = judged("llama", model, ids, {**OPTIONS, "method": "wonder"})
    assert broken.error is not None
    assert "unknown method 'wonder'" in broken.error
    text = "\n".join(page([broken], ["blt"], OPTIONS))
    assert "**Not pruned** (1): llama." in text
    assert "(1), since no set of small sizes suits them: blt." in text
    assert broken.error in text
    looser = judged("llama", small_model("llama", ids), ids, {**OPTIONS, "sparsity": "3:4"})
    assert looser.error is not None
    assert "not 2:4" in looser.error


def test_a_family_without_small_sizes_is_not_judged(ids):
    assert small_model("no such family", ids) is None
