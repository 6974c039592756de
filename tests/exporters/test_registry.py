"""Export through the registry: what is refused, and that only checked files become the user's folder."""

import numpy as np
import pytest
import torch

import ace_triton
from ace_triton.exporters import registry
from ace_triton.exporters.exporter import Exporter


class Plain(Exporter):
    """Weights as files of numpy; ``spoil`` changes what is written."""

    name, extra, packages, weight_types = "plain", "plain", ("numpy",), ("float32",)

    def __init__(self, spoil=lambda name, weight: weight, packages=("numpy",), shift=0.0):
        self.spoil, self.packages, self.shift = spoil, packages, shift

    def write(self, model, tokenizer, folder, weight_type):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = self.spoil(name, module.weight.detach().numpy())
                if weight is not None:
                    np.save(folder / f"{name}.npy", weight)
        self.model = model

    def read_weights(self, folder):
        for path in folder.glob("*.npy"):
            yield path.stem, np.load(path)

    def opened(self, folder, model):
        return lambda ids: model(ids[None]).logits[0].detach() + self.shift

    def tolerance(self, weight_type):
        return 1e-3

    def advice(self, out, weight_type):
        return [f"load {out} with numpy"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def pruned(command, tiny_checkpoint, tmp_path):
    code, _, errors = command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "magnitude")
    assert code == 0, errors
    return tmp_path / "pruned"


def test_an_exporter_of_one_s_own(command, pruned, tmp_path):
    """From the command, with a packed source; its folder can be replaced."""
    ace_triton.register_exporter(Plain())
    assert command("pack", pruned, tmp_path / "packed")[0] == 0
    code, out, errors = command("export", tmp_path / "packed", tmp_path / "out", "--to", "plain")
    assert code == 0, errors
    assert f"load {tmp_path / 'out'} with numpy" in out
    report = ace_triton.export_model(pruned, tmp_path / "out", "plain", overwrite=True)
    assert {matrix.pattern for matrix in report.matrices} == {"2:4", "dense"}
    assert len(report.matrices) == 15
    assert report.largest_difference == 0
    assert np.count_nonzero(np.load(tmp_path / "out" / "model.layers.0.mlp.up_proj.npy")) == 64 * 32 / 2
    with pytest.raises(ace_triton.CheckpointError, match="already exists"):
        ace_triton.export_model(pruned, tmp_path / "out", "plain")


def turned(name, weight):
    """The zeros of one square weight along its outputs."""
    return np.ascontiguousarray(weight.T) if name.endswith("0.self_attn.o_proj") else weight


SPOILED = {
    "has other numbers": Plain(turned),
    "lacks the weights of model.layers.1.mlp.up_proj": Plain(lambda n, w: None if n.endswith("1.mlp.up_proj") else w),
    "is (320, 31), not (320, 32)": Plain(lambda n, w: w[:, 1:] if n == "lm_head" else w),
    "differ from the model by 0.1, more than 0.001": Plain(shift=0.1),
    "computes NaN": Plain(shift=float("nan")),
}


@pytest.mark.parametrize("message", SPOILED)
def test_files_that_differ_are_not_kept(pruned, tmp_path, message):
    ace_triton.register_exporter(SPOILED[message])
    with pytest.raises(ace_triton.CheckpointError) as caught:
        ace_triton.export_model(pruned, tmp_path / "out", "plain")
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "tiny"]


def test_quantized_weights_may_differ_but_not_their_zeros(pruned, tmp_path):
    class Rounded(Plain):
        def keeps_weights(self, weight_type):
            return None

    ace_triton.register_exporter(Rounded(lambda name, weight: np.round(weight, 3)))
    ace_triton.export_model(pruned, tmp_path / "rounded", "plain")
    registry._REGISTRY["plain"] = Rounded(lambda name, weight: weight + 1e-6)
    with pytest.raises(ace_triton.CheckpointError, match="lost zeros"):
        ace_triton.export_model(pruned, tmp_path / "out", "plain")


def test_what_is_refused_before_the_model_is_loaded(command, pruned, tmp_path):
    registry._REGISTRY["missing"] = Plain(packages=("numpy", "no_such_package"))
    for words, message in (
        (("--to", "coreml"), "unknown engine 'coreml': use one of onnx, openvino, gguf"),
        (("--to", "onnx", "--weight-type", "q4_1"), "no weights of type 'q4_1': use one of float32, float16"),
        (("--to", "missing"), "needs no_such_package: pip install 'ace-triton[plain]'"),
    ):
        code, _, errors = command("export", pruned, tmp_path / "out", *words)
        assert code == 1
        assert message in errors
    with pytest.raises(ace_triton.ArgumentError, match="there is an exporter 'onnx' already"):
        ace_triton.register_exporter(registry.exporter_named("onnx"))
    with pytest.raises(ace_triton.ArgumentError, match="prompts must be at least 1"):
        ace_triton.export_model(pruned, tmp_path / "out", "onnx", prompts=0)
