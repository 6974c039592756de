"""Published pruning methods, written from their formulas, to compare speed and masks with.

Higher scores are kept. The selections take the number of weights to *prune*, as the published code does, and write
zeros in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class InputNorms:
    """Wanda's and RIA's running statistic of a layer's input.

    Attributes:
        mean_square: fp32 [in_features], sum of x^2 over all tokens, over the number of sequences.
        n_sequences: number of sequences so far.
    """

    mean_square: torch.Tensor
    n_sequences: int = 0

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens [n_sequences, length, in_features] like the published hooks: rescale, then add the batch."""
        n_before, self.n_sequences = self.n_sequences, self.n_sequences + len(tokens)
        channels = tokens.flatten(0, 1).t().float()
        self.mean_square *= n_before / self.n_sequences
        self.mean_square += torch.norm(channels, p=2, dim=1) ** 2 / self.n_sequences


def cosine_loss(tokens: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """CosP's mean_t |a_ti x_tj| / ||a_t||^2, [out, in], from tokens [T, in] and outputs [T, out] (ACE).

    The mean of absolute values over tokens is a reconstruction.
    """
    tokens, outputs = tokens.float(), outputs.float()
    weighted = outputs.abs() / outputs.square().sum(1, keepdim=True)
    return weighted.t() @ tokens.abs() / len(tokens)


def exact_cosine_loss(tokens: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """mean_t x_tj^2 / ||a_t||^2, [in]: the second-order term of 1 - cos without |W|^2 / 2, which ACE's text omits."""
    return (tokens.float().square() / outputs.float().square().sum(1, keepdim=True)).mean(0)


def variance_factor(sequence_square: torch.Tensor, eps: float = 0.01) -> torch.Tensor:
    """VarP's E[1 / (1 - y)], [in], from squared norms [n_sequences, in] over their maximum (ACE).

    The divisor is a reconstruction.
    """
    y = (1 - eps) * sequence_square / sequence_square.max()
    return (1 / (1 - y)).mean(0)


def convergent_variance_factor(sequence_square: torch.Tensor, eps: float = 0.01) -> torch.Tensor:
    """VarP with every sequence divided by its sum over channels, so that ACE's power series converges."""
    y = sequence_square / sequence_square.sum(1, keepdim=True)
    return (1 / (1 - y.clamp(max=1 - eps))).mean(0)


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """|W|."""
    return weight.abs()


def wanda_scores(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """|W| sqrt(mean over sequences of sum_t x_tj^2) (Sun et al., ICLR 2024)."""
    return weight.abs() * mean_square.sqrt().reshape(1, -1)


def ria_scores(weight: torch.Tensor, mean_square: torch.Tensor, a: float = 0.5) -> torch.Tensor:
    """(|W| / column sum + |W| / row sum) sqrt(mean square)^a, quotients in fp32 (Zhang et al., ICLR 2024)."""
    return relative_importance(weight) * (mean_square.sqrt() ** a).reshape(1, -1)


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """|W| / column sum + |W| / row sum."""
    magnitude = weight.float().abs()
    return magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1).reshape(-1, 1)


def ace_scores(
    weight: torch.Tensor, mean_square: torch.Tensor, loss: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Wanda's score times |W| L (CosP) times VarP's factor (ACE, arXiv 2505.21987)."""
    magnitude = weight.float().abs()
    return magnitude * mean_square.sqrt().reshape(1, -1) * (magnitude * loss) * factor.reshape(1, -1)


def exact_ace_scores(weight: torch.Tensor, loss: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The package's "ace" in plain torch: relative importance times the root of the loss over the factor."""
    return relative_importance(weight) * (loss.sqrt() / factor).reshape(1, -1)


def prune_groups(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int, m: int) -> None:
    """Prune the n lowest of every m consecutive columns in each row, by a loop over the groups."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    for first in range(0, scores.shape[1], m):
        lowest = scores[:, first : first + m].float().topk(n_pruned, dim=1, largest=False).indices
        pruned.scatter_(1, first + lowest, True)
    weight[pruned] = 0


def prune_rows_by_sort(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """Prune the n lowest of every row by a stable sort, as the published code for unstructured Wanda does."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    lowest = scores.sort(dim=-1, stable=True).indices[:, :n_pruned]
    pruned.scatter_(1, lowest, True)
    weight[pruned] = 0


def prune_rows_by_topk(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """Prune the n lowest of every row by top-k: faster than the sort, but ties have no order."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    pruned.scatter_(1, scores.topk(n_pruned, dim=1, largest=False).indices, True)
    weight[pruned] = 0


def prune_layer(weight: torch.Tensor, scores: torch.Tensor, n_pruned: int) -> None:
    """Prune the n lowest of the whole layer by a threshold from a sort; more if scores tie at the threshold."""
    threshold = scores.flatten().sort().values[n_pruned - 1]
    weight[scores <= threshold] = 0


@dataclass
class Hessian:
    """SparseGPT's running statistic of a layer's input.

    Attributes:
        matrix: fp32 [in_features, in_features], 2 X^T X over all tokens, over the number of sequences.
        n_sequences: number of sequences so far.
    """

    matrix: torch.Tensor
    n_sequences: int = 0

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens [n_sequences, length, in_features] like the published hook: rescale, then add the batch."""
        n_before, self.n_sequences = self.n_sequences, self.n_sequences + len(tokens)
        flat = (2 / self.n_sequences) ** 0.5 * tokens.flatten(0, 1).float()
        self.matrix *= n_before / self.n_sequences
        self.matrix += flat.t() @ flat


def hessian(tokens: torch.Tensor) -> torch.Tensor:
    """The matrix of a single batch, fp32 [in, in], from tokens [n_sequences, length, in]."""
    whole = Hessian(tokens.new_zeros(tokens.shape[-1], tokens.shape[-1], dtype=torch.float32))
    whole.add(tokens)
    return whole.matrix


def prune_by_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, n_pruned: int, m: int, block: int = 128, damping: float = 0.01
) -> None:
    """Prune groups of m along the inputs and update the kept weights (Frantar and Alistarh, ICML 2023, algorithm 1).

    The columns go from left to right. At the first column of a group, the n weights of lowest W^2 / U_jj^2 are marked,
    where U is the upper Cholesky factor of the damped inverse. The columns to the right compensate a column's error: at
    once within the block, and after the block for those outside.
    """
    w, h = weight.float(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if j % m == 0:
                saliency = (w[:, j : j + m] / upper.diagonal()[j : j + m]).square()
                pruned.scatter_(1, j + saliency.topk(n_pruned, dim=1, largest=False).indices, True)
            kept = w[:, j].masked_fill(pruned[:, j], 0)
            errors[:, j - start] = (w[:, j] - kept) / upper[j, j]
            w[:, j:stop] -= errors[:, j - start : j - start + 1] * upper[j, j:stop]
            w[:, j] = kept
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    weight.copy_(w)
