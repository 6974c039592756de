"""One batch from the decoding steps of several threads, each of which generates as if alone."""

from __future__ import annotations

import copy
import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..decoding.step import CompiledStep, Proven, prove, step_together
from ..dispatched.hooks import input_device

OPTIONS = frozenset({"use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"})
"""Arguments of a forward that are the same for all rows of a batch."""

Random = tuple[torch.Tensor, torch.Tensor | None]
"""The state of torch's random generator on the CPU, and of the one on the model's GPU."""


class Joint:
    """A model whose forward waits until every member thread calls it, and then runs all of them.

    One step of decoding of each member becomes one row of a batch: of a forward of transformers, or of the compiled
    step. A prompt runs alone, in the same round. Each member has its own cache, so members come and go between two
    tokens. Only one thread runs at a time, and each has torch's random state for itself, so a member draws what it
    would draw alone.

    Args:
        model: a causal language model of transformers.

    Attributes:
        model: the same model, with the forward that waits. Call it only within :meth:`member`.
    """

    def __init__(self, model: Any) -> None:
        self._whole = model
        self._proven: Proven | None = None
        self._device = input_device(model)
        self._turn = threading.Condition()
        self._members = 0
        self._calls: list[_Call] = []
        self._closed = False
        self.model = copy.copy(model)
        usual = model.forward

        @functools.wraps(usual)  # transformers reads its signature.
        def forward(**arguments: Any) -> Any:
            return self._wait(_Forward(self._random(), usual, arguments))

        self.model.forward = forward
        threading.Thread(target=self._work, name="ace-triton model", daemon=True).start()

    @contextmanager
    def member(self) -> Iterator[None]:
        """This thread takes part until the block ends."""
        with self._turn:
            self._members += 1
            try:
                yield
            finally:
                self._members -= 1
                self._turn.notify_all()

    def step(self, _: Any, capacity: int) -> CompiledStep:
        """As ``CompiledStep(model, capacity)``; the steps of several members run together.

        Call it only within :meth:`member`.

        Raises:
            StepRefusedError: if the compiled step does not decode the model or this number of tokens.
        """
        self._proven = prove(self._whole, self._proven)
        return _JointText(self, capacity, self._proven)

    def close(self) -> None:
        """End the thread that runs the model, once there is no member."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _wait(self, call: _Call) -> Any:
        """The outputs of a call of a member, after the other members have called too."""
        self._calls.append(call)
        self._turn.notify_all()
        self._turn.wait_for(lambda: call.done)
        self._restore(call.random)
        if call.error is not None:
            raise call.error
        return call.outputs

    @torch.inference_mode()
    def _work(self) -> None:
        """One thread runs the model, so that it has one pool of workers."""
        with self._turn:
            while not (self._closed and not self._members):
                self._turn.wait_for(self._ready)
                calls, self._calls = self._calls, []
                for group in _groups(calls):
                    _run(group)
                self._turn.notify_all()

    def _ready(self) -> bool:
        return len(self._calls) == self._members and (self._members > 0 or self._closed)

    def _random(self) -> Random:
        gpu = self._device if self._device.type == "cuda" else None
        return torch.get_rng_state(), None if gpu is None else torch.cuda.get_rng_state(gpu)

    def _restore(self, state: Random) -> None:
        cpu, gpu = state
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, self._device)


@dataclass
class _Call(ABC):
    """A member's call of the model.

    Attributes:
        random: the member's random state.
        outputs: what the call returned.
        error: what it raised instead.
        done: True if it has run.
    """

    random: Random
    outputs: Any = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    done: bool = field(default=False, init=False)

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """The same for calls that fit into one batch; None if the call must run alone."""

    @abstractmethod
    def together(self, calls: Sequence[Any]) -> Sequence[Any]:
        """The outputs of calls of this kind, this one among them."""


@dataclass
class _Step(_Call):
    """A call of the compiled step."""

    text: CompiledStep
    token: torch.Tensor

    @property
    def kind(self) -> Hashable:
        return id(self.text.proven)

    def together(self, calls: Sequence[_Step]) -> Sequence[torch.Tensor]:
        return step_together([call.text for call in calls], torch.cat([call.token for call in calls])).split(1)


class _JointText(CompiledStep):
    """A text whose steps run together with those of other members."""

    def __init__(self, joint: Joint, capacity: int, proven: Proven) -> None:
        super().__init__(joint.model, capacity, proven)
        self._joint = joint

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._joint._wait(_Step(self._joint._random(), self, token))
        return logits


@dataclass
class _Forward(_Call):
    """A call of the model's forward."""

    forward: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def kind(self) -> Hashable:
        if self.cache is None:
            return None
        options = sorted((name, repr(value)) for name, value in self.arguments.items() if name in OPTIONS)
        return self.arguments.get("position_ids") is None, *options

    def together(self, calls: Sequence[_Forward]) -> Sequence[Any]:
        if len(calls) == 1:
            return [self.forward(**self.arguments)]
        outputs = self.forward(**_joined(calls))
        caches = [name for name, value in outputs.items() if isinstance(value, Cache)]
        logits = outputs.logits.split(1)
        return [
            type(outputs)(logits=own, **dict.fromkeys(caches, call.cache))
            for own, call in zip(logits, calls, strict=True)
        ]

    @functools.cached_property
    def cache(self) -> Cache | None:
        """The cache, if the call is a step of decoding that can be a row of a batch; else None."""
        caches = {name: value for name, value in self.arguments.items() if isinstance(value, Cache)}
        ids = self.arguments.get("input_ids")
        if len(caches) != 1 or ids is None or ids.shape != (1, 1):
            return None
        ((name, cache),) = caches.items()
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
        given = {key for key, value in self.arguments.items() if value is not None}
        known = given <= {name, "input_ids", "attention_mask", "position_ids"} | OPTIONS
        shapes = {"attention_mask": (1, cache.get_seq_length() + 1), "position_ids": (1, 1)}
        fit = all(self.arguments[key].shape == shape for key, shape in shapes.items() if key in given)
        return cache if plain and known and fit and cache.layers else None

    @property
    def mask(self) -> torch.Tensor:
        """1 for the real tokens, int64 [1, length]; transformers leaves it out if there is no padding."""
        mask: torch.Tensor | None = self.arguments.get("attention_mask")
        if mask is None:
            assert self.cache is not None
            mask = self.arguments["input_ids"].new_ones(1, self.cache.get_seq_length() + 1)
        return mask


def _groups(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls that fit into one batch together; those that run alone come last."""
    groups: dict[Hashable, list[_Call]] = {}
    for call in calls:
        groups.setdefault(call.kind, []).append(call)
    alone = groups.pop(None, [])
    return [*groups.values(), *([call] for call in alone)]


def _run(calls: Sequence[_Call]) -> None:
    """Run calls of one kind."""
    try:
        for call, outputs in zip(calls, calls[0].together(calls), strict=True):
            call.outputs = outputs
    except Exception as error:  # Each member gets it, and says whether it goes on.
        for call in calls:
            call.error = error
    for call in calls:
        call.done = True


def _joined(calls: Sequence[_Forward]) -> dict[str, Any]:
    """The arguments of one forward for all calls: rows are padded on the left."""
    first = calls[0].arguments
    masks = [call.mask for call in calls]
    longest = max(mask.shape[1] for mask in masks)
    joined = {name: value for name, value in first.items() if name in OPTIONS}
    joined["attention_mask"] = torch.cat(
        [torch.nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks]
    )
    for name in ("input_ids", "position_ids"):
        if first.get(name) is not None:
            joined[name] = torch.cat([call.arguments[name] for call in calls])
    (name,) = [name for name, value in first.items() if isinstance(value, Cache)]
    rows = [call.cache for call in calls]
    layers = zip(*(row.layers for row in rows if row is not None), strict=True)
    joined[name] = Cache(layers=[_JoinedLayer(own) for own in layers])
    return joined


class _JoinedLayer(DynamicLayer):
    """The caches of several rows as one, padded on the left. Each row's own cache grows."""

    _layer_type = None  # Else this class would stand for all layers of its type.

    def __init__(self, rows: Sequence[DynamicLayer]) -> None:
        super().__init__()
        self._rows = rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for row, layer in enumerate(self._rows):
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
        return _stacked([layer.keys for layer in self._rows]), _stacked([layer.values for layer in self._rows])

    def get_seq_length(self) -> int:
        return max(int(layer.get_seq_length()) for layer in self._rows)


def _stacked(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Tensors [1, heads, length, size] as one, with zeros before the shorter ones."""
    given = [part for part in parts if part is not None]
    longest = max(part.shape[-2] for part in given)
    stacked = given[0].new_zeros(len(given), *given[0].shape[1:-2], longest, given[0].shape[-1])
    for row, part in enumerate(given):
        stacked[row, ..., longest - part.shape[-2] :, :] = part[0]
    return stacked
