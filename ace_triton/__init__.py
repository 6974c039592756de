"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""

from .errors import (
    AceError,
    ArgumentError,
    BackendError,
    CheckpointError,
    GenerationError,
    PackedError,
    PatternError,
    PruneError,
    RecipeError,
    RecoveryError,
    StatsError,
    StudyError,
    TextError,
)
from .inputs.written_text import WrittenText
from .kernels.score_terms import ScoreTerms
from .methods.registry import metric_names, register_metric
from .model_report import ModelReport
from .packed.checkpoint import load, save_packed
from .packed.dispatch import RowLimits
from .packed.nm_linear import NMLinear
from .packed.pack_model import SparsifyReport, set_row_limits, sparsify
from .prune import PruneResult, prune_linear
from .prune_blocks import prune_model
from .recipe import Recipe
from .recovery.train import RecoveryReport, RecoverySettings, recover
from .solvers.update import Update
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .statistics.gram import Gram

__version__ = "0.1.0"

__all__ = [
    "AceError",
    "ActivationStats",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "GenerationError",
    "Gram",
    "ModelReport",
    "NMLinear",
    "PackedError",
    "PatternError",
    "PruneError",
    "PruneResult",
    "Recipe",
    "RecipeError",
    "RecoveryError",
    "RecoveryReport",
    "RecoverySettings",
    "RowLimits",
    "ScoreTerms",
    "SparsifyReport",
    "Sparsity",
    "StatsError",
    "StudyError",
    "TextError",
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
