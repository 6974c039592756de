"""Estimate the memory that a pruning run takes, from the sizes of its layers and its calibration set.

Each phase of a run holds tensors at the same time; the largest sum is the peak. The names of the tensors below are
those of the code that holds them: :mod:`ace_triton.decoders.collect` (statistics and activations),
:mod:`ace_triton.prune` and :mod:`ace_triton.solvers` (the solve of a layer), :mod:`ace_triton.reordering` (orders
and rotations).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..decoders.batches import sequences_of_a_forward
from ..decoders.parts_of_logits import PART
from ..methods.registry import metric
from ..packed.stored_bits import StoredBits
from ..recipe import Recipe
from ..solvers.least_squares import rounded
from ..statistics.token_sample import SAMPLE_TOKENS
from ..streaming.mapped_model import PIECE
from .layers import LayerSize, PlannedModel, UnitSize

FP32 = 4

TEXT_BYTES_PER_TOKEN = 128
"""Memory of a text's token while the whole text is tokenized, in Python and in the tokenizer."""


@dataclass(frozen=True)
class Calibrated:
    """Sizes of a calibration set.

    Attributes:
        samples: number of sequences.
        length: tokens in each.
        batch_size: sequences in one forward; None for the default.
        text_tokens: tokens of the text that the sequences are cut from; 0 if the model writes it, None if the sequences
            are given and not checked.
        in_files: True if the hidden states are kept in files.
        on_gpu: True if the model runs on a GPU.
        width: channels of the hidden states; None for what the model's configuration says.
    """

    samples: int
    length: int
    batch_size: int | None = None
    text_tokens: int | None = None
    in_files: bool = False
    on_gpu: bool = False
    width: int | None = None

    @property
    def batch_tokens(self) -> int:
        """Tokens in one forward."""
        sequences = self.batch_size or sequences_of_a_forward(self.length, on_gpu=self.on_gpu)
        return min(self.samples, sequences) * self.length


@dataclass(frozen=True)
class Memory:
    """Peak memory of a run.

    Attributes:
        phases: bytes that must be in memory, by phase of the run.
        file_pages: bytes of mapped files that are also counted as memory of the process, by phase. The system drops
            them if memory is short.
    """

    phases: Mapping[str, int]
    file_pages: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes that must be in memory at the same time."""
        return max(self.phases.values())

    @property
    def peak_resident(self) -> int:
        """The peak resident memory of the process, with file pages, if nothing else needs memory."""
        return max(size + self.file_pages.get(phase, 0) for phase, size in self.phases.items())

    @property
    def largest_phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "peak_bytes": self.peak,
            "peak_resident_bytes": self.peak_resident,
            "phases": dict(self.phases),
            "file_pages": dict(self.file_pages),
        }


@dataclass(frozen=True)
class Need:
    """The sizes that decide how much memory a run takes.

    Attributes:
        model: the planned model; its ``config`` and its parameters are read.
        layers: its layers.
        recipe: how to prune.
        calibrated: the calibration set; None if the method needs no tokens.
        base_bytes: memory of the process before the model is loaded.
        stored_bytes: size of the weight files; 0 if it is unknown.
        converts: True if loading copies the weights to another dtype or form.
        is_gguf: True if the weights are in a GGUF file.
        on_gpu: True if the layers are solved on a GPU.
        packed: True if a packed checkpoint is written.
        stored: bits of the weights that stay dense in it; None to keep their type.
    """

    model: Any
    layers: PlannedModel
    recipe: Recipe
    calibrated: Calibrated | None
    base_bytes: int
    stored_bytes: int
    converts: bool
    is_gguf: bool
    on_gpu: bool = False
    packed: bool = False
    stored: StoredBits | None = None

    @property
    def weight_bytes(self) -> int:
        """All parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def in_memory(self) -> Memory:
        """A run that loads the whole model on the CPU."""
        base, weights = self.base_bytes, self.weight_bytes
        read = 4 * sum(p.numel() for p in self.model.parameters()) - weights if self.is_gguf else 0
        phases = {"load the model": base + weights + read + self.stored_bytes * self.is_gguf}
        phases |= {name: base + weights + size for name, size in self._of_text().items()}
        phases["prune"] = base + weights + self._hidden_bytes() + self._most_of_a_unit()
        if self.packed and self.stored is not None:
            phases["pack"] = base + weights + self._rounding_bytes()
        mapped = {"load the model": self.stored_bytes} if self.converts and not self.is_gguf else {}
        return Memory(phases, mapped)

    def streamed(self) -> Memory:
        """A run whose weights stay in files."""
        base, blocks = self.base_bytes, self.layers.block_bytes
        outside = max((p.nbytes for p in self._outside()), default=0)
        once = max(blocks, outside)
        piece = min(PIECE * self.model.dtype.itemsize, once)
        # A tensor of a GGUF file is dequantized as a whole in fp32, through about two copies.
        read = 3 * FP32 * max(p.numel() for p in self.model.parameters()) if self.is_gguf else 0
        phases = {"copy the weights": base + 2 * piece + read}
        phases |= {name: base + size + once for name, size in self._of_text().items()}
        phases["prune"] = base + max(once, self._hidden_bytes() + blocks + self._most_of_a_unit())
        if self.packed:
            layer = max(layer.bytes for unit in self.layers.units for layer in unit.layers)
            phases["pack"] = base + 2 * max(layer, piece, self._rounding_bytes())
        # transformers reads the files to convert them when it opens the model; one tensor of them is in memory.
        largest = max(p.numel() for p in self.model.parameters()) * self.model.dtype.itemsize
        mapped = {"copy the weights": min(self.stored_bytes, largest)} if self.converts else {}
        return Memory(phases, mapped)

    def _rounding_bytes(self) -> int:
        """The largest weight outside the blocks, if it may be rounded to few bits; else 0."""
        return 0 if self.stored is None else max((p.nbytes for p in self._outside()), default=0)

    def device(self) -> Memory:
        """The memory of a GPU that the whole model is loaded on, without what the driver takes."""
        calibrated = None if self.calibrated is None else replace(self.calibrated, on_gpu=True)
        weights, there = self.weight_bytes, replace(self, on_gpu=True, calibrated=calibrated)
        phases = {"load the model": weights}
        phases |= {name: weights + size for name, size in there._of_text().items() if name != "tokenize the text"}
        phases["prune"] = weights + there._hidden_bytes() + there._most_of_a_unit()
        return Memory(phases, {})

    def _of_text(self) -> dict[str, int]:
        """Phases before pruning, without the weights."""
        if self.calibrated is None:
            return {}
        found: dict[str, int] = {}
        if self.calibrated.text_tokens is not None:
            found["tokenize the text"] = self.calibrated.text_tokens * TEXT_BYTES_PER_TOKEN
            found["check the text"] = logit_bytes(self.model, self.calibrated.length, PART)
        if self.recipe.budgets:
            found["find the shares"] = logit_bytes(self.model, self.calibrated.batch_tokens, 0)
        return found

    def _outside(self) -> Iterator[torch.Tensor]:
        """Parameters outside the blocks."""
        inside = {p for block in self.layers.plan.blocks for p in block.module.parameters()}
        return (p for p in self.model.parameters() if p not in inside)

    def _width(self) -> int:
        """Channels of the hidden states."""
        if self.calibrated is not None and self.calibrated.width is not None:
            return self.calibrated.width
        width = getattr(self.model.config.get_text_config(), "hidden_size", None)
        return width if isinstance(width, int) else next(self.model.get_input_embeddings().parameters()).shape[1]

    def _hidden_bytes(self) -> int:
        """Hidden states of the calibration set; between groups of layers also the outputs of finished modules."""
        if self.calibrated is None or not self.recipe.needs.tokens:
            return 0
        kept = 2 if self.recipe.sequential == "layers" else 1
        whole = self.calibrated.samples * self.calibrated.length
        tokens = self.calibrated.batch_tokens if self.calibrated.in_files else whole
        return kept * tokens * self._width() * self.model.dtype.itemsize

    def _most_of_a_unit(self) -> int:
        """The most that pruning a block holds beside its weights and the hidden states."""
        units = self.layers.units
        held = 0
        if self.recipe.needs.tokens and self.recipe.sequential == "none":
            held = sum(self._statistics_bytes(unit.layers) for unit in units)
        return max(self._of_unit(unit, held) for unit in units)

    def _of_unit(self, unit: UnitSize, held: int) -> int:
        if not self.recipe.needs.tokens:
            return max(self._solve_bytes(layer) for layer in unit.layers)
        logits = 0
        if unit.name == "outside the blocks" and self.calibrated is not None:
            logits = logit_bytes(self.model, self.calibrated.batch_tokens, 0)
        forward = self._activation_bytes(unit) + logits
        rotation = self._rotation_bytes(forward) if self.recipe.rotate else 0
        if self.recipe.sequential != "layers":
            own = held or self._statistics_bytes(unit.layers)
            return max(rotation, own + max(forward, self._most_of_solves(unit.layers)))
        first = unit.groups[0]
        at_first = self._statistics_bytes(unit.layers) + max(forward, self._most_of_solves(first))
        later = (self._statistics_bytes(group) + max(forward, self._most_of_solves(group)) for group in unit.groups)
        return max(rotation, at_first, *later)

    def _rotation_bytes(self, forward: int) -> int:
        """The Gram matrices of v's and o's inputs, and then the learning of the rotations of o's inputs."""
        square = FP32 * self._width() ** 2
        return 2 * square + max(forward, 8 * square)

    def _statistics_bytes(self, layers: Sequence[LayerSize]) -> int:
        """The statistics of layers, as :class:`~ace_triton.statistics.activation.ActivationStats` keeps them."""
        assert self.calibrated is not None
        needs = self.recipe.needs
        total = 0
        for first in {layer.group: layer for layer in layers}.values():
            rows = -(-self.calibrated.samples * self.calibrated.length // self.calibrated.batch_tokens)
            total += first.inputs * (16 + FP32 * (rows if first.is_expert else self.calibrated.samples))
            total += FP32 * first.inputs**2 if needs.gram else 0
            total += SAMPLE_TOKENS * first.inputs * self.model.dtype.itemsize if needs.sample else 0
        for layer in layers:
            total += 8 * layer.inputs if needs.outputs else 0
            total += FP32 * layer.elements if needs.reduce is not None else 0
        return total

    def _activation_bytes(self, unit: UnitSize) -> int:
        """What a forward of a batch holds: inputs and outputs of all layers, since inputs are kept until its end."""
        assert self.calibrated is not None
        tokens, size = self.calibrated.batch_tokens, self.model.dtype.itemsize
        dense = [layer for layer in unit.layers if not layer.is_expert]
        channels = 4 * self._width() + sum(layer.outputs for layer in dense)
        channels += sum(layer.inputs for layer in {layer.group: layer for layer in dense}.values())
        experts = {layer.name.rpartition(".")[2]: layer for layer in unit.layers if layer.is_expert}
        channels += self._experts_per_token() * sum(layer.inputs + layer.outputs for layer in experts.values())
        in_fp32 = FP32 * max(layer.inputs for layer in unit.layers)
        scores = 0
        if getattr(self.model.config, "_attn_implementation", None) == "eager":
            heads = getattr(self.model.config.get_text_config(), "num_attention_heads", 1)
            scores = 2 * FP32 * heads * self.calibrated.length
        return tokens * (channels * size + in_fp32 + scores)

    def _experts_per_token(self) -> int:
        config = self.model.config.get_text_config()
        stated = (getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts", "moe_top_k"))
        return next((count for count in stated if isinstance(count, int)), 2)

    def _most_of_solves(self, layers: Sequence[LayerSize]) -> int:
        """The most that the solves of layers hold; what a group derives from its Gram matrix stays for the next."""
        most = kept = 0
        seen: set[int] = set()
        for layer in (layer for layer in layers if layer.is_pruned):
            if layer.group not in seen:
                seen.add(layer.group)
                derived, while_derived = self._derived_bytes(layer.inputs)
                orders = self._order_bytes(layer) if self.recipe.permute else 0
                most = max(most, kept + orders, kept + while_derived + 3 * FP32 * layer.elements)
                kept += derived
            most = max(most, kept + self._solve_bytes(layer))
        return most

    def _order_bytes(self, layer: LayerSize) -> int:
        """The search for an order of a layer's inputs, and the Gram matrix in the new order."""
        return 4 * FP32 * layer.elements + 2 * FP32 * layer.inputs**2 * self.recipe.needs.gram

    def _derived_bytes(self, width: int) -> tuple[int, int]:
        """What is derived from a Gram matrix of this width, and the most that deriving it holds."""
        square, update = width**2, self.recipe.update
        low = 2 if self.on_gpu else rounded(torch.empty(0, dtype=torch.float32, device="cpu")).element_size()
        copy = low * square if low != FP32 else 0
        derived = while_derived = 0
        if update is not None and update.kind == "lstsq":
            derived = (low if update.mask_rounds else FP32) * square + copy
            while_derived = 3 * FP32 * square if update.mask_rounds else derived
        own = metric(self.recipe.method)
        if own.solve is not None and own.needs(self.recipe.complete_options).gram:
            derived += FP32 * square
            while_derived = max(while_derived, 5 * FP32 * square)
        return derived, while_derived

    def _solve_bytes(self, layer: LayerSize) -> int:
        """The fp32 copies of a weight, its masks and its products."""
        update, elements = self.recipe.update, layer.elements
        copy = 0 if layer.bytes == FP32 * elements else FP32 * elements
        total = elements
        if update is not None and update.kind == "lstsq":
            total = max(total, (7 * FP32 + 2) * elements + copy)
        elif update is not None:
            total = max(total, (4 * FP32 + 1) * elements + copy + FP32 * SAMPLE_TOKENS * layer.outputs)
        if metric(self.recipe.method).solve is not None:
            total = max(total, (4 * FP32 + 1) * elements + copy)
        return total


def logit_bytes(model: Any, tokens: int, compared: int) -> int:
    """Bytes of the logits of some tokens, and of the fp32 copies that their loss takes.

    Args:
        model: the model.
        tokens: tokens whose logits are in memory at once.
        compared: tokens whose loss is computed at once.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vocabulary = 0 if head is None else next(head.parameters()).shape[0]
    size = model.dtype.itemsize
    return int(vocabulary * (tokens * size + min(tokens, compared) * (FP32 + FP32 * (size != FP32))))
