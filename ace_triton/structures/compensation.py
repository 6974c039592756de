"""Kept weights make up for removed structures: least squares on the layers that read them, or a bias.

W is the weight of a layer, G the Gram matrix of its inputs, K its kept inputs and R the removed ones. The weights that
best reproduce the outputs of the whole layer are

    W'_K = W_K + W_R G_RK (G_KK + D)^-1,

with the damping D of :class:`~ace_triton.solvers.update.Update`, which keeps W'_K near W_K if there are few tokens, and
is raised if the matrix has no Cholesky factor. If the layer has a bias, G is centered and the bias takes the mean of
what is lost.

Blocks are solved one after the other, each on the outputs of the solved blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..decoders.batches import Batch
from ..decoders.blocks import Block, Tower, linears_of
from ..decoders.calibration_mode import calibration_mode
from ..decoders.collect import InputCollector
from ..decoders.layer_roles import finished_modules
from ..decoders.replay import Replay, Runner, make_runner
from ..errors import ArgumentError
from ..linears import linear_weight
from ..methods.registry import Needs
from ..solvers.raised_damping import add_to_diagonal, with_damping
from ..statistics.activation import ActivationStats
from ..timing import Stopwatch
from .settings import ShrinkSettings
from .smaller import column_mask, masked
from .weights import Weights

if TYPE_CHECKING:
    from .choice import Choice

CACHED_BYTES = 2**30
"""Most bytes of the outputs of linear layers that are cached until the last layer of their module is solved."""


@dataclass(frozen=True)
class Repair:
    """New values of a layer that reads removed structures.

    Attributes:
        weight: fp32 [out_features, kept inputs].
        bias: change of its bias, fp32 [out_features]; None if it has no bias.
        lost, left: squared error of its outputs before and after, as shares of their energy.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    lost: float
    left: float


def fitted(
    weight: torch.Tensor, mask: torch.Tensor, stats: ActivationStats, settings: ShrinkSettings, *, has_bias: bool
) -> Repair:
    """The least-squares weights for some kept inputs.

    Args:
        weight: the dense weight, fp32 [out_features, in_features].
        mask: True for kept inputs, bool [in_features].
        stats: statistics of the inputs, with a Gram matrix.
        settings: with damping and prior.
        has_bias: True if the layer has, or gets, a bias.
    """
    assert stats.gram is not None
    assert stats.gram.matrix is not None
    assert stats.mean is not None
    gram, mean, count = stats.gram.matrix, stats.mean.float(), max(stats.count, 1)
    energy = (weight @ gram * weight).sum()
    if has_bias:
        gram = torch.addr(gram, mean, mean, alpha=-count)
    diagonal = gram.diagonal()
    damping = settings.damping * diagonal.mean() + settings.prior / count * diagonal
    kept, removed = gram[mask][:, mask], weight[:, ~mask]
    loss = removed @ gram[~mask][:, mask]
    before = (removed @ gram[~mask][:, ~mask] * removed).sum()
    change = torch.zeros_like(loss)
    if bool((kept.diagonal() + damping[mask]).min() > 0):
        factor = with_damping(add_to_diagonal(kept, damping[mask]), torch.linalg.cholesky)
        change = torch.cholesky_solve(loss.t(), factor).t()
    after = before - 2 * (change * loss).sum() + (change @ kept * change).sum()
    bias = removed @ mean[~mask] - change @ mean[mask] if has_bias else None
    return Repair(weight[:, mask] + change, bias, _share(before, energy), _share(after, energy))


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return max(0.0, float(part / whole)) if float(whole) > 0 else 0.0


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's inputs over the calibration set.

    Attributes:
        mean: fp32 [in_features].
        square: mean square, fp32 [in_features].
    """

    mean: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, stats: ActivationStats) -> Moments:
        """The moments of all tokens of some statistics."""
        assert stats.mean is not None
        return cls(stats.mean.float(), stats.norm.square() / max(stats.count, 1))


def mean_in_bias(weight: torch.Tensor, mask: torch.Tensor, inputs: Moments) -> Repair:
    """FLAP's repair: the mean of the removed inputs goes through their weights into the bias."""
    removed, mean, square = weight[:, ~mask], inputs.mean[~mask], inputs.square
    energy = (weight.square() * square).sum()
    lost = (removed.square() * square[~mask]).sum()
    left = (removed.square() * (square[~mask] - mean.square())).sum()
    return Repair(weight[:, mask], removed @ mean, _share(lost, energy), _share(left, energy))


Stored = Mapping[str, torch.Tensor]
"""Tensors of the smaller model by name: the weight and the bias of each repaired layer of a block."""


def solve_blocks(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch],
    choice: Choice,
    settings: ShrinkSettings,
    weights: Weights,
    solved: Callable[[int, dict[str, Repair]], None],
    *,
    stored: Callable[[int], Stored | None] = lambda _: None,
    progress: Callable[[int, int, str], None] | None = None,
    most: int | None = None,
) -> None:
    """The least-squares repairs of all layers that read removed channels or groups, block by block.

    Args:
        model: the dense model; unchanged at return.
        tower: its blocks.
        batches: the calibration set.
        choice: what is kept, and which layers have a bias.
        settings: with damping and prior.
        weights: where the model's weights are.
        solved: called with the index of a block and its repairs by name of the layer, once all batches have advanced,
            while the block is in memory.
        stored: gives what an earlier run has written for a block, or None if the block is still to be solved.
        progress: called with the number of finished blocks, of all blocks, and the block's name.
        most: number of blocks to solve, the first ones; None for all.

    Raises:
        ArgumentError: if no token reaches a layer, or the weights are in files and blocks cannot run one at a time.
    """
    structures, kept = choice.structures, choice.kept
    clock = Stopwatch(next(model.parameters()).device)
    entries, n_tokens = structures.columns, sum(batch.shape[0] * batch.shape[1] for batch in batches)
    with calibration_mode(model), masked(structures, choice.kept_experts), ExitStack() as until_the_end:
        with weights.loaded(model):
            runner = make_runner(model, tower.blocks, batches, clock, tower.masks, keep=weights.keep)
        alone = isinstance(runner, Replay)
        if weights.in_files and not alone:
            raise ArgumentError(
                f"{type(model).__name__}: its blocks cannot be run one at a time, so update 'lstsq' cannot stream: "
                "take --update none, or a machine with more memory and --no-stream"
            )
        for index, block in enumerate(tower.blocks[:most]):
            names = [name for name in entries if name in kept and name.startswith(f"{block.name}.")]
            layers = [structures.layers[name] for name in names]
            found: dict[str, Repair] = {}
            finished: list[nn.Module] = []
            known = stored(index)
            with weights.loaded(block.module):
                with ExitStack() as restored:
                    (restored if alone else until_the_end).enter_context(_restored(layers))
                    for name, layer in zip(names, layers, strict=True):
                        mask = column_mask(entries[name], layer, kept[name])
                        if known is not None:
                            _install_stored(layer, name, mask, known)
                            continue
                        finished = _finished(block, names[len(found) :], n_tokens)
                        stats = _statistics(runner, index, name, layer, clock, finished)
                        weight = linear_weight(layer)
                        assert weight is not None
                        has_bias = name in choice.with_bias
                        found[name] = fitted(weight.float(), mask, stats, settings, has_bias=has_bias)
                        _install(layer, mask, found[name])
                    runner.run(index, None, advance=True, finished=finished)
                if known is None:
                    solved(index, found)
            if progress is not None:
                progress(index + 1, len(tower.blocks), block.name)


def _finished(block: Block, rest: Collection[str], n_tokens: int) -> list[nn.Module]:
    """The modules of a block whose outputs may be cached until some layers are solved.

    They are the block's children without such a layer, and the linear layers in one module with such a layer, unless
    the outputs of these take more than :data:`CACHED_BYTES`.

    Args:
        block: the block.
        rest: names of the layers that are still to be solved.
        n_tokens: number of tokens in the calibration set.
    """
    linears = dict(linears_of(block.module, block.name))
    homes = {name.rpartition(".")[0] for name in rest}
    beside = [layer for name, layer in linears.items() if name not in rest and name.rpartition(".")[0] in homes]
    weights = [weight for layer in beside if (weight := linear_weight(layer)) is not None]
    if n_tokens * sum(weight.shape[0] * weight.element_size() for weight in weights) > CACHED_BYTES:
        beside = []
    return [*finished_modules(block, linears, rest), *beside]


def _statistics(
    runner: Runner, index: int, name: str, layer: nn.Module, clock: Stopwatch, finished: Sequence[nn.Module]
) -> ActivationStats:
    collector = InputCollector({name: layer}, Needs(gram=True), clock)
    runner.run(index, collector, advance=False, finished=finished)
    stats = collector.statistics(name)
    if stats is None:
        raise ArgumentError(f"no token of the calibration text reached {name}: give more text")
    return stats


def _install_stored(layer: nn.Module, name: str, mask: torch.Tensor, known: Stored) -> None:
    """Let a layer of the dense model compute what its repaired layer of the smaller model computes."""
    weight = known[f"{name}.weight"]
    weight = weight if isinstance(layer, nn.Linear) else weight.t()
    _install_columns(layer, mask, weight)
    if (bias := known.get(f"{name}.bias")) is not None:
        layer._parameters["bias"] = nn.Parameter(bias.clone(), requires_grad=False)


def _install(layer: nn.Module, mask: torch.Tensor, repair: Repair) -> None:
    """Let a layer of the dense model compute what the repaired layer will: its other columns become 0."""
    _install_columns(layer, mask, repair.weight)
    if repair.bias is not None:
        own = layer._parameters.get("bias")
        moved = repair.bias if own is None else own.detach().float() + repair.bias
        dtype = layer.get_parameter("weight").dtype
        layer._parameters["bias"] = nn.Parameter(moved.to(dtype), requires_grad=False)


def _install_columns(layer: nn.Module, mask: torch.Tensor, weight: torch.Tensor) -> None:
    """Set the kept columns of a layer's weight [out_features, in_features], and the others to 0."""
    parameter = layer.get_parameter("weight")
    whole = torch.zeros(weight.shape[0], len(mask), dtype=parameter.dtype, device=parameter.device)
    whole[:, mask] = weight.to(parameter)
    parameter.data = whole if isinstance(layer, nn.Linear) else whole.t().contiguous()


@contextmanager
def _restored(layers: Sequence[nn.Module]) -> Iterator[None]:
    """A context at whose end the weights and biases of layers are those of its start."""
    before = [(layer, layer.get_parameter("weight").data, layer._parameters.get("bias")) for layer in layers]
    try:
        yield
    finally:
        for layer, weight, bias in before:
            layer.get_parameter("weight").data = weight
            layer._parameters["bias"] = bias


def repaired_tensors(repair: Repair, name: str, layer: nn.Module, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a repaired layer of the smaller model, in fp32.

    Args:
        repair: from :func:`fitted` or :func:`mean_in_bias`.
        name: name of the layer.
        layer: the layer of the dense model.
        bias: its bias in the smaller model so far; None if it has none.
    """
    weight = repair.weight if isinstance(layer, nn.Linear) else repair.weight.t()
    found = {f"{name}.weight": weight.contiguous()}
    if repair.bias is not None and bias is not None:
        found[f"{name}.bias"] = bias.float() + repair.bias
    return found
