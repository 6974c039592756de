"""Plugins: Python files and modules that register your own metrics, for the command line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path

from ..errors import RecipeError
from .registry import metric, metric_names


class PluginError(RecipeError):
    """A plugin that cannot be imported or registers no metric."""


def load_plugins(names: list[str] | None) -> list[str] | None:
    """Import plugins, which runs their code. Returns the names unchanged.

    Args:
        names: ``.py`` files, or names of modules as in ``import``.

    Raises:
        PluginError: a file or module does not exist, its code fails, or it registers no metric.
    """
    for name in names or ():
        _load(name)
    return names


def _load(name: str) -> None:
    before = metric_names()
    module = _module_name(Path(name)) if name.endswith(".py") else name
    try:
        if name.endswith(".py") and module not in sys.modules:
            _import_file(Path(name), module)
        else:
            importlib.import_module(module)
    except Exception as error:
        raise PluginError(f"--plugin {name}: cannot be imported ({type(error).__name__}: {error})") from error
    origins = {metric(known).terms.__module__ for known in metric_names()}
    if metric_names() == before and module not in origins:
        raise PluginError(f"--plugin {name}: registers no metric; decorate one with ace_triton.register_metric")


def _module_name(path: Path) -> str:
    """A module name that is unique for each file path."""
    return f"ace_triton_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def _import_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
