"""torch.export takes packed layers of every layout, with any number of rows."""

import io

import pytest
import torch
from torch import nn

import ace_triton
from ace_triton.packed.rows_linear import RowsLinear

SIZE = 64


class Layers(nn.Module):
    """A layer of each layout, one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pairs = ace_triton.NMLinear.from_linear(pruned("2:4", dtype), 2, 4)
        self.bitmap = ace_triton.NMLinear.from_linear(pruned("8:16", dtype), 8, 16)
        self.few_bits = ace_triton.NMLinear.from_linear(pruned("16:32", dtype), 16, 32, bits=4, group=32)
        self.rows = RowsLinear.from_linear(pruned("0.5", dtype))
        self.whole = ace_triton.QuantizedLinear.from_linear(nn.Linear(SIZE, SIZE, dtype=dtype), 8, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            tokens = layer(tokens)
        return tokens


def pruned(sparsity: str, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(SIZE, SIZE, dtype=dtype)
    ace_triton.prune_linear(layer, None, "magnitude", sparsity)
    return layer


@pytest.mark.parametrize(("dtype", "strict"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)])
def test_the_exported_program_computes_the_same(dtype, strict):
    model = Layers(dtype)
    tokens = torch.randn(2, 3, SIZE).to(dtype)
    dimension = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (tokens,), dynamic_shapes=({1: dimension},), strict=strict)
    assert program.state_dict.keys() == model.state_dict().keys()
    operations = {str(node.target).split(".")[1] for node in program.graph.nodes if "ace_triton" in str(node.target)}
    assert operations == {"nm_linear", "rows_linear", "quantized_linear"}
    with torch.no_grad():
        for rows in (3, 7):
            given = torch.randn(2, rows, SIZE).to(dtype)
            assert torch.equal(program.module()(given), model(given))


@pytest.mark.parametrize("strict", [True, False])
def test_a_single_layer_without_metadata_needs_no_module_around_it(strict):
    torch.manual_seed(0)
    layer = ace_triton.QuantizedLinear.from_linear(nn.Linear(SIZE, SIZE), 8, 32)
    tokens = torch.randn(2, SIZE)
    program = torch.export.export(layer, (tokens,), strict=strict)
    with torch.no_grad():
        assert torch.equal(program.module()(tokens), layer(tokens))


@pytest.mark.parametrize("strict", [True, False])
def test_a_single_layer_with_metadata_is_exported_in_a_module_and_saved(strict):
    torch.manual_seed(0)
    model = nn.Sequential(ace_triton.NMLinear.from_linear(pruned("2:4", torch.float32), 2, 4))
    tokens, file = torch.randn(3, SIZE), io.BytesIO()
    torch.export.save(torch.export.export(model, (tokens,), strict=strict), file)
    file.seek(0)
    program = torch.export.load(file)
    with torch.no_grad():
        assert torch.equal(program.module()(tokens), model(tokens))
        assert torch.equal(program.run_decompositions().module()(tokens), model(tokens))
