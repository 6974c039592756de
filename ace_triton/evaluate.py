"""Perplexity over non-overlapping windows, as Wanda, RIA and SparseGPT measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .decoders.batches import vocabulary_of
from .decoders.parts_of_logits import head_by_parts, parts_of
from .dispatched.hooks import input_device
from .errors import TextError
from .inputs.beginnings import NO_BEGINNING, Beginning
from .processes import Processes
from .threads import few_threads, forward_work

Logits = Callable[[torch.Tensor], Iterable[Iterable[torch.Tensor]]]
"""Computes the logits of each of some windows, int64 [n_windows, length], in order: for each window those of its parts
(:mod:`~ace_triton.decoders.parts_of_logits`), [n_tokens, vocabulary]."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token, in nats, over all predicted tokens.
        windows, length: number of windows, and of tokens in each.
        tokens: number of predicted tokens: in each window all but its beginning, or all but the first token if the
            beginning is empty.
        bos: the beginning of every window: "none", or as "each (1)" or "stream (1)", with the token id.
    """

    perplexity: float
    windows: int
    length: int
    tokens: int
    bos: str = "none"

    def to_dict(self) -> dict[str, float | int | str]:
        """As JSON types."""
        return asdict(self)


def perplexity(
    model: Any,
    ids: torch.Tensor,
    *,
    length: int = 2048,
    windows: int | None = None,
    beginning: Beginning = NO_BEGINNING,
    progress: Callable[[int, int], None] | None = None,
    logits: Logits | None = None,
) -> Perplexity:
    """Perplexity of a causal model on a stream of tokens.

    Args:
        model: a Hugging Face causal model; it runs in its own dtype. Log-likelihoods are fp32.
        ids: int64 [n_tokens], from :func:`~ace_triton.inputs.beginnings.text_ids`.
        length: tokens in a window (:func:`windows_of`).
        windows: largest number of windows, counted from the start; None for all.
        beginning: tokens that every window begins with. If it is empty, each window's first token is only context.
        progress: called with the number of windows done and the number of all windows.
        logits: computes the logits of all windows; None to run the model on one window after the other.

    Raises:
        TextError: the text has fewer tokens than one window, or a token id that the model's vocabulary does not have.
    """
    cut = windows_of(ids, length, beginning, windows)
    skipped = max(1, len(beginning.of_each))
    value = perplexity_of(model, cut, skipped=skipped, progress=progress, logits=logits)
    return Perplexity(value, len(cut), length, len(cut) * (length - skipped), str(beginning))


def windows_of(
    ids: torch.Tensor, length: int, beginning: Beginning = NO_BEGINNING, most: int | None = None
) -> torch.Tensor:
    """Cut a stream of tokens into windows without overlap, int64 [n_windows, length], and drop the rest.

    Args:
        ids: int64 [n_tokens].
        length: tokens in a window, its beginning included.
        beginning: tokens that every window begins with.
        most: largest number of windows, counted from the start; None for all.

    Raises:
        TextError: the text has fewer tokens than one window.
    """
    check_windows(length, most)
    text = beginning.text_length(length)
    count = len(ids) // text if most is None else min(most, len(ids) // text)
    if count < 1:
        raise TextError(
            f"the text has {len(ids)} tokens, one window needs {text}: give more text or a smaller --length"
        )
    return beginning.before(ids[: count * text].view(count, text))


def check_windows(length: int, windows: int | None) -> None:
    """Raise TextError if a window has fewer than 2 tokens, or if there is no window."""
    if length < 2:
        raise TextError(f"a window needs at least 2 tokens, got {length}")
    if windows is not None and windows < 1:
        raise TextError(f"the number of windows must be at least 1, got {windows}")


@torch.no_grad()
def perplexity_of(
    model: Any,
    windows: torch.Tensor,
    *,
    skipped: int = 1,
    progress: Callable[[int, int], None] | None = None,
    logits: Logits | None = None,
) -> float:
    """Perplexity of a causal model over windows.

    If several processes are in one group, all must call this with the same arguments. Each runs a share of the windows,
    and their losses are added in the order of the windows, so the number of processes does not change the result.

    Args:
        model: as for :func:`perplexity`.
        windows: int64 [n_windows, length].
        skipped: number of tokens at the start of a window that are only context, at least 1.
        progress: called with the number of windows done in all processes, as if they were equally fast, and the number
            of all windows.
        logits: as for :func:`perplexity`.

    Raises:
        TextError: a token id is not in the model's vocabulary.
    """
    if (largest := int(windows.max())) >= vocabulary_of(model):
        raise TextError(
            f"the text has token id {largest}, the model's vocabulary ends at {vocabulary_of(model) - 1}: evaluate it "
            "with the model's own tokenizer"
        )
    processes = Processes.now()
    was_training = model.training
    model.eval()
    own: list[float] = []
    try:
        with few_threads(forward_work(model, windows.shape[1])):
            mine = windows[processes.rank :: processes.size].to(input_device(model))
            of_windows = _own_logits(model, mine) if logits is None else logits(mine)
            for parts in of_windows:
                own.append(_loss(skipped, parts, mine[len(own)]))
                del parts  # Before the next window's logits are computed.
                if progress is not None:
                    progress(min(len(own) * processes.size, len(windows)), len(windows))
    finally:
        model.train(was_training)
    loss = 0.0
    for of_window in processes.in_order(own):  # sum() would round in another way.
        loss += of_window
    mean = loss / (len(windows) * (windows.shape[1] - skipped))
    return math.exp(mean) if mean < 700 else math.inf


def _loss(skipped: int, parts: Iterable[torch.Tensor], window: torch.Tensor) -> float:
    """The sum of the negative log-likelihoods of a window's predicted tokens, from the logits of its parts."""
    loss, start = 0.0, 0
    for logits in parts:
        end = start + len(logits)
        first, last = max(start, skipped - 1), min(end, len(window) - 1)
        if first < last:
            predicted, targets = logits[first - start : last - start].float(), window[first + 1 : last + 1]
            loss += float(torch.nn.functional.cross_entropy(predicted, targets, reduction="sum"))
        start = end
    return loss


def _own_logits(model: Any, windows: torch.Tensor) -> Iterator[Iterable[torch.Tensor]]:
    """The logits of each window in the model's own forward."""
    for window in windows:
        yield whole_logits(model, window)


def whole_logits(model: Any, window: torch.Tensor) -> list[torch.Tensor]:
    """The logits [n_tokens, vocabulary] of the parts of a window, int64 [length], from one forward of the model."""
    with head_by_parts(model):
        logits: torch.Tensor = model(window[None], use_cache=False).logits[0]
    return [logits[part] for part in parts_of(len(logits))]
