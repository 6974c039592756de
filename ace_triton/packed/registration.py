"""Register the packed format with transformers, without importing transformers for it."""

from __future__ import annotations

import sys

from .manifest import QUANTIZATION


def register_quantizer() -> None:
    """Let ``from_pretrained`` of transformers' AutoModel classes load packed checkpoints. More calls change nothing.

    ``import ace_triton`` calls it if transformers was imported before, and so do :func:`~ace_triton.load` and
    :func:`~ace_triton.pack_model`. Call it yourself if your script imports ace_triton first.
    """
    from transformers.quantizers import auto

    from .quantizer import PackedConfig, PackedQuantizer

    method = QUANTIZATION["quant_method"]
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(method)(PackedConfig)
        auto.register_quantizer(method)(PackedQuantizer)


def register_if_imported() -> None:
    """Register if transformers is imported already, since importing it takes seconds."""
    if "transformers" in sys.modules:
        register_quantizer()
