"""The perplexity of a checkpoint in files is that of the model in memory, and one block at a time is loaded."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ace_triton import perplexity_of_checkpoint
from ace_triton.decoders.kept_tensors import TensorFiles
from ace_triton.errors import AceError, CheckpointError, TextError
from ace_triton.evaluate import perplexity
from ace_triton.inputs import checkpoint
from ace_triton.inputs.beginnings import Beginning
from ace_triton.streaming.loaded_on_use import LoadedOnUse
from ace_triton.streaming.streamed_evaluate import opened


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(3, 101, (70,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def loaded_together(monkeypatch):
    """The names of all weights that are loaded, each time that a part was loaded."""
    seen, loaded = [], LoadedOnUse.loaded

    @contextmanager
    def watched(self, part):
        with loaded(self, part):
            seen.append({self._names[parameter] for parameter, users in self._users.items() if users})
            yield

    monkeypatch.setattr(LoadedOnUse, "loaded", watched)
    return seen


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_every_family(make_decoder, save, stream, family, offload, tmp_path):
    source = save(make_decoder(family))
    model, _ = checkpoint.load(source)
    expected = perplexity(model, stream, length=16)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = perplexity_of_checkpoint(source, stream, length=16, offload=offload, folder=temporary)
    assert found == expected
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_few_tokens_are_there_at_once(make_decoder, save, stream, family, dtype, monkeypatch):
    """Of 16 tokens 5, 5, 5 and 1: the value is that of the model in memory, and no larger product is computed."""
    source = save(make_decoder(family))
    model, _ = checkpoint.load(source, dtype=dtype)
    whole = perplexity(model, stream, length=16)
    monkeypatch.setattr("ace_triton.decoders.parts_of_logits.PART", 5)
    expected = perplexity(model, stream, length=16)
    assert expected.perplexity == pytest.approx(whole.perplexity, rel=2e-3 if dtype == torch.bfloat16 else 1e-6)
    sizes = []
    with opened(source, dtype=dtype) as found:
        head = found.model.get_output_embeddings()
        head.register_forward_hook(lambda _m, args, _out: sizes.append(args[0].shape[-2]))
        assert perplexity(found.model, stream, length=16, logits=found.logits()) == expected
    assert sizes[-4 * 4 :] == [5, 5, 5, 1] * 4


def test_a_head_that_needs_all_tokens_gets_them(make_decoder, save, stream, monkeypatch):
    def add_first(_module, args, output):
        return output + args[0][..., :1, :1]

    source = save(make_decoder("llama"))
    monkeypatch.setattr("ace_triton.decoders.parts_of_logits.PART", 5)
    model, _ = checkpoint.load(source)
    model.get_output_embeddings().register_forward_hook(add_first)
    with opened(source) as found:
        found.model.get_output_embeddings().register_forward_hook(add_first)
        streamed = perplexity(found.model, stream, length=16, logits=found.logits())
    assert streamed == perplexity(model, stream, length=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_and_shards(tiny_model, save, stream, dtype):
    source = save(tiny_model, max_shard_size="40KB")
    model, _ = checkpoint.load(source, dtype=dtype)
    beginning = Beginning((2,))
    expected = perplexity(model, stream, length=16, windows=3, beginning=beginning)
    assert perplexity_of_checkpoint(source, stream, length=16, windows=3, beginning=beginning, dtype=dtype) == expected


def test_experts_that_the_checkpoint_stores_one_by_one(save, stream):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = save(MixtralForCausalLM(MixtralConfig(vocab_size=101, num_hidden_layers=2, num_local_experts=4, **sizes)))
    for dtype in ("auto", torch.bfloat16):
        model, _ = checkpoint.load(source, dtype=dtype)
        expected = perplexity(model, stream, length=16)
        assert perplexity_of_checkpoint(source, stream, length=16, dtype=dtype) == expected


def test_one_block_at_a_time_is_loaded(make_decoder, save, stream, loaded_together):
    source, steps = save(make_decoder("llama")), []
    with opened(source) as found:
        assert all(parameter.isnan().all() for parameter in found.model.parameters())
        perplexity(found.model, stream, length=16, logits=found.logits(lambda *step: steps.append(step)))
        assert all(parameter.isnan().all() for parameter in found.model.parameters())
    assert steps == [(1, 3), (2, 3), (3, 3)]
    blocks = [{name.split(".")[2] for name in names if ".layers." in name} for names in loaded_together]
    assert max(map(len, blocks)) == 1
    windows = 4
    after_trial, in_blocks = blocks[-(1 + windows) * 4 :], [{"0"}, {"1"}, {"2"}, set()]
    assert after_trial == [block for block in in_blocks for _ in range(1 + windows)]
    assert all(len(names) == 9 for names in loaded_together[-(1 + windows) * 4 : -(1 + windows)])


def test_converted_weights_outside_the_blocks_are_maps(tiny_checkpoint):
    """So the system reads the used rows of an embedding, and can drop the pages of a head."""
    with opened(tiny_checkpoint, dtype=torch.bfloat16) as found, found._weights.loaded(found.model):
        table = found.model.get_input_embeddings().weight
        assert table.dtype == torch.bfloat16
        assert table.untyped_storage().filename is not None
        block = found.model.model.layers[0]
        with found._weights.loaded(block):
            assert block.mlp.up_proj.weight.untyped_storage().filename is None


class Borrowing(nn.Module):
    """A feed-forward that also reads state stored by another one."""

    def __init__(self, inner, state, is_owner):
        super().__init__()
        self.inner, self.state, self.is_owner = inner, state, is_owner

    def forward(self, x):
        if self.is_owner:
            self.state["calls"] = self.state.get("calls", 0) + 1
            return self.inner(x)
        return self.inner(x) * self.state["calls"]


def share_state(model):
    state, (first, _, last) = {}, model.model.layers
    first.mlp, last.mlp = Borrowing(first.mlp, state, True), Borrowing(last.mlp, state, False)
    model.register_forward_pre_hook(lambda *_: state.clear())
    return model


def count_blocks(model):
    """The norm after the blocks adds the number of feed-forwards that ran in this forward."""
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.clear())
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    model.model.norm.register_forward_hook(lambda _m, _a, out: out + len(runs) * out.roll(1, -1))
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (share_state, "layers.2 needs more than its hidden states"),
        (count_blocks, "its logits need more than the hidden states of its last block"),
    ],
)
def test_what_cannot_be_replayed_runs_in_the_whole_model(make_decoder, save, stream, change, reason):
    source, steps = save(make_decoder("llama")), []
    expected = perplexity(change(checkpoint.load(source)[0]), stream, length=16)
    with opened(source) as found:
        model, logits = change(found.model), found.logits(lambda *step: steps.append(step))
        with pytest.warns(UserWarning, match=f"{reason}.* so the whole model is run each time"):
            streamed = perplexity(model, stream, length=16, logits=logits)
    assert streamed == expected
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_weights_that_are_read_outside_their_block_are_noticed(make_decoder, save, stream):
    with opened(save(make_decoder("llama"))) as found:
        layers = found.model.model.layers
        found.model.model.norm.register_forward_hook(lambda _m, _a, out: out + layers[0].input_layernorm.weight)
        with (
            pytest.warns(UserWarning, match="its logits need"),
            pytest.raises(AceError, match="NaN: evaluate the model in memory"),
        ):
            perplexity(found.model, stream, length=16, logits=found.logits())


def test_a_model_that_changes_its_own_weights_is_refused(save, stream):
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=101, hidden_size=32, num_hidden_layers=8, attention_hidden_size=32, rescale_every=2)
    source = save(RwkvForCausalLM(config).eval())
    with pytest.raises(AceError, match=r"rwkv.blocks.* is changed by the model's own forward.*without --stream"):
        perplexity_of_checkpoint(source, stream, length=16)


def test_bad_input_is_named(tiny_checkpoint, stream, tmp_path):
    with pytest.raises(TextError, match="token id 350"):
        perplexity_of_checkpoint(tiny_checkpoint, stream + 250, length=16)
    with pytest.raises(CheckpointError, match="is no folder that can be written"):
        perplexity_of_checkpoint(tiny_checkpoint, stream, length=16, folder=tmp_path / "nothing")
    with pytest.raises(AceError, match="offload must be one of"):
        perplexity_of_checkpoint(tiny_checkpoint, stream, length=16, offload="cloud")


def test_the_command(command, tiny_checkpoint, some_text, tmp_path, monkeypatch):
    words = ("--text", some_text, "--length", 16, "--windows", 3, "--device", "cpu")
    results, folders, write = {}, set(), TensorFiles.__setitem__

    def writing(self, key, tensor):
        folders.add(self._folder)
        write(self, key, tensor)

    monkeypatch.setattr(TensorFiles, "__setitem__", writing)
    runs = {"memory": [], "streamed": ["--stream"], "on disk": ["--stream", "--offload", "disk"]}
    for name, more in runs.items():
        told = tmp_path / f"{name}.json"
        code, _, errors = command("evaluate", tiny_checkpoint, *words, *more, "--json", told)
        assert code == 0, errors
        results[name] = {k: v for k, v in json.loads(told.read_text()).items() if k not in ("command", "date")}
    assert results["memory"] == results["streamed"] == results["on disk"]
    assert len(folders) == 1
    assert not folders.pop().exists()


def test_a_model_that_does_not_fit_is_streamed(command, tiny_checkpoint, some_text, monkeypatch):
    words = ("evaluate", tiny_checkpoint, "--text", some_text, "--length", 16, "--windows", 2, "--device", "cpu")
    assert "stay in files" not in command(*words)[2]
    monkeypatch.setattr("ace_triton.streaming.fits.available_memory", lambda: 1000)
    monkeypatch.setattr("ace_triton.commands.evaluate.available_memory", lambda: 1000)
    code, _, errors = command(*words, "--offload", "disk")
    assert code == 0, errors
    assert "so its weights stay in files (--stream)" in errors
    assert "stay in files" not in command(*words, "--no-stream")[2]


def test_the_command_refuses_what_cannot_be_streamed(command, tiny_checkpoint, prune_packed, some_text):
    words = ("--text", some_text, "--length", 16)
    for source, more, message in (
        (prune_packed, ("--stream",), "is in the format 'packed', which cannot be streamed: leave --stream out"),
        (tiny_checkpoint, ("--offload", "disk"), "--offload disk needs --stream"),
    ):
        code, _, errors = command("evaluate", source, *words, *more)
        assert (code, message in errors) == (1, True), errors


@pytest.fixture
def prune_packed(command, tiny_checkpoint, tmp_path):
    """The folder of a packed checkpoint."""
    assert command("prune", tiny_checkpoint, tmp_path / "packed", "--method", "magnitude", "--packed")[0] == 0
    return tmp_path / "packed"
