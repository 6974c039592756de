"""ONNX and OpenVINO: a packed model's graph, read back and run by other libraries."""

import json

import numpy as np
import pytest
import torch

import ace_triton
from ace_triton.exporters.checks import check_matrices, largest_difference, layers_of, prompts_for
from ace_triton.exporters.flat_cache import cache_argument
from ace_triton.exporters.openvino import Openvino

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """(model, folder, report) of one packed block, whose output head is tied to its embedding. Takes seconds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = tmp_path_factory.mktemp("onnx")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "qwen2", vocab_size=320, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(0))
    ace_triton.prune_model(model, ids, "magnitude", "2:4")
    ace_triton.pack_model(model)
    ace_triton.save_packed(model, tokenizer, place / "packed")
    report = ace_triton.export_model(place / "packed", place / "out", "onnx")
    ace_triton.unpack_model(model)
    return model, place / "out", report


def test_every_weight_is_sparse_along_the_inputs_of_its_product(exported):
    """Read here with the onnx package: axis 0 of a MatMul's second input is what it sums over."""
    model, folder, report = exported
    graph = onnx.load(folder / "model.onnx").graph
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert sorted(products) == sorted(f"{matrix.name}.weight" for matrix in report.matrices if matrix.pattern == "2:4")
    assert len(products) == 7
    for name in products:
        expected = model.get_submodule(name.removesuffix(".weight")).weight.detach().numpy()
        assert np.array_equal(weights[name], expected.T)
        kept = (weights[name] != 0).reshape(len(weights[name]) // 4, 4, -1).sum(axis=1)
        assert kept.max() == 2


def test_the_report_says_what_was_compared(exported):
    _, folder, report = exported
    assert report.largest_difference < 1e-5 < report.largest_logit
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= report.files.keys()
    assert "files for onnx that `ace-triton export` wrote" in (folder / "README.md").read_text()
    stored = json.loads((folder / "ace_triton.json").read_text())["export"]
    assert stored["engine"] == "onnx"
    assert [entry["name"] for entry in stored["matrices"]] == [matrix.name for matrix in report.matrices]
    line = "\n".join(report.advice)
    assert f"trtexec --onnx={folder / 'model.onnx'} " in line
    assert "--sparsity=enable" in line
    shapes = (folder / "trtexec-shapes.txt").read_text().split()
    assert [option.partition("=")[0] for option in shapes] == ["--minShapes", "--optShapes", "--maxShapes"]
    inputs = {entry.name for entry in onnx.load(folder / "model.onnx", load_external_data=False).graph.input}
    assert all({part.partition(":")[0] for part in o.partition("=")[2].split(",")} == inputs for o in shapes)


def test_onnxruntime_continues_a_padded_batch_from_a_cache(exported):
    from transformers import DynamicCache

    model, folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = DynamicCache()
        model(ids[:, :4], attention_mask=mask[:, :4], position_ids=places[:, :4], **{cache_argument(model): cache})
        past = {"key": cache.layers[0].keys.numpy().copy(), "value": cache.layers[0].values.numpy().copy()}
        expected = model(ids, attention_mask=mask, position_ids=places).logits[:, 4:]
    given = {
        "input_ids": ids[:, 4:].numpy(),
        "attention_mask": mask.numpy(),
        "position_ids": places[:, 4:].numpy(),
        **{f"past_key_values.0.{name}": value for name, value in past.items()},
    }
    logits, keys, values = session.run(["logits", "present.0.key", "present.0.value"], given)
    assert np.abs(logits - expected.numpy()).max() < 1e-5
    assert keys.shape == values.shape == (2, 2, 7, 8)


def test_openvino_has_the_same_weights_and_logits(exported, tmp_path, tokenizer):
    pytest.importorskip("openvino")
    model, folder, _ = exported
    prompts = prompts_for(model, tokenizer, 2)
    with torch.no_grad():
        expected = [model(ids[None]).logits[0] for ids in prompts]
    for weight_type, bound in (("float32", 1e-5), ("float16", 1e-2)):
        out = tmp_path / weight_type
        out.mkdir()
        engine = Openvino()
        engine.convert(folder / "model.onnx", out, weight_type)
        layers = layers_of(model, engine.keeps_weights(weight_type))
        matrices = check_matrices(layers, engine.read_weights(out), "openvino")
        assert [matrix.pattern for matrix in matrices].count("2:4") == 7
        run = engine.opened(out, model)
        assert largest_difference(expected, [run(ids) for ids in prompts], "openvino", bound) > 0
