"""Uses an installed ace_triton as a stranger would; run by wheel_smoke.sh away from the repository."""

from importlib.resources import files
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ace_triton
from ace_triton.kernels import cpu_library

assert "site-packages" in ace_triton.__file__, ace_triton.__file__
assert cpu_library.available(), cpu_library.why_unavailable()
assert files("ace_triton").joinpath("py.typed").is_file()
assert files("ace_triton.study").joinpath("page.html.j2").is_file()

layer = torch.nn.Linear(64, 32)
result = ace_triton.prune_linear(layer, torch.randn(4, 16, 64))
assert result.kept == 1024
assert bool((layer.weight.reshape(32, 16, 4) != 0).sum(-1).eq(2).all())

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
report = ace_triton.prune_model(model, torch.randint(0, 100, (4, 16)), "ace", "2:4")
assert len(report.layers) == 14
model.save_pretrained(Path("tiny-model"))
print("the wheel works")
