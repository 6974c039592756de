"""Outputs of blocks that later blocks take as arguments are carried from one block to the next."""

import torch
from torch import nn

from ace_triton.decoders.links import Carried, Link, links_found


class Biased(nn.Module):
    """Returns the bias that it is given, or one of its own."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, None, torch.Tensor]:
        bias = x.mean(1, keepdim=True) if bias is None else bias
        return x + bias, None, bias


def test_each_link_names_the_block_that_made_the_value():
    blocks = [Biased() for _ in range(3)]
    with links_found(blocks) as links:
        x, bias = torch.ones(1, 2, 3), None
        for block in blocks:
            x, _, bias = block(x, bias=bias)
    assert links == [Link(1, "bias", 0, 2), Link(2, "bias", 0, 2)]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_values_that_are_equal_in_two_batches_are_kept_once():
    links = [Link(1, "bias", 0, 1), Link(2, 3, 1, 2)]
    first, second = Carried(links), Carried(links)
    bias = torch.ones(2, 3)
    first.add(0, (torch.zeros(1), bias))
    second.add(0, (torch.zeros(1), bias.clone()), like=first)
    assert second.arguments(1)["bias"] is bias
    second.add(1, (torch.zeros(1), None, bias * 2), like=first)
    assert torch.equal(second.arguments(2)[3], bias * 2)
    assert first.arguments(0) == {}
