"""Measure the perplexity of a checkpoint while only the block in work is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..decoders.batches import Batch
from ..decoders.blocks import find_blocks
from ..decoders.kept_tensors import Offload, check_offload, keeper, offload_to
from ..decoders.replay import Replay, make_runner
from ..errors import ArgumentError, CheckpointError
from ..evaluate import Logits, Perplexity, perplexity, whole_logits
from ..formats.registry import format_of
from ..inputs import checkpoint
from ..inputs.beginnings import NO_BEGINNING, Beginning
from ..timing import Stopwatch
from .loaded_on_use import LoadedOnUse

Steps = Callable[[int, int], None]


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model whose weights stay in its files, from :func:`opened`.

    Attributes:
        model: the model. It has the right weights inside its forward only.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any
    _weights: LoadedOnUse
    _offload_folder: Path | None

    def logits(self, progress: Steps | None = None) -> Logits:
        """What :func:`~ace_triton.evaluate.perplexity` computes the logits with: all windows go through each block.

        Args:
            progress: called with the number of steps done and of all steps. A step is a block, or a window if the
                blocks cannot be run one at a time.
        """
        return lambda windows: self._each_logits(windows, progress or _ignore)

    def _each_logits(self, windows: torch.Tensor, progress: Steps) -> Iterator[Iterable[torch.Tensor]]:
        model, weights = self.model, self._weights
        blocks, batches = find_blocks(model), [Batch.of_ids(window[None]) for window in windows]
        clock = Stopwatch(torch.device("cpu"))
        with weights.loaded(model):
            runner = make_runner(model, blocks, batches, clock, keep=keeper(self._offload_folder), to_logits=True)
        if not isinstance(runner, Replay):
            for done, window in enumerate(windows, 1):
                parts = whole_logits(model, window)
                if any(part.isnan().any() for part in parts):  # Weights that are not loaded are NaN.
                    raise ArgumentError("the logits have NaN: evaluate the model in memory, without --stream")
                yield parts
                del parts  # Before the next window's logits are computed.
                progress(done, len(windows))
            return
        for index, block in enumerate(blocks):
            with weights.loaded(block.module):
                runner.run(index, None, advance=True)
            progress(index + 1, len(blocks))
        with weights.loaded(model):
            for number in range(len(batches)):
                yield (part[0] for part in runner.logits(number))


@contextmanager
def opened(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    offload: Offload = "memory",
    folder: str | Path | None = None,
) -> Iterator[OpenCheckpoint]:
    """Open a checkpoint whose weights stay in its files.

    Args:
        source, dtype, trust_remote_code, offload, folder: as for :func:`perplexity_of_checkpoint`.

    Raises:
        ArgumentError: if ``offload`` is unknown.
        CheckpointError: if the model cannot be loaded or streamed.
    """
    check_offload(offload)
    if (kind := format_of(source).name) != "dense":
        raise CheckpointError(f"{source}: is in the format {kind!r}, which cannot be streamed: leave --stream out")
    with tempfile.TemporaryDirectory(prefix="ace-triton-", dir=offload_to(folder)) as temporary:
        place = Path(temporary)
        model, tokenizer = checkpoint.load(
            source, dtype=dtype, trust_remote_code=trust_remote_code, offload_folder=place / "converted"
        )
        yield OpenCheckpoint(model, tokenizer, LoadedOnUse(model, place), place if offload == "disk" else None)


def perplexity_of_checkpoint(
    source: str | Path,
    ids: torch.Tensor,
    *,
    length: int = 2048,
    windows: int | None = None,
    beginning: Beginning = NO_BEGINNING,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    offload: Offload = "memory",
    folder: str | Path | None = None,
    progress: Steps | None = None,
) -> Perplexity:
    """Perplexity of a checkpoint on a stream of tokens, with one block of the model in memory at a time.

    All windows go through a block before the next block is loaded. The result is that of
    :func:`~ace_triton.evaluate.perplexity` for the model in memory. It runs on the CPU.

    If the blocks cannot be run one at a time, the whole model runs on each window, with a warning.

    Args:
        source: a folder or hub name that transformers loads, or a GGUF file; no packed checkpoint.
        ids: int64 [n_tokens], the text by the model's own tokenizer.
        length: tokens in a window, its beginning included. Windows do not overlap.
        windows: largest number of windows, counted from the start; None for all.
        beginning: tokens that every window begins with. If it is empty, each window's first token is only context.
        dtype: dtype of the weights; "auto" keeps the checkpoint's. Otherwise each block is converted when it is loaded.
        trust_remote_code: run Python code that comes with the checkpoint.
        offload: where the hidden states of the windows are kept between blocks: in memory, or in files in ``folder``.
        folder: folder for temporary files, such as weights that transformers converts; None for the system's folder
            (``TMPDIR``). They are removed at the end.
        progress: called with the number of steps done and of all steps. A step is a block, or a window if the blocks
            cannot be run one at a time.

    Raises:
        ArgumentError: if hidden states have NaN or infinity, the model changes its own weights, or ``offload`` is
            unknown.
        CheckpointError: if the model cannot be loaded or streamed, or the disk is full.
        TextError: the text has fewer tokens than one window, or a token id that the model's vocabulary does not have.
    """
    with opened(source, dtype=dtype, trust_remote_code=trust_remote_code, offload=offload, folder=folder) as found:
        return perplexity(
            found.model, ids, length=length, windows=windows, beginning=beginning, logits=found.logits(progress)
        )


def _ignore(_done: int, _total: int) -> None:
    pass
