"""Fused Triton kernels that prune large language models to N:M sparsity and run them sparse."""

from typing import TYPE_CHECKING, Any

from . import command_environment as _environment  # noqa: F401, before anything that imports torch
from .decoding.generate import compiled_generate
from .errors import (
    AceError,
    ArgumentError,
    BackendError,
    CheckpointError,
    GenerationError,
    PackedError,
    PackedWeightError,
    PatternError,
    ProcessError,
    PruneError,
    RecipeError,
    RecoveryError,
    StatsError,
    StudyError,
    TextError,
)
from .evaluate import Perplexity
from .exporters.exporter import Exporter
from .exporters.registry import ExportReport, export_model, register_exporter
from .formats.registry import load_model
from .inputs.calibration import load_calibration
from .inputs.written_text import WrittenText
from .kernels.score_terms import ScoreTerms
from .methods.registry import Needs, metric_names, register_metric
from .model_report import ModelReport
from .packed.checkpoint import load, save_packed
from .packed.fused import fuse_products
from .packed.keep_dense import DenseCopies, dense_copies, keep_dense
from .packed.nm_linear import NMLinear
from .packed.pack_model import SparsifyReport, pack_model, set_row_limits, sparsify
from .packed.packed_linear import PackedLinear
from .packed.products import RowLimits
from .packed.quantized_embedding import QuantizedEmbedding
from .packed.quantized_linear import QuantizedLinear, TiedLinear
from .packed.registration import register_quantizer
from .packed.registration import register_with_transformers as _register_with_transformers
from .packed.rows_linear import RowsLinear
from .packed.unpack_model import unpack_model
from .planning.pruning_plan import PruningPlan, plan_pruning
from .prune import PruneResult, prune_linear
from .prune_blocks import prune_model
from .recipe import Recipe
from .recovery.any_model import recover_model
from .recovery.lora import LoraMerge, MergedLayer, merge_lora
from .recovery.settings import GroupTuning, RecoveryReport, RecoverySettings
from .recovery.train import recover
from .recovery.zeros import KeptZeros, keep_zeros
from .solvers.quantize import Quantization
from .solvers.update import Update
from .sparsity import Sparsity
from .statistics.activation import ActivationStats
from .statistics.gram import Gram
from .statistics.statistic import Statistic, TensorForm, register_statistic
from .streaming.streamed_evaluate import perplexity_of_checkpoint
from .streaming.streamed_pack import pack_checkpoint
from .streaming.streamed_prune import prune_checkpoint
from .streaming.streamed_shrink import shrink_checkpoint
from .structures.report import ShrinkReport
from .structures.settings import ShrinkSettings
from .structures.shrink import Shrunk, shrink_model

if TYPE_CHECKING:
    from .recovery.mask_callback import MaskCallback

__version__ = "0.2.0"

__all__ = [
    "AceError",
    "ActivationStats",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DenseCopies",
    "ExportReport",
    "Exporter",
    "GenerationError",
    "Gram",
    "GroupTuning",
    "KeptZeros",
    "LoraMerge",
    "MaskCallback",
    "MergedLayer",
    "ModelReport",
    "NMLinear",
    "Needs",
    "PackedError",
    "PackedLinear",
    "PackedWeightError",
    "PatternError",
    "Perplexity",
    "ProcessError",
    "PruneError",
    "PruneResult",
    "PruningPlan",
    "Quantization",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Recipe",
    "RecipeError",
    "RecoveryError",
    "RecoveryReport",
    "RecoverySettings",
    "RowLimits",
    "RowsLinear",
    "ScoreTerms",
    "ShrinkReport",
    "ShrinkSettings",
    "Shrunk",
    "SparsifyReport",
    "Sparsity",
    "Statistic",
    "StatsError",
    "StudyError",
    "TensorForm",
    "TextError",
    "TiedLinear",
    "Update",
    "WrittenText",
    "compiled_generate",
    "dense_copies",
    "export_model",
    "fuse_products",
    "keep_dense",
    "keep_zeros",
    "load",
    "load_calibration",
    "load_model",
    "merge_lora",
    "metric_names",
    "pack_checkpoint",
    "pack_model",
    "perplexity_of_checkpoint",
    "plan_pruning",
    "prune_checkpoint",
    "prune_linear",
    "prune_model",
    "recover",
    "recover_model",
    "register_exporter",
    "register_metric",
    "register_quantizer",
    "register_statistic",
    "save_packed",
    "set_row_limits",
    "shrink_checkpoint",
    "shrink_model",
    "sparsify",
    "unpack_model",
]

_register_with_transformers()


def __getattr__(name: str) -> Any:
    """Import ``MaskCallback`` when it is used: its base class is in transformers, which takes seconds to import."""
    if name == "MaskCallback":
        from .recovery.mask_callback import MaskCallback

        return MaskCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
