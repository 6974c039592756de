"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""

from .kernels.score_terms import ScoreTerms
from .metrics import metric_names, register_metric
from .prune import PruneError, PruneResult, prune_linear
from .prune_model import ModelReport, prune_model
from .sparsity import Sparsity
from .stats import ActivationStats, StatsError

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "ModelReport",
    "PruneError",
    "PruneResult",
    "ScoreTerms",
    "Sparsity",
    "StatsError",
    "metric_names",
    "prune_linear",
    "prune_model",
    "register_metric",
]
