"""Time greedy decoding with dense and with packed layers, in transformers and in the compiled step, by part."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .decoding.step import why_not_compiled
from .generation import Decoded, decode
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
class StepTimes:
    """Time of one token in the compiled step, in milliseconds.

    Attributes:
        tokens_per_second: median speed of decoding over the rounds.
        products: time in products, the output head included.
        attention: time in positions and attention.
        rest: time in everything else: norms, activations, the embedding and the choice of the token.
    """

    tokens_per_second: float
    products: float
    attention: float
    rest: float


@dataclass(frozen=True)
class DecodingTimes:
    """Times of decoding with dense and with packed layers.

    Attributes:
        new_tokens: tokens of a round.
        rounds: number of rounds, in which all sides run in turns.
        dense, packed: times in transformers, with dense layers and with packed ones.
        same_tokens: number of tokens before the first that differs between dense and packed.
        dense_step, packed_step: times in the compiled step; None if it does not decode the model.
        same_tokens_of_step: number of tokens of ``packed_step`` before the first that differs from those of ``packed``.
        refusal: why the compiled step does not decode the model; None if it does.
    """

    new_tokens: int
    rounds: int
    dense: TokenTimes
    packed: TokenTimes
    same_tokens: int
    dense_step: StepTimes | None = None
    packed_step: StepTimes | None = None
    same_tokens_of_step: int | None = None
    refusal: str | None = None

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
    """Decode greedily with a packed model and with its dense copy, in transformers and in the compiled step, in turns.

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
    refusal = why_not_compiled(model)
    models = (dense, model)
    sides = [(own, "transformers") for own in models] + [(own, "compiled") for own in models if refusal is None]
    runs: list[list[Decoded]] = [[] for _ in sides]
    parts: list[tuple[float, float, float]] = []
    done, all_texts = 0, len(sides) * rounds + len(models)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, all_texts)

    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for _ in range(rounds):
        for (own, decoder), found in zip(sides, runs, strict=True):
            found.append(decode(own, tokenizer, ids, decoder=decoder, **options))
            step()
    for own in models:
        parts.append(_profile(own, tokenizer, ids, new_tokens, names))
        step()
    of_dense, of_packed = (TokenTimes(_speed(found), *part) for found, part in zip(runs, parts, strict=False))
    plain = DecodingTimes(new_tokens, rounds, of_dense, of_packed, _same(*runs[:2]), refusal=refusal)
    if refusal is not None:
        return plain
    steps: dict[str, Any] = {"dense_step": _step_times(runs[2]), "packed_step": _step_times(runs[3])}
    return replace(plain, **steps, same_tokens_of_step=_same(runs[1], runs[3]))


def _speed(runs: list[Decoded]) -> float:
    """Median tokens a second after the first new token."""
    return statistics.median((len(run.tokens) - 1) / (run.times[-1] - run.times[1]) for run in runs)


def _same(one: list[Decoded], other: list[Decoded]) -> int:
    """The number of tokens before the first that differs."""
    pairs = zip(one[-1].tokens, other[-1].tokens, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one[-1].tokens))


def _step_times(runs: list[Decoded]) -> StepTimes:
    whole = statistics.median(1e3 * (run.times[-1] - run.times[1]) / (len(run.tokens) - 1) for run in runs)
    products, attention = (
        statistics.median(1e3 * run.step.seconds[part] / run.step.steps for run in runs if run.step) for part in (0, 1)
    )
    return StepTimes(_speed(runs), products, attention, max(0.0, whole - products - attention))


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
            decoder="transformers",
            stopped=first_token_is_there,
        )
    finally:
        for hook in hooks:
            hook.remove()
    count = new_tokens - 1
    whole = 1e3 * (found.times[-1] - found.times[1]) / count
    named, others = (1e3 * spent[kind] / count for kind in (True, False))
    return named, others, max(0.0, whole - named - others)
