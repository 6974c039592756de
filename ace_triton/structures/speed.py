"""How many parameters must go for a block to run a number of times as fast, timed on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..decoders.batches import Batch, run_model
from ..decoders.blocks import Block
from ..decoders.calibration_mode import calibration_mode
from ..errors import ArgumentError
from .budget import Share, block_parameters, check_rows, possible_shares
from .coupled import Structures
from .settings import ShrinkSettings
from .smaller import Kept, changed_config, kept_tensors, shapes_of, skeleton, values_in, width_changes

ROUNDS = 20
"""Number of runs of each block, of which the fastest counts."""

STEPS = 20
"""The shares of the parameters that are tried are multiples of 1 / STEPS."""

Run = Callable[[nn.Module], object]


def needed_for_speed(
    model: nn.Module,
    structures: Structures,
    blocks: Sequence[Block],
    settings: ShrinkSettings,
    trial: Batch,
    clock: Callable[[], float],
) -> tuple[int, float]:
    """The least number of parameters to remove, and how many times as fast a block is then.

    The first block runs on one token, as in generation, with its own weights in all widths.

    Args:
        model: the dense model.
        structures: its structures.
        blocks: its blocks.
        settings: with the wanted speed-up, groups and multiple.
        trial: a few inputs.
        clock: gives the time in seconds.

    Raises:
        ArgumentError: if no share makes a block as fast.
    """
    assert settings.speedup is not None
    with calibration_mode(model):
        run = _first_call(model, blocks[0], trial)
        low, high = 0, STEPS
        found: tuple[int, float] | None = None
        best = 1.0
        while high - low > 1:
            middle = (low + high) // 2
            share = _share(structures, blocks, settings, middle / STEPS)
            gain = 0.0
            if share is not None:
                check_rows(model, structures, share)
                narrow = _narrowed(model, structures, blocks, share)
                before, after = _seconds((blocks[0].module, narrow), run, clock)
                gain = before / after
                best = max(best, gain)
            if share is None or gain >= settings.speedup:
                high = middle
                found = found if share is None else (share.parameters, gain)
            else:
                low = middle
    if found is None:
        raise ArgumentError(
            f"no share of the structures makes a block {settings.speedup:g} times as fast on one token here; "
            f"{best:.2f} times was reached: give a smaller --speedup, or --method depth"
        )
    return found


def _first_call(model: nn.Module, block: Block, trial: Batch) -> Run:
    """A function that runs a module on what a block reads of the first token."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle = block.module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run_model(model, Batch({name: values[:1, :1] for name, values in trial.inputs.items()}))
    finally:
        handle.remove()
    args, kwargs = calls[0]
    return lambda module: module(*args, **kwargs)


def _share(structures: Structures, blocks: Sequence[Block], settings: ShrinkSettings, ratio: float) -> Share | None:
    """The share with the fewest groups that removes a ratio of the parameters; None if there is none."""
    try:
        return possible_shares(structures, settings, math.ceil(ratio * block_parameters(blocks)))[0]
    except ArgumentError:
        return None


def _narrowed(model: nn.Module, structures: Structures, blocks: Sequence[Block], share: Share) -> nn.Module:
    """The first block with the widths of a share."""
    left = share.left(structures)
    kept = {
        entry.consumer: torch.arange(structures.scaled(entry, number), dtype=torch.int64, device="cpu")
        for kind, number in left.items()
        for entry in structures.coupled[kind]
    }
    shapes = kept_tensors(shapes_of(model), structures, blocks, Kept(kept))
    built = skeleton(model, changed_config(model, width_changes(model, structures, left, shapes)))
    block = built.get_submodule(blocks[0].name)
    own = kept_tensors(values_in(model, blocks[0]), structures, blocks, Kept(kept))
    own = {name.removeprefix(f"{blocks[0].name}."): tensor for name, tensor in own.items()}
    block.load_state_dict(own, assign=True)
    return block.to(next(model.parameters()).device).eval()


def _seconds(modules: Sequence[nn.Module], run: Run, clock: Callable[[], float]) -> list[float]:
    """The fastest run of each module, in seconds; the modules take turns."""
    times: list[list[float]] = [[] for _ in modules]
    for _ in range(ROUNDS):
        for module, found in zip(modules, times, strict=True):
            started = clock()
            output = run(module)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(clock() - started)
            del output
    return [max(min(found), 1e-9) for found in times]
