"""GGUF: the file of llama.cpp, in the types that keep an exact zero."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..inputs.checkpoint import load
from ..inputs.gguf_metadata import metadata_reader
from ..structures.uneven import SHAPES
from .exporter import Exporter, Run

FILE = "model.gguf"

TYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Types of weights, and their names in the package gguf. A block of each of them represents zero exactly."""

BLOCK = 32
"""Weights in a block of a quantized type. A row that is not a multiple of it is written as f16."""

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}
"""Model types of transformers, and their names in the package gguf."""

_QWEN2, _LLAMA3 = r"\p{N}|", r"\p{N}{1,3}|"
"""What tells the regular expressions of these tokenizers apart: how many digits a word has."""


class Gguf(Exporter):
    """``model.gguf`` of a Llama or Qwen2 model with a byte-level BPE tokenizer.

    A weight keeps its rows' groups: GGUF stores [out_features, in_features], and only rows of Llama's queries and keys
    change places. Types with an offset (q4_1, q5_1 and the k-quants) do not keep zeros and are not written.
    """

    name, extra = "gguf", "gguf"
    packages = ("gguf",)
    weight_types = tuple(TYPES)

    def refusal(self, model: Any) -> str | None:
        config = model.config
        if config.model_type not in ARCHITECTURES:
            return f"a {config.model_type} model: export to gguf supports {', '.join(ARCHITECTURES)}"
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            return f"rope_type {rope['rope_type']!r}: export to gguf supports the default rotary embedding"
        biases = [name for name, _ in model.named_parameters() if name.endswith("_proj.bias")]
        if config.model_type == "llama" and biases:
            return f"the model has a bias ({biases[0]}): export to gguf supports Llama models without biases"
        if getattr(config, SHAPES, None):
            return "its feed-forwards have uneven widths: export to gguf supports equal ones"
        if getattr(config, "use_sliding_window", False):
            return "use_sliding_window: export to gguf supports full attention"
        return None

    def write(self, model: Any, tokenizer: Any, folder: Path, weight_type: str) -> None:
        import gguf
        from gguf.quants import quantize

        config = model.config
        architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
        _write_config(writer, config)
        writer.add_file_type(
            getattr(gguf.LlamaFileType, "ALL_F32" if weight_type == "f32" else _file_type(weight_type))
        )
        _write_tokenizer(writer, tokenizer, config.vocab_size, folder)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stem, _, part = name.rpartition(".")
            values = _permuted(stem, tensor.float().contiguous().numpy(), config, back=False)
            kind = gguf.GGMLQuantizationType[_type_of(values, weight_type)]
            writer.add_tensor(f"{names.get_name(stem)}.{part}", quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read_weights(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        from gguf.quants import dequantize

        reader = metadata_reader()(folder / FILE)
        config = _Config(reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        for stem, layer in _stems(config.num_hidden_layers).items():
            tensor = tensors.get(f"{stem}.weight")
            if tensor is None and stem == "output":
                tensor = tensors["token_embd.weight"]
            if tensor is not None:
                values = dequantize(tensor.data, tensor.tensor_type)
                yield layer, _permuted(layer, values.reshape(tensor.shape[::-1].tolist()), config, back=True)

    def opened(self, folder: Path, model: Any) -> Run:
        read, _ = load(folder / FILE, dtype=torch.float32)

        @torch.no_grad()
        def run(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = read(ids[None], use_cache=False).logits[0]
            return logits

        return run

    def tolerance(self, weight_type: str) -> float | None:
        return 1e-3 if weight_type == "f32" else None

    def keeps_weights(self, weight_type: str) -> torch.dtype | None:
        return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(weight_type)

    def advice(self, out: Path, weight_type: str) -> list[str]:
        return [f"llama.cpp runs {out / FILE} (llama-cli -m {out / FILE}); it multiplies by the zeros"]


class _Config:
    """The numbers of heads and layers in a file, under transformers' names."""

    def __init__(self, reader: Any) -> None:
        def number(key: str) -> int:
            return int(reader.fields[f"{self.model_type}.{key}"].contents())

        self.model_type = str(reader.fields["general.architecture"].contents())
        self.num_hidden_layers = number("block_count")
        self.num_attention_heads = number("attention.head_count")
        self.num_key_value_heads = number("attention.head_count_kv")


def _stems(layers: int) -> dict[str, str]:
    """Names of the weights of all linear layers in a file, and their names in transformers."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    blocks = {f"blk.{i}.{own}": f"model.layers.{i}.{theirs}" for i in range(layers) for own, theirs in parts.items()}
    return {**blocks, "output": "lm_head"}


def _permuted(layer: str, values: np.ndarray, config: Any, *, back: bool) -> np.ndarray:
    """Llama's queries and keys with the rows of each head in GGUF's order: pairs that rotate together are neighbors."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if config.model_type != "llama" or heads is None:
        return values
    rows = values.shape[0]
    halves = (rows // heads // 2, 2) if back else (2, rows // heads // 2)
    turned = values.reshape(heads, *halves, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned.reshape(values.shape))


def _type_of(values: np.ndarray, weight_type: str) -> str:
    if values.ndim < 2:
        return "F32"
    quantized = weight_type.startswith("q")
    return "F16" if quantized and values.shape[-1] % BLOCK else TYPES[weight_type]


def _file_type(weight_type: str) -> str:
    return "ALL_F32" if weight_type == "f32" else f"MOSTLY_{TYPES[weight_type]}"


def _write_config(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any, size: int, folder: Path) -> None:
    """Write a byte-level BPE vocabulary, padded to ``size``.

    Raises:
        CheckpointError: if the tokenizer is of another kind.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError("the tokenizer has no tokenizer.json: export to gguf supports byte-level BPE tokenizers")
    stored = json.loads(backend.to_str())
    splitting = _splitting(stored)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {entry["id"] for entry in stored.get("added_tokens", ()) if entry["special"]}
    added = {entry["id"] for entry in stored.get("added_tokens", ())} - special
    tokens: list[str] = []
    kinds: list[Any] = []
    for index in range(size):
        tokens.append(vocabulary.get(index, f"[PAD{index}]"))
        kind = gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED
        kinds.append(
            gguf.TokenType.CONTROL if index in special else gguf.TokenType.USER_DEFINED if index in added else kind
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = stored["model"].get("merges", [])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    for role in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _splitting(stored: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text into words before BPE.

    Raises:
        CheckpointError: if it is none of those known here.
    """
    before = stored.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    text = json.dumps(steps)
    if stored["model"].get("type") == "BPE":
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            for mark, found in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
                if json.dumps(mark)[1:-1] in text:
                    return found
    raise CheckpointError(
        f"the tokenizer ({stored['model'].get('type')}, words split by {', '.join(map(str, kinds))}) has no known name "
        "in llama.cpp: export to gguf supports the tokenizers of GPT-2, SmolLM2, Qwen2 and Llama 3"
    )
