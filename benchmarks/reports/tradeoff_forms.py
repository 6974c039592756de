"""The forms of a model that docs/tradeoff.md compares: how each is made, opened and measured."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from ace_triton.evaluate import perplexity
from ace_triton.exporters.gguf import FILE
from ace_triton.exporters.registry import export_model
from ace_triton.formats.registry import load_model
from ace_triton.generation import decode
from ace_triton.inputs.output_folder import files_in
from ace_triton.kernels import cpu_library
from ace_triton.linears import is_linear
from ace_triton.packed.pack_model import pack_model
from ace_triton.packed.packed_linear import PackedLinear
from ace_triton.packed.saving import save_packed
from ace_triton.presets import PRESETS, replaced
from ace_triton.recovery.settings import RecoverySettings
from ace_triton.solvers.quantize import GROUP, Quantization
from ace_triton.study.cells import Cell
from ace_triton.study.workbench import Protocol, Workbench

from .dense_bits import rounded_inputs

DENSE, OURS, LLAMA, STEP = "transformers", "ace_triton", "llama.cpp", "compiled step"

PATTERNS = ("16:32", "8:16", "2:4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {"fp32": None, "bf16": None, "8 bits": 8, "4 bits": 4}
LLAMA_TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")

_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""A log of llama.cpp that writes nothing."""

HEAD_BITS = 8
"""Bits of the head of a form in 8 or 4 bits, and of an embedding that shares its weight. llama.cpp quantizes both."""

LENGTH, SEED = 128, 0
"""Tokens of a calibration sequence, and the seed of the samples."""

RECOVERY = RecoverySettings(steps=259, forward_dtype=torch.float32)
"""How a recovered form is trained, with forwards in its bits: always the same number of optimizer steps."""


@dataclass(frozen=True)
class Form:
    """A form of a model.

    Attributes:
        engine: what runs it; the compiled step runs the forms of this package, and with STEP a dense model.
        pattern: n:m; "" for a model that is not pruned.
        weights: type of the weights: "fp32", "bf16", "8 bits" or "4 bits", or llama.cpp's name.
        input_bits: bits that products with quantized weights round their inputs to; None for the default.
        recovered: True if the kept weights are trained after pruning, in forwards with rounded weights.
    """

    engine: str
    pattern: str
    weights: str
    input_bits: int | None = None
    recovered: bool = False

    def __str__(self) -> str:
        ours = self.pattern or "dense, ace_triton,"
        first = {DENSE: "dense", LLAMA: LLAMA, STEP: "dense, compiled step,"}.get(self.engine, ours)
        inputs = "" if self.input_bits is None else f", {self.input_bits}-bit inputs"
        return f"{first} {self.weights}{inputs}{', recovered' if self.recovered else ''}"

    @property
    def head_bits(self) -> int | None:
        """Bits of the head; None if it is in the type of the model, or llama.cpp chooses."""
        return HEAD_BITS if self.engine == OURS and BITS[self.weights] is not None else None


FORMS = (
    *(Form(DENSE, "", weights) for weights in DTYPES),
    *(Form(LLAMA, "", weights) for weights in LLAMA_TYPES),
    Form(OURS, "", "8 bits"),
    Form(OURS, "", "8 bits", 8),
    *(Form(OURS, pattern, weights) for pattern in PATTERNS for weights in BITS),
    *(Form(OURS, pattern, "8 bits", 8) for pattern in PATTERNS),
)

RECOVERED_FORMS = tuple(Form(OURS, "8:16", weights, recovered=True) for weights in ("8 bits", "4 bits"))
"""Forms that take a training; they are measured only if they are named."""

STEP_FORMS = tuple(Form(STEP, "", weights) for weights in DTYPES)
"""The dense model in the compiled step. Only its speed is measured: its perplexity is that of the dense model."""

DENSE_FORM = FORMS[0]
"""What speeds are compared with."""


class Opened(ABC):
    """A form in memory.

    Attributes:
        block_bytes: bytes of the weights of all linear layers in the blocks.
        block_weights: number of these weights, zeros included.
        version: the engine and its version.
        decoder: "compiled" for the compiled step, else the engine.
    """

    block_bytes: int
    block_weights: int
    version: str
    decoder: str = LLAMA

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a linear layer's weight in the blocks, zeros included in the number of weights."""
        return self.block_bytes / self.block_weights

    @abstractmethod
    def perplexity(self, bench: Workbench) -> float:
        """Perplexity on the windows of a workbench."""

    @abstractmethod
    def tokens_per_second(self, ids: list[int], new_tokens: int) -> float:
        """Speed of greedy decoding after the first new token."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""


class InTorch(Opened):
    """A model of transformers, dense or packed.

    Args:
        folder: the model.
        dtype: type of its weights, and of the scales of quantized ones.
        decoder: what decodes, as for :func:`ace_triton.generation.decode`.
        input_bits: bits that products with quantized weights round their inputs to; None for the default. The windows
            of a perplexity have too many rows for these products, so there the inputs are rounded before each layer.
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype, *, decoder: str = "transformers", input_bits: int | None = None
    ) -> None:
        self.decoder, self.input_bits = decoder, input_bits
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model, self.tokenizer = load_model(folder, dtype=dtype)
        head = self.model.get_output_embeddings()
        self.block_bytes = self.block_weights = 0
        for layer in self.model.modules():
            if layer is head:
                continue
            if isinstance(layer, PackedLinear):
                self.block_bytes += layer.packed.packed_bytes
                self.block_weights += layer.out_features * layer.in_features
            elif is_linear(layer):
                self.block_bytes += layer.weight.nbytes
                self.block_weights += layer.weight.numel()

    def perplexity(self, bench: Workbench) -> float:
        with rounded_inputs(self.model, PackedLinear, self.input_bits):
            return _perplexity(bench, self.model)

    def tokens_per_second(self, ids: list[int], new_tokens: int) -> float:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        usual = cpu_library.input_bits()
        cpu_library.use_input_bits(self.input_bits or usual)
        try:
            times = decode(self.model, self.tokenizer, ids, decoder=self.decoder, **options).times
        finally:
            cpu_library.use_input_bits(usual)
        return (new_tokens - 1) / (times[-1] - times[1])

    def close(self) -> None:
        del self.model


class InLlama(Opened):
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, *, longest: int, all_logits: bool) -> None:
        import gguf
        import llama_cpp

        matrices = [t for t in gguf.GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        self.block_bytes = int(sum(matrix.n_bytes for matrix in matrices))
        self.block_weights = int(sum(matrix.n_elements for matrix in matrices))
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._llama = llama_cpp.Llama(
            str(file),
            n_ctx=longest,
            n_batch=longest,
            n_threads=1,
            n_threads_batch=1,
            logits_all=all_logits,
            verbose=False,
        )

    def perplexity(self, bench: Workbench) -> float:
        def logits(windows: torch.Tensor) -> Iterator[Iterable[torch.Tensor]]:
            for window in windows:
                self._llama.reset()
                self._llama.eval(window.tolist())
                yield [torch.from_numpy(self._llama.scores[: len(window)])]

        return _perplexity(bench, bench.model, logits=logits)

    def tokens_per_second(self, ids: list[int], new_tokens: int) -> float:
        self._llama.reset()
        self._llama.eval(ids)
        token = self._llama.sample(temp=0.0)
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            self._llama.eval([token])
            token = self._llama.sample(temp=0.0)
        return (new_tokens - 1) / (time.perf_counter() - start)

    def close(self) -> None:
        self._llama.close()


def _perplexity(bench: Workbench, model: Any, **options: Any) -> float:
    setting = bench.setting
    length = setting.window_length
    windows = setting.windows_of(length)
    return perplexity(model, bench.ids, length=length, windows=windows, beginning=bench.beginning, **options).perplexity


class Forms:
    """One model in all its forms, which are kept in a folder.

    Args:
        protocol: the model and the texts.
        preset: how the model is pruned.
        folder: holds the packed folders and the GGUF files; they are made if they are missing.
    """

    def __init__(self, protocol: Protocol, preset: str, folder: Path) -> None:
        self.protocol, self.preset, self.folder = protocol, preset, folder

    @cached_property
    def bench(self) -> Workbench:
        """The dense model and the texts."""
        return Workbench(self.protocol)

    def why_not(self, form: Form) -> str | None:
        """Why a form cannot be measured here; None if it can."""
        packages = ("llama_cpp", "gguf") if form.engine == LLAMA else ()
        missing = [package for package in packages if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed: pip install llama-cpp-python gguf" if missing else None

    def opened(self, form: Form, *, all_logits: bool) -> Opened:
        """Load a form, after it was made if it is missing.

        Args:
            form: the form.
            all_logits: True for a perplexity, False for decoding.
        """
        if form.engine in (DENSE, STEP):
            decoder = "compiled" if form.engine == STEP else "transformers"
            return InTorch(self.protocol.model, DTYPES[form.weights], decoder=decoder)
        if form.engine == LLAMA:
            return InLlama(self._gguf(form.weights), longest=self.protocol.window_length, all_logits=all_logits)
        dtype = DTYPES.get(form.weights, torch.float32)
        return InTorch(self._packed(form), dtype, decoder="compiled", input_bits=form.input_bits)

    def file_bytes(self, form: Form) -> int | None:
        """Bytes of the form's weights in files, embeddings included; None for the dense model."""
        if form.engine == DENSE:
            return None
        if form.engine == LLAMA:
            return self._gguf(form.weights).stat().st_size
        folder = self._packed(form)
        return sum((folder / name).stat().st_size for name in files_in(folder) if name.endswith(".safetensors"))

    def _packed(self, form: Form) -> Path:
        """The folder of a packed model. fp32 and bf16 have one of their own each, from one pruning."""
        folder = self._place(form)
        if folder.exists():
            return folder
        bits = BITS[form.weights]
        if not form.pattern:
            model = copy.deepcopy(self.bench.model)
            pack_model(model, group=GROUP, head_bits=form.head_bits, dense_bits=bits)
            save_packed(model, self.bench.tokenizer, folder)
            return folder
        quantize = None if bits is None or form.recovered else Quantization(bits, GROUP)
        parts = {"sparsity": form.pattern, "quantize": quantize}
        with self.bench.pruned(Cell(replaced(PRESETS[self.preset], parts), LENGTH, SEED)):
            if form.recovered:
                folder.parent.mkdir(parents=True, exist_ok=True)
                rounded = None if bits is None else Quantization(bits, GROUP, "absmax")
                settings = dataclasses.replace(RECOVERY, quantize=rounded)
                self.bench.recover(settings, state=folder.with_suffix(".state"))
            quantized = {"bits": bits, "group": GROUP, "head_bits": form.head_bits}
            names = [form.weights] if bits is not None else list(DTYPES)
            for name in names:
                model = copy.deepcopy(self.bench.model).to(DTYPES.get(name, torch.float32))
                pack_model(model, form.pattern, **({} if bits is None else quantized))
                save_packed(model, self.bench.tokenizer, self._place(dataclasses.replace(form, weights=name)))
        return folder

    def _place(self, form: Form) -> Path:
        """The folder of a packed model, named by what pruned it too."""
        pruning = f"{self.preset}-{self.protocol.samples}-{Path(self.protocol.calibration).name.replace(':', '-')}"
        name = f"{form.pattern.replace(':', '-') or 'dense'}-{form.weights.replace(' ', '-')}"
        return self.folder / pruning / (f"{name}-recovered-{RECOVERY.steps}" if form.recovered else name)

    def _gguf(self, kind: str) -> Path:
        """A GGUF file, converted by llama.cpp from one in float32, as its users do."""
        import llama_cpp

        file = self.folder / f"{kind}.gguf"
        if file.exists():
            return file
        whole = self.folder / "gguf"
        if not whole.exists():
            export_model(self.protocol.model, whole, "gguf", weight_type="f32", prompts=1)
        llama_cpp.llama_log_set(_QUIET, None)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        made = file.with_suffix(".part")
        failed = llama_cpp.llama_model_quantize(str(whole / FILE).encode(), str(made).encode(), ctypes.byref(options))
        if failed:
            raise RuntimeError(f"llama.cpp could not convert {whole / FILE} to {kind}")
        return made.rename(file)
