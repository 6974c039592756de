"""Time greedy decoding with dense and with packed layers, and where the time of a token goes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .generation import decode
from .linears import is_linear
from .packed.packed_linear import PackedLinear
from .packed.unpack_model import unpack_model

ROUNDS = 3


@dataclass(frozen=True)
class TokenTimes:
    """Time of one token in decoding, in milliseconds.

    Attributes:
        tokens_per_second: median speed of decoding over the rounds.
        packed_layers: time in the layers that are packed in the packed model.
        other_layers: time in all other linear layers, as the output head.
        rest: time in everything else: attention, norms, Python and transformers' own loop.
    """

    tokens_per_second: float
    packed_layers: float
    other_layers: float
    rest: float


@dataclass(frozen=True)
class DecodingTimes:
    """Times of decoding with dense and with packed layers.

    Attributes:
        new_tokens: tokens of a round.
        rounds: number of rounds; dense and packed run in turns.
        dense, packed: times with dense layers, and with packed ones.
        same_tokens: number of tokens before the first that differs.
    """

    new_tokens: int
    rounds: int
    dense: TokenTimes
    packed: TokenTimes
    same_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def decoding_times(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    new_tokens: int,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> DecodingTimes:
    """Decode greedily with a packed model and with its dense copy, in turns.

    Args:
        model, tokenizer: from transformers; the model has packed layers.
        ids: tokens of the prompt.
        new_tokens: tokens to decode, at least 2; an end token does not stop them.
        rounds: number of rounds without a profile; one more round is profiled.
        progress: called with the number of decoded texts that are done, and of all.
    """
    names = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    dense = copy.deepcopy(model)
    unpack_model(dense)
    sides = (dense, model)
    speeds: tuple[list[float], list[float]] = ([], [])
    tokens: list[list[int]] = [[], []]
    parts: list[tuple[float, float, float]] = []
    done, all_texts = 0, 2 * rounds + 2

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, all_texts)

    for _ in range(rounds):
        for side, speed in enumerate(speeds):
            found = decode(sides[side], tokenizer, ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            speed.append((new_tokens - 1) / (found.times[-1] - found.times[1]))
            tokens[side] = found.tokens
            step()
    for side in sides:
        parts.append(_profile(side, tokenizer, ids, new_tokens, names))
        step()
    pairs = zip(tokens[0], tokens[1], strict=True)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), new_tokens)
    of_dense, of_packed = (TokenTimes(statistics.median(own), *part) for own, part in zip(speeds, parts, strict=True))
    return DecodingTimes(new_tokens, rounds, of_dense, of_packed, same)


def _profile(
    model: Any, tokenizer: Any, ids: list[int], new_tokens: int, names: set[str]
) -> tuple[float, float, float]:
    """Milliseconds of a token in the layers of these names, in other linear layers, and in the rest."""
    spent = {True: 0.0, False: 0.0}
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.perf_counter())

    def after(is_named: bool) -> Callable[..., None]:
        def stop(*_: Any) -> None:
            spent[is_named] += time.perf_counter() - started.pop()

        return stop

    def first_token_is_there() -> bool:
        if not tokens_seen:
            spent[True] = spent[False] = 0.0
        tokens_seen.append(True)
        return False

    tokens_seen: list[bool] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) or is_linear(module):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name in names))]
    try:
        found = decode(
            model,
            tokenizer,
            ids,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            stopped=first_token_is_there,
        )
    finally:
        for hook in hooks:
            hook.remove()
    count = new_tokens - 1
    whole = 1e3 * (found.times[-1] - found.times[1]) / count
    named, others = (1e3 * spent[kind] / count for kind in (True, False))
    return named, others, max(0.0, whole - named - others)
