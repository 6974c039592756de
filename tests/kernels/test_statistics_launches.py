"""The number of kernels and host waits of a block's statistics, counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ace_triton.decoders.collect import InputCollector
from ace_triton.kernels.backend import interpreting
from ace_triton.methods.registry import Needs
from ace_triton.timing import Stopwatch
from benchmarks.harness.traffic_counter import Counter, Traffic

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

WIDTH, INNER, SEQUENCES, LENGTH = 16, 24, 1, 8
INPUTS, LAYERS = 4, 7


class LlamaBlock(nn.Module):
    """The linear layers of a Llama block, wired as there, with a stand-in for attention."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "v": (WIDTH, WIDTH // 2), "o": (WIDTH, WIDTH)}
        shapes |= {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
        for name, (in_features, out_features) in shapes.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.o(self.q(hidden) + torch.cat([self.k(hidden), self.v(hidden)], -1))
        inner = hidden * 0.5
        return hidden + self.down(self.gate(inner) * self.up(inner))


@pytest.fixture
def block() -> LlamaBlock:
    torch.manual_seed(0)
    return LlamaBlock().requires_grad_(False)


def collect(
    block: LlamaBlock, needs: Needs, hidden: list[torch.Tensor], valid: torch.Tensor | None
) -> tuple[InputCollector, Traffic]:
    """Statistics of some batches, and the traffic of the last one."""
    collector = InputCollector(dict(block.named_children()), needs, Stopwatch(torch.device("cpu")))
    for batch in hidden:
        with Counter().counting() as traffic, collector.batch((SEQUENCES, LENGTH), valid):
            block(batch)
    return collector, traffic


@pytest.mark.parametrize(
    ("needs", "padded", "launches"),
    [
        (Needs(), True, 2 * INPUTS),
        (Needs(outputs=True), False, 3 * INPUTS),
        (Needs(outputs=True), True, 3 * INPUTS),
        (Needs(outputs=True, reduce="abs"), True, 3 * INPUTS + LAYERS),
    ],
    ids=["inputs", "ace", "ace, padded", "coupling"],
)
def test_a_batch(monkeypatch, block, needs, padded, launches):
    hidden = list(torch.randn(2, SEQUENCES, LENGTH, WIDTH))
    valid = torch.arange(LENGTH).expand(SEQUENCES, LENGTH) >= 3 if padded else None
    with Counter().counting() as alone:
        block(hidden[0])
    with monkeypatch.context() as gpu:
        for module in ("outputs", "batch"):
            gpu.setattr(f"ace_triton.statistics.{module}.is_on_cpu", lambda tensor: False)
        collector, traffic = collect(block, needs, hidden, valid)
    assert collector.groups == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert (traffic.launches - alone.launches, traffic.waits) == (launches, 0)

    monkeypatch.setenv("ACE_TRITON_BACKEND", "reference")
    plain, _ = collect(block, needs, hidden, valid)
    for name in dict(block.named_children()):
        got, expected = collector.statistics(name), plain.statistics(name)
        assert got is not None
        assert expected is not None
        assert got.count == expected.count == 2 * SEQUENCES * (LENGTH - 3 * padded)
        assert torch.equal(got.sequence_count, expected.sequence_count)
        torch.testing.assert_close(got.norm, expected.norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.sequence_square, expected.sequence_square, rtol=1e-5, atol=1e-6)
        if needs.outputs:
            assert got.outputs.count == expected.outputs.count
            square = got.outputs.mean_weighted_square()
            torch.testing.assert_close(square, expected.outputs.mean_weighted_square(), rtol=1e-5, atol=1e-7)
        if needs.reduce:
            matrix = got.outputs.mean_coupling()
            torch.testing.assert_close(matrix, expected.outputs.mean_coupling(), rtol=1e-4, atol=1e-6)
