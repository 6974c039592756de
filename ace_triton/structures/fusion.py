"""SAAP's adaptive fusion of vector-wise and element-wise importance, and its stability (arXiv 2412.15127).

Both importances are outputs of Gaussian models with noise scales s_v and s_e. The negative log-likelihood of a
structure is

    I_v / (2 s_v^2) + I_e / (2 s_e^2) + log(s_v s_e).

With one scale for each importance the minimum is s^2 = mean(I), so the score is each importance over its mean, added.
With scales for each structure it is s^2 = I, so the score ranks as the geometric mean sqrt(I_v I_e). Learned scales
minimize the same loss over calibration batches by gradient descent, one pair for each layer.

The paper's text beyond this formula is not available to us. The closed forms follow from it; the stability below is
*reconstructed*.
"""

from __future__ import annotations

import torch

FLOOR = 1e-30
"""Importance below which a structure counts as having this importance, so that its logarithm is finite."""

STEPS, LEARNING_RATE = 200, 0.1
"""Steps of gradient descent on the logarithms of the scales, and the learning rate."""


def fused(rule: str, vector: torch.Tensor, element: torch.Tensor) -> torch.Tensor:
    """The fused importance of a layer's structures.

    Args:
        rule: "mean" (one scale an importance), "structure" (scales of each structure), "learned" (scales learned over
            batches), "vector" or "element" (one of the two alone).
        vector: importances [n_batches, n_structures], at least 0.
        element: the other importances, of the same shape.

    Returns:
        [n_batches, n_structures].
    """
    if rule in ("vector", "element"):
        return vector if rule == "vector" else element
    vector, element = vector.clamp_min(FLOOR), element.clamp_min(FLOOR)
    if rule == "structure":
        return (vector.log() / 2 + element.log() / 2).exp()
    if rule == "mean":
        return vector / vector.mean() + element / element.mean()
    first, second = learned_scales(vector, element)
    return vector / (2 * first**2) + element / (2 * second**2)


def learned_scales(vector: torch.Tensor, element: torch.Tensor) -> tuple[float, float]:
    """The scales s_v and s_e that minimize the loss over batches, by Adam on their logarithms.

    Args:
        vector: importances [n_batches, n_structures], above 0.
        element: the other importances, of the same shape.
    """
    units = [importance.median() for importance in (vector, element)]
    logs = torch.zeros(2, dtype=torch.float32, device=vector.device, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=LEARNING_RATE)
    with torch.enable_grad():
        for step in range(STEPS):
            batch = step % len(vector)
            terms = [i[batch].mean() / unit for i, unit in zip((vector, element), units, strict=True)]
            precision = (-2 * logs).exp() / 2
            loss = precision[0] * terms[0] + precision[1] * terms[1] + logs.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first, second = (float(log.exp() * unit.sqrt()) for log, unit in zip(logs.detach(), units, strict=True))
    return first, second


def stabilized(importance: torch.Tensor) -> torch.Tensor:
    """The mean importance of each structure over 1 + its coefficient of variation, [n_structures].

    Structures whose importance changes between calibration batches are removed first, as SAAP's stability indicator
    demands. The paper's formula of the indicator is not available: the coefficient of variation is *reconstructed*.

    Args:
        importance: [n_batches, n_structures], at least 0.
    """
    mean = importance.mean(0)
    if len(importance) < 2:
        return mean
    return mean / (1 + importance.std(0) / mean.clamp_min(FLOOR))
