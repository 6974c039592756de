"""How far a pruned model agrees with its dense model on any inputs: embeddings, their neighbors, and predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from .decoders.batches import Batch, run_model
from .errors import ArgumentError

Inputs = Mapping[str, torch.Tensor]
Progress = Callable[[int, int], None]
Pooling = Literal["mean", "cls", "last"]
"""How the hidden states of a sequence become one embedding: their mean, the first or the last one, without padding."""

NEIGHBORS = 10
ROWS_AT_ONCE = 512
"""Rows of the similarity matrix, or of logits in double precision, that are in memory at once."""


@dataclass(frozen=True)
class EmbeddingAgreement:
    """Agreement of embeddings.

    Attributes:
        inputs: number of inputs.
        cosine: mean cosine of an input's pruned embedding and its dense one.
        least_cosine: the smallest of these cosines.
        neighbors: number of nearest neighbors of an input among the others, by cosine.
        recall: share of the dense neighbors that are pruned neighbors too; mean over all inputs.
        pooling: how embeddings were made; None if the model makes them itself.
    """

    inputs: int
    cosine: float
    least_cosine: float
    neighbors: int
    recall: float
    pooling: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class PredictionAgreement:
    """Agreement of predictions: one for each input of a classifier, or for each token without padding.

    Attributes:
        predictions: number of predictions.
        top1: share in which both models choose the same class or token.
        divergence: mean Kullback-Leibler divergence of the pruned model's distribution from the dense one, in nats.
    """

    predictions: int
    top1: float
    divergence: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def embedding_agreement(
    dense: torch.Tensor, pruned: torch.Tensor, *, neighbors: int = NEIGHBORS, pooling: str | None = None
) -> EmbeddingAgreement:
    """Compare two models' embeddings of the same inputs.

    Args:
        dense: the dense model's embeddings [n_inputs, width]; they need no norm of 1.
        pruned: the pruned model's, of the same inputs.
        neighbors: number of nearest neighbors.
        pooling: how they were made, for the result.

    Raises:
        ArgumentError: if the shapes differ, or there are not more inputs than neighbors.
    """
    if dense.shape != pruned.shape or dense.dim() != 2:
        raise ArgumentError(
            f"embeddings must have one shape [n_inputs, width], got {tuple(dense.shape)} and {tuple(pruned.shape)}"
        )
    if not 1 <= neighbors < len(dense):
        raise ArgumentError(
            f"{len(dense)} inputs have no {neighbors} neighbors each: give more inputs, or ask for fewer neighbors "
            "(evaluate --neighbors)"
        )
    one, other = (torch.nn.functional.normalize(rows.float(), dim=1) for rows in (dense, pruned))
    cosines = (one * other).sum(1)
    kept = sum(
        int((of_dense[:, :, None] == of_pruned[:, None, :]).sum())
        for of_dense, of_pruned in zip(_nearest(one, neighbors), _nearest(other, neighbors), strict=True)
    )
    return EmbeddingAgreement(
        len(dense),
        float(cosines.mean()),
        float(cosines.min()),
        neighbors,
        kept / (len(dense) * neighbors),
        pooling,
    )


def _nearest(rows: torch.Tensor, neighbors: int) -> Iterator[torch.Tensor]:
    """Indices of each row's nearest other rows, int64 [n_rows, neighbors], in parts."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        similar = rows[start : start + ROWS_AT_ONCE] @ rows.t()
        own = torch.arange(len(similar), device=rows.device)
        similar[own, start + own] = -torch.inf
        yield similar.topk(neighbors, dim=1).indices


def embeddings(
    model: Any, batches: Sequence[Inputs], *, pooling: Pooling = "mean", progress: Progress | None = None
) -> torch.Tensor:
    """A model's embeddings of inputs, fp32 [n_inputs, width], on the CPU, with norm 1.

    A model that makes embeddings itself (CLIP's of text and images) gives both, one after the other. Otherwise the last
    hidden states are pooled; of an encoder-decoder those of its encoder.

    Args:
        model: a model of transformers.
        batches: its inputs, as for :func:`~ace_triton.prune_blocks.prune_model`.
        pooling: how hidden states become an embedding.
        progress: called with the number of batches done and of all batches.

    Raises:
        ArgumentError: if the pooling is unknown, or the model's outputs hold no hidden states.
    """
    if pooling not in get_args(Pooling):
        raise ArgumentError(f"pooling {pooling!r}: use {', '.join(get_args(Pooling))}")
    found = []
    for inputs, output in _outputs(model, batches, progress):
        found.append(torch.nn.functional.normalize(embedding_of(inputs, output, pooling).float(), dim=1).cpu())
    return torch.cat(found)


def embedding_of(inputs: Inputs, output: Any, pooling: Pooling) -> torch.Tensor:
    """The embeddings of a batch [n_inputs, width].

    Args:
        inputs: the model's inputs.
        output: the output of its forward.
        pooling: how hidden states become an embedding.

    Raises:
        ArgumentError: if the output holds no hidden states.
    """
    own = [output[name] for name in ("text_embeds", "image_embeds") if output.get(name) is not None]
    if own:
        return torch.cat(own, 1)
    hidden = output.get("encoder_last_hidden_state")
    hidden = output.get("last_hidden_state") if hidden is None else hidden
    if hidden is None:
        hidden = (output.get("hidden_states") or [None])[-1]
    if hidden is None:
        raise ArgumentError(
            f"a {type(output).__name__} holds no hidden states: load the model with --task embedding (AutoModel)"
        )
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden  # Channels first, as in ConvNeXt.
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    if pooling == "mean":
        weights = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weights).sum(1) / weights.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device) * mask
    chosen = mask.argmax(1) if pooling == "cls" else places.argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def prediction_agreement(
    dense: Any, pruned: Any, batches: Sequence[Inputs], *, progress: Progress | None = None
) -> PredictionAgreement:
    """Compare two models' predictions on the same inputs.

    Args:
        dense: a model of transformers with logits [..., n_classes].
        pruned: another, with the same classes.
        batches: their inputs, as for :func:`~ace_triton.prune_blocks.prune_model`.
        progress: called with the number of batches done and of all batches.

    Raises:
        ArgumentError: if an output has no logits, or the two have different classes.
    """
    count, same, divergence = 0, 0, 0.0
    both = zip(_outputs(dense, batches, None), _outputs(pruned, batches, progress), strict=True)
    for (inputs, of_dense), (_, of_pruned) in both:
        one, other = (logits_of(inputs, output).float().cpu() for output in (of_dense, of_pruned))
        if one.shape != other.shape:
            raise ArgumentError(
                f"the logits of the two models differ in shape, {tuple(one.shape)} and {tuple(other.shape)}: name the "
                "dense model that the pruned one was made from"
            )
        count += len(one)
        for rows, others in zip(one.split(ROWS_AT_ONCE), other.split(ROWS_AT_ONCE), strict=True):
            log_one, log_other = rows.double().log_softmax(-1), others.double().log_softmax(-1)
            same += int((rows.argmax(-1) == others.argmax(-1)).sum())
            divergence += float((log_one.exp() * (log_one - log_other)).sum())
    return PredictionAgreement(count, same / count, divergence / count)


def logits_of(inputs: Inputs, output: Any) -> torch.Tensor:
    """The logits of a batch without padding [n_predictions, n_classes].

    Args:
        inputs: the model's inputs.
        output: the output of its forward.

    Raises:
        ArgumentError: if the output holds no logits.
    """
    logits = output.get("logits")
    if logits is None:
        logits = output.get("logits_per_image")  # CLIP: which text fits an image.
    if logits is None:
        raise ArgumentError(f"a {type(output).__name__} holds no logits: compare its embeddings (--task embedding)")
    masks = [inputs.get(name) for name in ("decoder_attention_mask", "attention_mask")]
    valid = next((m.bool() for m in masks if m is not None and logits.dim() == 3 and m.shape == logits.shape[:2]), None)
    return logits.reshape(-1, logits.shape[-1]) if valid is None else logits[valid]


def _outputs(model: Any, batches: Sequence[Inputs], progress: Progress | None) -> Iterator[tuple[Inputs, Any]]:
    """The inputs of each batch, on the model's device, and the model's output."""
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        for done, batch in enumerate(batches, 1):
            inputs = {
                name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in batch.items()
            }
            with torch.no_grad():
                output = run_model(model, Batch(inputs))
            yield inputs, output
            if progress is not None:
                progress(done, len(batches))
    finally:
        model.train(was_training)
