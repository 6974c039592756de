"""What a run of ``ace-triton prune`` records beside the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..calibration_report import CalibrationReport
from ..inputs import checkpoint
from ..inputs.model_inputs import InputReport
from ..model_report import ModelReport, linears_outside
from ..provenance import history_with, option_facts, source_facts, with_provenance
from .recipe_file import CalibrationSettings

if TYPE_CHECKING:
    from .prune_run import PruneRun


def prune_facts(
    run: PruneRun,
    model: Any,
    report: ModelReport,
    settings: CalibrationSettings | None,
    calibrated: CalibrationReport | InputReport | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The JSON beside the model, and the linear layers outside the blocks of other than causal language models."""
    recipe, found = run.recipe, {}
    outside = () if run.of_text_alone else linears_outside(model, report)
    if calibrated is not None:
        found["calibration_report"] = {**calibrated.to_dict(), "seed": run.calibration.seed}
    facts = with_provenance(
        report.to_dict(),
        **source_facts(run.source, run.out),
        **_earlier_steps(run.source),
        history=history_with(
            checkpoint.read_report(run.source),
            "prune",
            f"{recipe.words}, {recipe.sparsity}{', packed' * run.packed}"
            + ("" if run.stored is None else f": {run.stored.words}"),
            seconds=report.seconds.total,
            zeros=round(sum((1 - layer.kept) * layer.parameters for layer in report.layers)),
            parameters=[report.account.model] * 2,
        ),
        **found,
        calibration=None if settings is None else settings.to_dict(),
        options=option_facts(recipe.complete_options),
        scope=recipe.sparsity.scope,
        permute=recipe.permute,
        **({"rotate": True} if recipe.rotate else {}),
        include=None if recipe.include is None else list(recipe.include),
        exclude=list(recipe.exclude) or None,
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_option=run.dtype,
        **({} if run.stored is None else {"stored_bits": run.stored.to_dict()}),
        **({} if run.task_name is None else {"task_option": run.task_name}),
        device=str(model.device),
    )
    if not run.of_text_alone:
        facts |= {"task": run.task.name, "auto_class": run.task.auto_class, "outside_layers": list(outside)}
    return facts, outside


def _earlier_steps(source: str) -> dict[str, Any]:
    """What the source's own report says of structured pruning, so that the result's report has both steps."""
    earlier = checkpoint.read_report(source) or {}
    return {name: earlier[name] for name in ("shrink",) if name in earlier}
