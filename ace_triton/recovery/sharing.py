"""Recovery by several processes: each holds both models, and computes the gradient of its share of every step.

A step reads the same sequences as in one process, and its learning rate is the same for the same spent budget. The
gradients of the shares are added up in fp32 by torch.distributed. Each process rounds its own gradient first, and the
sum of shares is not the sum that one process computes over all sequences at once, so losses and weights agree with
those of one process to rounding only. With the same number of processes on the same machines, a run gives the same bits
again, if the communication library adds in a fixed order, as gloo does.

All processes take the same optimizer step, so their weights stay equal bit for bit. The first process writes the state.
The state does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import RecoveryError
from ..out_of_memory import is_out_of_memory
from ..processes import Processes
from .text import Batches


def share_of(ids: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The sequences of a step, int64 [n_sequences, length], that this process reads."""
    begin, end = (rank * len(ids) // processes.size for rank in (processes.rank, processes.rank + 1))
    return ids[begin:end]


def check_shares(batches: Batches, processes: Processes) -> None:
    """Raise RecoveryError if a step has fewer sequences than there are processes."""
    if batches.sequences < processes.size:
        raise RecoveryError(
            f"a step of {batches.tokens} tokens has {batches.sequences} sequences of {batches.length} tokens, fewer "
            f"than the {processes.size} processes: use --tokens-per-step {processes.size * batches.length} or more, or "
            "fewer processes"
        )


def check_equal(identity: str, processes: Processes) -> None:
    """Raise RecoveryError if the processes do not train the same model on the same text, by their fingerprints."""
    if not processes.agree(identity):
        raise RecoveryError(
            "the processes have different settings, text, weights or teachers: give all hosts the same files and the "
            "same command"
        )


def passes_of(sequences: int, most: int, processes: Processes) -> int:
    """Number of forward and backward passes of a step, equal in all processes, each of at least one sequence.

    Args:
        sequences: number of sequences in the step, at least as many as processes.
        most: number of sequences in a pass that should not be exceeded by more than one.
        processes: the processes that share the step.
    """
    least, largest = sequences // processes.size, -(-sequences // processes.size)
    return max(1, min(least, -(-largest // most)))


@contextmanager
def whole_models(processes: Processes, *, shard: bool = False) -> Iterator[None]:
    """Raise RecoveryError that says what each process holds if memory runs out inside the block.

    Args:
        processes: the processes of the run.
        shard: True if each process holds a share of the blocks' weights.
    """
    try:
        yield
    except Exception as error:
        if processes.size == 1 or not is_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0] or type(error).__name__
        if shard:
            raise RecoveryError(
                f"memory ran out: each of the {processes.size} processes holds its share of the blocks' weights, 14 "
                "bytes for each trained weight of its share, and the embeddings and heads whole: use more processes "
                f"with a device each, or a smaller --tokens-per-step or --length ({why})"
            ) from error
        raise RecoveryError(
            f"memory ran out: each of the {processes.size} processes holds the whole model, the whole teacher and 15 "
            "bytes for each trained weight. Processes share the text, not the weights: add --shard, use devices with "
            f"more memory, or fewer processes on one machine ({why})"
        ) from error
