"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""

from . import passive_waiting as _waiting  # noqa: F401, before anything that imports torch
from .dispatch import RowLimits
from .gram import Gram
from .kernels.score_terms import ScoreTerms
from .metrics import metric_names, register_metric
from .model_report import ModelReport
from .nm_linear import NMLinear
from .packed_checkpoint import load, save_packed
from .prune import PruneError, PruneResult, prune_linear
from .prune_model import prune_model
from .recover import RecoveryReport, RecoverySettings, recover
from .sparsify import SparsifyReport, set_row_limits, sparsify
from .sparsity import Sparsity
from .stats import ActivationStats, StatsError
from .update import Update
from .written_text import WrittenText

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "Gram",
    "ModelReport",
    "NMLinear",
    "PruneError",
    "PruneResult",
    "RecoveryReport",
    "RecoverySettings",
    "RowLimits",
    "ScoreTerms",
    "SparsifyReport",
    "Sparsity",
    "StatsError",
    "Update",
    "WrittenText",
    "load",
    "metric_names",
    "prune_linear",
    "prune_model",
    "recover",
    "register_metric",
    "save_packed",
    "set_row_limits",
    "sparsify",
]
