"""Register the packed format with transformers, without importing transformers for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from .manifest import QUANTIZATION_METHOD

_LOADS_MODELS = "transformers.modeling_utils"
"""The module of transformers that every ``from_pretrained`` of a model imports."""


def register_quantizer() -> None:
    """Let ``from_pretrained`` of transformers' AutoModel classes load packed checkpoints. More calls change nothing.

    ``import ace_triton`` does this by itself, before or after transformers is imported.
    """
    from transformers.quantizers import auto

    from .quantizer import PackedConfig, PackedQuantizer

    method = QUANTIZATION_METHOD
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(method)(PackedConfig)
        auto.register_quantizer(method)(PackedQuantizer)


def register_with_transformers() -> None:
    """Register now if transformers can load models already, otherwise as soon as it can.

    transformers is not imported for it, since that takes seconds.
    """
    if _LOADS_MODELS in sys.modules:
        register_quantizer()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Registers when transformers imports the module that loads models. It finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LOADS_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Imports a module as another loader does, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register_quantizer()
