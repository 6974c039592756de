"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""

from . import command_environment as _environment  # noqa: F401, before anything that imports torch
from .errors import (
    AceError,
    ArgumentError,
    BackendError,
    CheckpointError,
    GenerationError,
    PackedError,
    PackedWeightError,
    PatternError,
    PruneError,
    RecipeError,
    RecoveryError,
    StatsError,
    StudyError,
    TextError,
)
from .inputs.calibration import load_calibration
from .inputs.written_text import WrittenText
from .kernels.score_terms import ScoreTerms
from .methods.registry import Needs, metric_names, register_metric
from .model_report import ModelReport
from .packed.checkpoint import load, save_packed
from .packed.nm_linear import NMLinear
from .packed.pack_model import SparsifyReport, pack_model, set_row_limits, sparsify
from .packed.products import RowLimits
from .packed.registration import register_if_imported, register_quantizer
from .planning.pruning_plan import PruningPlan, plan_pruning
from .prune import PruneResult, prune_linear
from .prune_blocks import prune_model
from .recipe import Recipe
from .recovery.train import RecoveryReport, RecoverySettings, recover
from .solvers.update import Update
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .statistics.gram import Gram
from .statistics.statistic import Statistic, TensorForm, register_statistic
from .streaming.streamed_prune import prune_checkpoint

__version__ = "0.2.0"

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
    "Needs",
    "PackedError",
    "PackedWeightError",
    "PatternError",
    "PruneError",
    "PruneResult",
    "PruningPlan",
    "Recipe",
    "RecipeError",
    "RecoveryError",
    "RecoveryReport",
    "RecoverySettings",
    "RowLimits",
    "ScoreTerms",
    "SparsifyReport",
    "Sparsity",
    "Statistic",
    "StatsError",
    "StudyError",
    "TensorForm",
    "TextError",
    "Update",
    "WrittenText",
    "load",
    "load_calibration",
    "metric_names",
    "pack_model",
    "plan_pruning",
    "prune_checkpoint",
    "prune_linear",
    "prune_model",
    "recover",
    "register_metric",
    "register_quantizer",
    "register_statistic",
    "save_packed",
    "set_row_limits",
    "sparsify",
]

register_if_imported()
