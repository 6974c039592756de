"""A tiny model with a tokenizer of its own, saved as transformers saves them, and tiny decoders of many families."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from ace_triton.methods.registry import _REGISTRY

VOCABULARY = 320

_SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": 6},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 8},
    "gemma3_text": {**_GATED, **_SLIDING, "head_dim": 8},
    "phi3": _GATED,
    "gpt2": {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {**_SMALL, "intermediate_size": 48},
    "falcon": {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "qwen3_moe": {**_GATED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma4_text": {
        **_GATED,
        **_SLIDING,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 8,
    },
}
"""Configurations of small random decoders: gated and plain, fused and not, with masks that differ by block
(Gemma), weights [in, out] (GPT-2), 2-D inputs (OPT), parallel attention (Falcon), stacked experts (Qwen3-MoE)
and keys that one block lends another (Gemma 4)."""


def pytest_configure() -> None:
    """With ACE_TRITON_TEST_DTYPE=bfloat16 or float64 the package runs under that default dtype of torch."""
    if dtype := os.environ.get("ACE_TRITON_TEST_DTYPE"):
        from tests.default_dtype import use_default_dtype

        use_default_dtype(getattr(torch, dtype))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """No garbage collection while modules load; later ones are rarer and skip what has been loaded until then."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000)
        gc.enable()


@pytest.fixture(autouse=True)
def registered_metrics():
    """A metric that a test registers is forgotten afterwards."""
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """The name of every family in turn."""
    return request.param


@pytest.fixture
def one_thread():
    """torch on one thread, which is all that a small model can use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_decoder(one_thread):
    """make_decoder(family, **changes to its configuration): a random model, the same every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str, attention: str = "eager", **changes):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**FAMILIES[family], **_TOKENS, **changes})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Six sequences of sixteen tokens."""
    return torch.randint(3, 101, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: index + 2 for index, symbol in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **words}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def save(tmp_path, tokenizer):
    """save(model, name): the folder of its checkpoint."""

    def save(model, name="source", **options):
        folder = tmp_path / name
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def some_text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture
def signals_as_in_a_terminal():
    """A test run in the background inherits signals that are ignored; here they have Python's own handlers."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words): run ``ace-triton`` in this process; its exit code, output and errors."""
    from ace_triton.commands.cli import main
    from ace_triton.kernels import cpu_library

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ace-triton", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        capsys.readouterr()  # What fixtures printed is not the command's.
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    if cpu_library.available():
        cpu_library.use_input_bits(max(cpu_library.INPUT_BITS))  # For the whole process, as a command sets them.


@pytest.fixture
def short_samples(monkeypatch):
    """A study's models write a few tokens only."""
    from ace_triton.study import samples

    monkeypatch.setattr(samples, "NEW_TOKENS", 4)


@pytest.fixture
def protocol(short_samples, tiny_checkpoint, some_text):
    """What a study of the tiny checkpoint is run on."""
    from ace_triton.study.workbench import Protocol

    texts = {"calibration": str(some_text), "evaluation": str(some_text)}
    return Protocol(str(tiny_checkpoint), **texts, samples=4, windows=2, window_length=16, dtype=torch.float32)


@pytest.fixture
def study(command, short_samples, tiny_checkpoint, some_text):
    """study(out, *words): run ``ace-triton study`` on the tiny checkpoint; its exit code, output and errors."""
    small = ["--samples", "4", "--windows", "2", "--window-length", "16", "--dtype", "float32"]
    texts = ["--calibration", some_text, "--evaluation", some_text]
    return lambda out, *words: command("study", tiny_checkpoint, out, *texts, *small, *words)


@pytest.fixture(scope="session")
def measured():
    """measured(values, seconds): a study's results, from (variant, sparsity) -> perplexity by seed.

    Perplexity over the further windows, of 32 tokens, is twice that. Each takes a CPU second, or ``seconds`` of it.
    """
    from ace_triton.study.journal import Results
    from ace_triton.study.records import CellResult, DenseResult, Evaluation, RecoveryCost, Setting, StageSeconds
    from ace_triton.study.tally import Tally

    def tally(values, seconds=None) -> Tally:
        setting = Setting("tiny", "w", "float32", "c", "cs", "e", "es", 4, 8, 16, (32,))
        results = Results(setting, DenseResult(10.0, (Evaluation(32, 20.0),)))
        for (variant, sparsity), found in values.items():
            for seed, value in enumerate(found):
                minutes = variant.minutes
                results.add(
                    CellResult(
                        variant.at(sparsity, 16, seed),
                        value,
                        0.5,
                        StageSeconds(1, 1, 1, 4),
                        (seconds or {}).get(variant, 1.0) * (1 + seed / 1000),
                        "a processor",
                        2,
                        (Evaluation(32, 2 * value),),
                        None if minutes is None else RecoveryCost(5, 50, 60 * minutes, 120 * minutes),
                    )
                )
        return Tally(results)

    return tally


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """The environment for a pytest in a process of its own, where this one may be a worker of pytest-xdist."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture
def together(tmp_path):
    """together(size, task): run ``task(rank)`` in forked processes of one group; the exit codes."""
    import torch.distributed as dist

    meetings = iter(range(100))

    def run(size, task):
        meeting = tmp_path / f"meeting-{next(meetings)}"
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                try:
                    torch.set_num_threads(1)
                    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
                    task(rank)
                    dist.barrier()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        meeting.unlink(missing_ok=True)
        return codes

    return run


@pytest.fixture
def command_together(together, tmp_path, monkeypatch):
    """command_together(size, *words): run ``ace-triton`` in ``size`` processes; the exit code and the texts of each."""
    import torch.distributed as dist

    from ace_triton.commands import cli

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(cli, "SECONDS_AFTER_THE_CAUSE", 1)

    def run(size, *words):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # As torchrun has one.
        monkeypatch.setenv("MASTER_PORT", str(store.port))

        def task(rank):
            os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
            sys.argv = ["ace-triton", *map(str, words)]
            with ExitStack() as streams:
                out, errors = (streams.enter_context((tmp_path / f"{n}-{rank}").open("w")) for n in ("out", "err"))
                streams.enter_context(redirect_stdout(out))
                streams.enter_context(redirect_stderr(errors))
                try:
                    cli.main()
                except SystemExit as stop:
                    code = stop.code
            if code:
                os._exit(code)

        codes = together(size, task)
        texts = [[(tmp_path / f"{name}-{rank}").read_text() for name in ("out", "err")] for rank in range(size)]
        return [(code, *text) for code, text in zip(codes, texts, strict=True)]

    return run
