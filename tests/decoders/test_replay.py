"""Running blocks one at a time gives the same results as the model's own forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ace_triton.decoders.batches import Batch, MaskedInput
from ace_triton.decoders.blocks import find_blocks
from ace_triton.decoders.calibration_mode import calibration_mode
from ace_triton.decoders.replay import Replay, WholeForward, make_runner
from ace_triton.out_of_memory import is_out_of_memory
from ace_triton.prune_blocks import prune_model
from ace_triton.timing import Stopwatch

LENGTHS = torch.tensor([16, 9, 12, 16, 5, 16])


def padding(side: str | None) -> torch.Tensor | None:
    places = torch.arange(16)
    kept = {"right": places < LENGTHS[:, None], "left": places >= 16 - LENGTHS[:, None]}
    return kept.get(side)


def batches_of(ids: torch.Tensor, valid: torch.Tensor | None, size: int = 4) -> list[Batch]:
    masks = [None] * len(ids) if valid is None else valid.split(size)
    return [Batch.of_ids(part, mask) for part, mask in zip(ids.split(size), masks, strict=False)]


def runner_of(model: nn.Module, batches: list[Batch]):
    return make_runner(model, find_blocks(model), batches, Stopwatch(torch.device("cpu")))


def own_hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The output of the last block in the model's own forward."""
    seen = []
    last = find_blocks(model)[-1].module
    hook = last.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    mask = None if batch.valid is None else batch.valid.long()
    model(**batch.inputs, attention_mask=mask, use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_replay_is_the_models_own_forward_bit_for_bit(make_decoder, ids, family, attention, side):
    model = make_decoder(family, attention)
    batches = batches_of(ids, padding(side))
    with calibration_mode(model):
        runner = runner_of(model, batches)
        assert isinstance(runner, Replay)
        for index in range(3):
            runner.run(index, None, advance=True)
        for batch, hidden in zip(batches, runner.hidden.values(), strict=True):
            assert torch.equal(hidden, own_hidden(model, batch))


@pytest.mark.parametrize("side", [None, "right"])
def test_batches_of_other_inputs_than_ids_are_run(make_decoder, ids, side):
    model = make_decoder("llama")
    embedded = model.get_input_embeddings()(ids).detach() + 1
    positions = torch.arange(16).expand(6, 16) * 2
    mask = padding(side)
    batches = [
        Batch({"inputs_embeds": embedded[part], "position_ids": positions[part]}, None if mask is None else mask[part])
        for part in (slice(0, 4), slice(4, 6))
    ]
    assert [batch.shape for batch in batches] == [(4, 16), (2, 16)]
    with calibration_mode(model):
        runner, of_ids = runner_of(model, batches), runner_of(model, batches_of(ids, mask))
        for index in range(3):
            runner.run(index, None, advance=True)
            of_ids.run(index, None, advance=True)
        for batch, hidden, other in zip(batches, runner.hidden.values(), of_ids.hidden.values(), strict=True):
            assert torch.equal(hidden, own_hidden(model, batch))
            assert not torch.equal(hidden, other)


def test_hidden_states_keep_the_models_dtype(make_decoder, ids):
    model = make_decoder("llama").bfloat16()
    with calibration_mode(model):
        runner = runner_of(model, batches_of(ids, None))
        runner.run(0, None, advance=True)
    assert {hidden.dtype for hidden in runner.hidden.values()} == {torch.bfloat16}


def test_a_run_without_advance_keeps_the_hidden_states(make_decoder, ids):
    model = make_decoder("llama")
    with calibration_mode(model):
        runner = runner_of(model, batches_of(ids, None))
        before = [hidden.clone() for hidden in runner.hidden.values()]
        runner.run(0, None, advance=False)
    assert all(map(torch.equal, runner.hidden.values(), before))


class ShapesOnly:
    """A watcher of its own kind: records the batches it is given."""

    has_read = False

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[int, int], torch.Tensor | None, bool]] = []

    @contextmanager
    def batch(
        self,
        shape: tuple[int, int],
        valid: torch.Tensor | None,
        *,
        others: Sequence[MaskedInput] = (),
        leave_early: bool = False,
    ) -> Iterator[None]:
        self.batches.append((shape, valid, leave_early))
        yield


@pytest.mark.parametrize("advance", [False, True])
def test_any_watcher_is_given_every_batch(make_decoder, ids, advance):
    model, batches = make_decoder("llama"), batches_of(ids, padding("right"))
    block, watcher, whole = model.model.layers[0], ShapesOnly(), ShapesOnly()
    with calibration_mode(model):
        runner_of(model, batches).run(0, watcher, advance=advance, finished=[block.self_attn])
        WholeForward(model, batches, Stopwatch(torch.device("cpu"))).run(0, whole, advance=advance)
    for seen, leave_early in ((watcher, not advance), (whole, True)):
        assert [(shape, early) for shape, _, early in seen.batches] == [((4, 16), leave_early), ((2, 16), leave_early)]
        assert all(valid is batch.valid for (_, valid, _), batch in zip(seen.batches, batches, strict=True))


def test_recording_computes_no_block(make_decoder, ids):
    model = make_decoder("llama")
    runs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    with calibration_mode(model):
        runner_of(model, batches_of(ids, None, size=1))
    assert len(runs) == 3 * 3, "only the trial runs blocks: once in the model, twice alone"


def test_masks_and_tables_are_kept_once_for_all_batches(make_decoder, ids):
    model = make_decoder("gemma3_text")
    with calibration_mode(model):
        runner = runner_of(model, batches_of(ids, None, size=2))
    first, *others = ([call.kwargs for call in calls] for calls in runner._calls)
    for later in others:
        for mine, theirs in zip(later, first, strict=True):
            assert mine["attention_mask"] is theirs["attention_mask"]
            assert all(map(lambda a, b: a is b, mine["position_embeddings"], theirs["position_embeddings"]))


class Borrowing(nn.Module):
    """A feed-forward that also reads state stored by the feed-forward of another block."""

    def __init__(self, inner: nn.Module, owner: "Borrowing | None") -> None:
        super().__init__()
        self.inner = inner
        self.state = owner.state if owner else {}
        self.is_owner = owner is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_owner:
            self.state["calls"] = self.state.get("calls", 0) + 1
            return self.inner(x)
        return self.inner(x) * self.state["calls"]


def test_blocks_that_share_state_are_noticed(make_decoder, ids):
    model = make_decoder("llama")
    first, _, last = model.model.layers
    first.mlp = Borrowing(first.mlp, None)
    last.mlp = Borrowing(last.mlp, first.mlp)
    with calibration_mode(model), pytest.warns(UserWarning, match=r"layers\.2 needs more than its hidden states"):
        assert isinstance(runner_of(model, batches_of(ids, None)), WholeForward)


def test_a_block_that_overwrites_its_input_is_noticed(make_decoder, ids):
    def double_the_input(_module, args, _output) -> None:
        args[0].mul_(2)

    model = make_decoder("llama")
    model.model.layers[1].register_forward_hook(double_the_input)
    with calibration_mode(model), pytest.warns(UserWarning, match="needs more than its hidden states"):
        assert isinstance(runner_of(model, batches_of(ids, None)), WholeForward)


def test_blocks_called_twice_are_noticed(make_decoder, ids):
    model = make_decoder("llama")
    model.model.layers = nn.ModuleList([*model.model.layers, model.model.layers[0]])
    model.config.num_hidden_layers = 4
    with calibration_mode(model), pytest.warns(UserWarning, match="call each block once"):
        assert isinstance(runner_of(model, batches_of(ids, None)), WholeForward)


def test_overflow_in_the_forward_names_the_block(make_decoder, ids):
    model = make_decoder("llama")
    torch.nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, float("inf"))
    with calibration_mode(model), pytest.raises(ValueError, match=r"model\.layers\.1 gives NaN or infinity"):
        runner_of(model, batches_of(ids, None))


def test_a_full_memory_is_not_taken_for_a_block_that_cannot_be_replayed(make_decoder, ids):
    model, calls = make_decoder("llama"), []

    def fill_memory(*_args) -> None:
        calls.append(1)
        if len(calls) > 1:
            torch.empty(10**15)

    model.model.layers[1].mlp.register_forward_hook(fill_memory)
    with calibration_mode(model), pytest.raises(RuntimeError, match="can't allocate memory"):
        runner_of(model, batches_of(ids, None))


def test_other_errors_of_a_block_are_named(make_decoder, ids):
    model, calls = make_decoder("llama"), []

    def fail(*_args) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("called twice")

    model.model.layers[1].mlp.register_forward_hook(fail)
    with calibration_mode(model), pytest.warns(UserWarning, match=r"a block fails .* \(called twice\)"):
        assert isinstance(runner_of(model, batches_of(ids, None)), WholeForward)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes."), True),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_a_full_memory_are_distinguished_from_others(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_the_model_is_restored_after_an_error(make_decoder, ids):
    model = make_decoder("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]

    def interrupted() -> None:
        with calibration_mode(model):
            assert not model.config.use_cache
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            runner_of(model, batches_of(ids, None))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_stubs_are_taken_out_after_an_error(make_decoder, ids):
    model = make_decoder("llama")
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
    patched = vars(model.model.layers[0])["forward"]
    failing = [*batches_of(ids, None), Batch.of_ids(torch.full((1, 16), 10_000))]
    with calibration_mode(model), pytest.raises(IndexError):
        runner_of(model, failing)
    assert vars(model.model.layers[0])["forward"] is patched
    assert "forward" not in vars(model.model.layers[1])


class AttentionAdded(nn.Module):
    """A block that adds to its attention's output in place, so a cached output would contain the sum."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        attended.add_(hidden_states)
        return attended + self.mlp(self.post_attention_layernorm(attended))


def test_outputs_that_a_block_changes_are_computed_again(make_decoder, ids):
    model, plain = make_decoder("llama"), make_decoder("llama")
    model.model.layers = nn.ModuleList(AttentionAdded(block) for block in model.model.layers)
    for decoder in (model, plain):
        prune_model(decoder, ids, "wanda", sequential="layers", batch_size=2)
    weights = plain.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


class NeedsAttentionWeights(AttentionAdded):
    """A block that reads the second output of its attention, which is not cached."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, weights = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        attended = attended + hidden_states + self.read(weights)
        return attended + self.mlp(self.post_attention_layernorm(attended))

    def read(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.sum() * 0


class FillsMemory(NeedsAttentionWeights):
    def read(self, weights: torch.Tensor | None) -> torch.Tensor:
        return torch.empty(10**15 if weights is None else 1) * 0


def test_a_block_that_fails_with_cached_outputs_is_named_and_pruned_the_same(make_decoder, ids, monkeypatch):
    models = [make_decoder("llama") for _ in range(2)]
    for model in models:
        model.model.layers = nn.ModuleList(NeedsAttentionWeights(block) for block in model.model.layers)
    with pytest.warns(UserWarning, match=r"NeedsAttentionWeights: .* LlamaAttention .*again.*NoneType") as caught:
        prune_model(models[0], ids, "wanda", sequential="layers", batch_size=2)
    assert len(caught) == 1
    monkeypatch.setattr(Replay, "_may_reuse", lambda *_: False)
    prune_model(models[1], ids, "wanda", sequential="layers", batch_size=2)
    weights = models[1].state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in models[0].state_dict().items())


def test_a_full_memory_is_not_taken_for_a_block_that_needs_more_than_is_cached(make_decoder, ids):
    model = make_decoder("llama")
    model.model.layers = nn.ModuleList(FillsMemory(block) for block in model.model.layers)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        prune_model(model, ids, "wanda", sequential="layers", batch_size=2)


def test_reusing_outputs_of_finished_modules_changes_nothing(make_decoder, ids, family, monkeypatch):
    pruned = []
    for reuse in (True, False):
        model = make_decoder(family)
        if not reuse:
            monkeypatch.setattr(Replay, "_may_reuse", lambda *_: False)
        prune_model(model, ids, "wanda", sequential="layers", batch_size=2)
        pruned.append(model.state_dict())
    assert all(torch.equal(weight, pruned[1][name]) for name, weight in pruned[0].items())
