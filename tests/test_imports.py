"""The package imports where it should, and its folder kernels/ is never taken for another package."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ace_triton

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_loads_a_model_from_the_repository_s_root():
    run(
        "import sys; sys.path.insert(0, '')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1))\n"
        "import ace_triton.kernels.select_nm as s; assert s.__name__ == 'ace_triton.kernels.select_nm'\n"
        "assert 'kernels.select_nm' not in sys.modules"
    )


def test_importing_the_package_loads_neither_transformers_nor_datasets():
    run(
        "import sys, ace_triton; assert not {'transformers', 'datasets'} & set(sys.modules)\n"
        "from transformers.quantizers import auto; assert 'ace_triton' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "ace_triton.register_quantizer(); assert 'ace_triton' in auto.AUTO_QUANTIZER_MAPPING"
    )


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["recover", "a", "b", "--nonsense"], ["nonsense"]])
def test_help_and_wrong_options_load_neither_transformers_nor_datasets(words):
    run(
        "import sys\n"
        "from ace_triton.commands.cli import main\n"
        f"sys.argv = ['ace-triton', *{words}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        f"    assert stop.code == {0 if '--help' in words else 2}, stop.code\n"
        "assert not {'transformers', 'datasets', 'accelerate', 'torch._dynamo'} & set(sys.modules)"
    )


def test_transformers_knows_packed_folders_when_it_is_imported_after_the_package():
    run(
        "import sys, inspect, ace_triton, transformers.modeling_utils as module\n"
        "from transformers.quantizers import auto; assert 'ace_triton' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('ace_triton')]\n"
        "assert 'def from_pretrained' in inspect.getsource(module)"
    )


def test_it_imports_without_triton():
    run(
        "import sys\n"
        "class NoTriton:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError(name)\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else found(name, package)\n"
        "sys.meta_path.insert(0, NoTriton())\n"
        "import torch, ace_triton\n"
        "layer = torch.nn.Linear(8, 4)\n"
        "assert ace_triton.prune_linear(layer, torch.randn(3, 8)).kept == 16\n"
    )


def test_no_public_name_hides_a_submodule():
    """``import ace_triton.prune`` must give the module, not a function of the same name."""
    submodules = {module.name for module in pkgutil.iter_modules(ace_triton.__path__)}
    assert submodules > {"evaluate", "prune", "recovery"}
    assert not submodules & set(ace_triton.__all__)
    for name in submodules & vars(ace_triton).keys():
        assert vars(ace_triton)[name] is sys.modules[f"ace_triton.{name}"]
