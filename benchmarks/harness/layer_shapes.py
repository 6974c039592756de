"""The linear layers of the models that are timed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One kind of linear layer in a decoder block.

    Attributes:
        model: family and size of the model.
        layers: the projections with this shape.
        rows, cols: out_features and in_features.
        count: number of them in a block.
    """

    model: str
    layers: str
    rows: int
    cols: int
    count: int

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.model} {self.layers}"


LLAMA_7B = "LLaMA-7B"
LLAMA_3_8B = "Llama-3-8B"
QWEN25_7B = "Qwen2.5-7B"
SMOLLM2 = "SmolLM2-135M"

LAYERS = (
    LayerShape(SMOLLM2, "q, o", 576, 576, 2),
    LayerShape(SMOLLM2, "k, v", 192, 576, 2),
    LayerShape(SMOLLM2, "gate, up", 1536, 576, 2),
    LayerShape(SMOLLM2, "down", 576, 1536, 1),
    LayerShape(LLAMA_7B, "q, k, v, o", 4096, 4096, 4),
    LayerShape(LLAMA_7B, "gate, up", 11008, 4096, 2),
    LayerShape(LLAMA_7B, "down", 4096, 11008, 1),
    LayerShape(LLAMA_3_8B, "q, o", 4096, 4096, 2),
    LayerShape(LLAMA_3_8B, "k, v", 1024, 4096, 2),
    LayerShape(LLAMA_3_8B, "gate, up", 14336, 4096, 2),
    LayerShape(LLAMA_3_8B, "down", 4096, 14336, 1),
    LayerShape(QWEN25_7B, "q, o", 3584, 3584, 2),
    LayerShape(QWEN25_7B, "k, v", 512, 3584, 2),
    LayerShape(QWEN25_7B, "gate, up", 18944, 3584, 2),
    LayerShape(QWEN25_7B, "down", 3584, 18944, 1),
)

TINY = LayerShape("dry run", "layer", 48, 96, 1)


def distinct(layers: tuple[LayerShape, ...] = LAYERS) -> tuple[LayerShape, ...]:
    """The first layer of every shape."""
    return tuple({(layer.rows, layer.cols): layer for layer in reversed(layers)}.values())[::-1]


def labels_of(rows: int, cols: int) -> list[str]:
    """All layers of this shape."""
    return [layer.label for layer in LAYERS if (layer.rows, layer.cols) == (rows, cols)]
