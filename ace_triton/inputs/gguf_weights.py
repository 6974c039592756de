"""The weights of a GGUF file by their names in a model; each is dequantized when it is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .gguf_metadata import metadata_reader

Read = Callable[[], torch.Tensor]


class GgufWeights(Mapping[str, torch.Tensor]):
    """The weights of a model in a GGUF file, with the values that transformers gives them.

    Args:
        path: the file. It stays mapped, and a tensor is read from it each time.
        model: the model, whose parameters may be on the meta device.
        dtype: dtype that transformers would load the model in. A tensor that is read may be in fp32 instead.

    Attributes:
        unexpected: names of tensors in the file that the model lacks and that transformers would not ignore.
    """

    def __init__(self, path: Path, model: Any, dtype: torch.dtype) -> None:
        self._path = path
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = _by_conversions(path, model, dtype)
        if found is None:
            found = _by_processors(path, model, dtype)
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        tied = {name: found[one] for group in names.values() for one in group if one in found for name in group}
        self._reads = {name: read for name, read in {**tied, **found}.items() if name in self._shapes}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        strange = (name for name in found if name not in self._shapes)
        self.unexpected = sorted(name for name in strange if not any(re.search(pattern, name) for pattern in ignored))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read and dequantize a tensor.

        Raises:
            CheckpointError: if its shape is not the model's.
        """
        tensor, shape = self._reads[name](), self._shapes[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._path}: {name} has the shape {tuple(tensor.shape)} instead of {tuple(shape)}: the file is "
                "damaged, or its header belongs to another model"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def _by_processors(path: Path, model: Any, dtype: torch.dtype) -> dict[str, Read]:
    """Tensors of an architecture whose GGUF names and layouts transformers converts with tensor processors."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    reader: Any = metadata_reader()(path)
    kind = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)
    processor = kind(config=load_gguf_checkpoint(str(path))["config"])
    names = get_gguf_hf_weights_map(model, processor)
    parts: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        # The name of stacked experts has no suffix in the map.
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is not None:
            parts.setdefault(target, []).append(tensor)

    def read(target: str) -> torch.Tensor:
        done: dict[str, torch.Tensor] = {}
        for tensor in parts[target]:
            # A processor returns the tensor, or puts it into the dictionary itself.
            result = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": done},
            )
            if result.name in names:
                done[names[result.name]] = torch.from_numpy(result.weights.copy()).to(dtype)
        return done[target]

    return {target: partial(read, target) for target in parts}


def _by_conversions(path: Path, model: Any, dtype: torch.dtype) -> dict[str, Read] | None:
    """Tensors of an architecture for which transformers has weight conversions; None if it has none."""
    try:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
        from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata
        from transformers.integrations.gguf.utils import (
            add_gguf_load_ops,
            get_gguf_conversion_mapping,
            get_gguf_plan,
            is_gguf_arch_supported,
        )
    except ImportError:
        return None  # Older versions of transformers convert all architectures with tensor processors.
    if not is_gguf_arch_supported(read_gguf_metadata(str(path))[0]["general.architecture"]):
        return None
    header = GgufHeader.from_file(str(path))
    conversions = get_gguf_conversion_mapping(header.architecture, model.config)
    quantized, _, _ = get_gguf_plan(header, conversions)
    conversions = add_gguf_load_ops(conversions, quantized, header, dtype)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    stored, own = load_gguf_state_dict(header), model.state_dict()
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        assert pattern is not None, "add_gguf_load_ops gives every tensor a converter"
        parts.setdefault(target, []).append((name, pattern))

    def read(target: str) -> torch.Tensor:
        converter = copy.deepcopy(of_pattern[parts[target][0][1]])
        for name, pattern in parts[target]:
            value: Any = partial(stored[name].__getitem__, ...)
            converter.add_tensor(target, name, pattern, value)
        result = converter.convert(target, model=model, config=model.config)[target]
        return result[0] if isinstance(result, list) else result

    return {target: partial(read, target) for target in parts}
