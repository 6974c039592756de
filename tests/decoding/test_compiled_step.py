"""The compiled step gives the model's own logits and tokens, or refuses the model by name."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

import ace_triton
from ace_triton.decoding.generate import compiled_generate
from ace_triton.decoding.parts import parts_of
from ace_triton.decoding.refusal import StepRefusedError
from ace_triton.decoding.step import TOLERANCES, CompiledStep, prove, step_together, why_not_compiled
from ace_triton.errors import GenerationError
from ace_triton.generation import check_room
from ace_triton.kernels import cpu_library
from ace_triton.kernels.backend import ENVIRONMENT_VARIABLE
from ace_triton.kernels.errors import ArgumentError

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="no CPU library")

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Families of conftest.py that the step takes; it refuses all others."""

PROMPT, LENGTH = 9, 40


@pytest.fixture(autouse=True)
def chosen_by_device(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def text(ids) -> torch.Tensor:
    """One text of forty tokens."""
    return ids.flatten()[:LENGTH][None]


@torch.inference_mode()
def distance(model, text, capacity=LENGTH) -> float:
    """Largest distance of the step's logits from the model's, after a prompt of nine tokens."""
    step = CompiledStep(model, capacity)
    given = [step.prompt(text[:, :PROMPT]).clone()]
    given += [step(token[None]).clone() for token in text[0, PROMPT:capacity]]
    wanted = model(input_ids=text[:, :capacity]).logits[0, PROMPT - 1 :].float()
    return float((torch.cat(given) - wanted).abs().max() / wanted.abs().max())


def pruned(model, sparsity, **options):
    ace_triton.prune_model(model, None, "magnitude", sparsity)
    ace_triton.pack_model(model, **options)
    return model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", TAKEN)
def test_the_logits_are_the_models(make_decoder, text, family, threads):
    changes = {"sliding_window": None} if family == "mistral" else {}
    model = make_decoder(family, **changes)
    for name, parameter in model.named_parameters():  # Norms and biases that do something.
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "embed" not in name:
            parameter.data *= 4
    torch.set_num_threads(threads)
    assert distance(model, text) < 2e-6


@pytest.mark.parametrize("isa", cpu_library.ISAS)
@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        ("2:4", {}),
        ("8:16", {}),
        ("0.5", {}),
        ("8:16", {"bits": 8, "group": 32}),
        ("16:32", {"bits": 4, "group": 32}),
        ("2:4", {"bits": 8, "group": 32, "head_bits": 8}),
        ("2:4", {"head_bits": 4, "group": 32, "tie_word_embeddings": True}),
        ("2:4", {"include": "*.mlp.*", "dense_bits": 8, "head_bits": 8, "group": 32}),
    ],
)
def test_packed_layers_of_each_layout(make_decoder, text, sparsity, options, isa):
    tied = {name: options[name] for name in options if name == "tie_word_embeddings"}
    model = make_decoder("qwen2", intermediate_size=64, **tied)
    model = pruned(model, sparsity, **{name: value for name, value in options.items() if name not in tied})
    in_use = cpu_library.isa()
    try:
        cpu_library.use_isa(isa)
    except ArgumentError:
        pytest.skip("not on this processor")
    try:
        assert distance(model, text) < 2e-6
    finally:
        cpu_library.use_isa(in_use)


@pytest.mark.parametrize("input_bits", [30, 8])
@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        (None, {}),
        ("2:4", {}),
        ("8:16", {"head_bits": 8, "group": 32}),
        ("0.5", {}),
        ("16:32", {"bits": 8, "group": 32}),
        ("2:4", {"bits": 4, "group": 32, "head_bits": 4}),
    ],
)
@torch.inference_mode()
def test_texts_together_get_what_each_gets_alone(make_decoder, ids, sparsity, options, input_bits):
    """Eighteen texts with prompts of different lengths: two join late, and each ends at another time."""
    model = make_decoder("qwen2", intermediate_size=64)
    if sparsity is not None:
        model = pruned(model, sparsity, **options)
    proven = prove(model)
    assert prove(model, proven) is proven
    prompts = [ids[k % 6][: 1 + k % 5 + k // 6][None] for k in range(18)]
    tokens = torch.arange(18 * 7, device="cpu").view(18, 7) % 98 + 3

    def begun() -> list[CompiledStep]:
        texts = [CompiledStep(model, 20, proven) for _ in prompts]
        for text, prompt in zip(texts, prompts, strict=True):
            text.prompt(prompt)
        return texts

    cpu_library.use_input_bits(input_bits)
    try:
        alone = [[step(token[None]).clone() for token in row] for step, row in zip(begun(), tokens, strict=True)]
        texts, read = begun(), [0] * 18
        for turn in range(7):
            running = [k for k in range(18) if turn >= 2 * (k > 15) and read[k] < 3 + k % 5]
            found = step_together([texts[k] for k in running], torch.stack([tokens[k, read[k]] for k in running]))
            for row, k in zip(found, running, strict=True):
                assert torch.equal(row, alone[k][read[k]][0])
                read[k] += 1
    finally:
        cpu_library.use_input_bits(30)
    assert read == [3 + k % 5 for k in range(18)]


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_the_models_up_to_its_rounding(make_decoder, text, dtype, most):
    model = pruned(make_decoder("llama"), "8:16").to(dtype)
    assert distance(model, text) < most


def test_the_same_tokens_as_transformers(make_decoder, text):
    model = pruned(make_decoder("qwen3"), "2:4")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3}
    prompt = text[:, :5]
    assert torch.equal(compiled_generate(model, prompt, **options), model.generate(prompt, **options))
    options |= {"do_sample": True, "temperature": 1.5, "top_k": 7}
    drawn = []
    for generate in (model.generate, lambda *given, **rest: compiled_generate(model, *given, **rest)):
        torch.manual_seed(3)
        drawn.append(generate(prompt, **options))
    assert torch.equal(*drawn)


def test_a_sliding_window_that_holds_the_text_is_no_limit(make_decoder, text):
    model = make_decoder("mistral", sliding_window=24)
    assert distance(model, text, capacity=24) < 2e-6
    with pytest.raises(StepRefusedError, match="sliding window of 24 tokens is shorter than the 25 tokens"):
        CompiledStep(model, 25)


def test_every_other_family_is_refused(make_decoder, family):
    model = make_decoder(family)
    if family in TAKEN:
        assert why_not_compiled(model) is None
        return
    reason = why_not_compiled(model)
    assert reason is not None
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "training mode"),
        (lambda model: model.to(torch.float64), "its dtype is torch.float64"),
        (lambda model: model.model.norm.register_forward_hook(lambda *_: None), "model.norm has hooks"),
        (lambda model: setattr(model.config, "final_logit_softcapping", 30.0), "caps logits"),
        (lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"), "of type 'dynamic'"),
        (lambda model: setattr(model.model.layers[1].self_attn, "use_rope", False), "no rotary positions"),
        (lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()), "activation ReLU"),
        (
            lambda model: setattr(model.model.layers[0].mlp, "extra", nn.Linear(2, 2)),
            "model.layers.0.mlp has extra, which it does not know",
        ),
        (lambda model: setattr(model.model, "norm", nn.LayerNorm(32)), "model.norm is a LayerNorm"),
        (lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5), "scaling of scores differs"),
    ],
)
def test_a_changed_model_is_refused_by_name(make_decoder, change, reason):
    model = make_decoder("llama")
    change(model)
    assert reason in str(why_not_compiled(model))


def test_the_trial_run_finds_what_the_modules_do_not_show(make_decoder):
    model = make_decoder("llama")

    class Scaled(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return 1.1 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model.model.layers[1].mlp.__class__ = Scaled
    assert "in a trial run its logits differ by" in str(why_not_compiled(model))


def test_queries_scaled_by_position_are_refused(make_decoder):
    """By the names in the forward of attention, and by the trial run at the last positions."""
    model = make_decoder("llama")
    attention = model.model.layers[1].self_attn

    class ByName(type(attention)):
        def forward(self, hidden_states, position_embeddings, attention_mask, **options):
            scale = self.beta + hidden_states
            return super().forward(scale, position_embeddings, attention_mask, **options)

    attention.__class__ = ByName
    assert "self_attn, a ByName, uses names that it does not know: beta, forward, super" in why_not_compiled(model)
    attention.__class__ = ByName.__base__

    class Far(type(model.model.layers[1])):
        def forward(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None, **options):
            weights = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **options}
            mixed = self.self_attn(self.input_layernorm(hidden_states), **weights)[0]
            hidden_states = hidden_states + mixed * (1 + (position_ids // 16)[..., None] * 10)
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    model.model.layers[1].__class__ = Far
    assert "in a trial run its logits differ by" in why_not_compiled(model)


def test_a_short_window_and_another_vocabulary(make_decoder):
    assert "sliding window of 1 tokens" in why_not_compiled(make_decoder("mistral", sliding_window=1))
    model = make_decoder("llama")
    model.lm_head = nn.Linear(32, 200, bias=False)
    assert why_not_compiled(model) is None
    model.lm_head = nn.Linear(32, 101, bias=False, dtype=torch.bfloat16)
    assert "its forward fails in a trial run" in why_not_compiled(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].mlp, "factor", 2.0),
        lambda model: model.set_attn_implementation("sdpa"),
        lambda model: setattr(model.config, "rope_parameters", {**model.config.rope_parameters, "factor": 2.0}),
        lambda model: nn.init.normal_(model.model.embed_tokens.weight),
        lambda model: setattr(
            model.model.layers[0].mlp, "__class__", type("MLP", (type(model.model.layers[0].mlp),), {})
        ),
    ],
)
def test_a_change_without_a_written_weight_is_proven_again(make_decoder, monkeypatch, change):
    from ace_triton.decoding import step as module

    model, trials = make_decoder("llama"), []
    compare = module._compare
    monkeypatch.setattr(module, "_compare", lambda *given: (trials.append(1), compare(*given)))
    assert why_not_compiled(model) is None
    assert why_not_compiled(model) is None
    assert len(trials) == 1
    change(model)
    assert why_not_compiled(model) is None
    assert len(trials) == 2


def test_a_class_whose_forward_was_replaced_is_refused(make_decoder, monkeypatch):
    model = make_decoder("llama")
    assert why_not_compiled(model) is None
    kind = type(model.model.layers[0].mlp)
    scaled = lambda self, x: 1.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731
    monkeypatch.setattr(kind, "forward", scaled)
    assert "in a trial run its logits differ by" in why_not_compiled(model)


def test_a_quantized_embedding_has_a_vocabulary(make_decoder):
    model = pruned(make_decoder("qwen2", tie_word_embeddings=True), "2:4", head_bits=4, group=32)
    check_room(model, [5, 100], 3, "give fewer")
    with pytest.raises(GenerationError, match="token id 101, the model's vocabulary ends at 100"):
        check_room(model, [5, 101], 3, "give fewer")


def test_a_step_with_inputs_of_few_bits_is_proven_with_exact_ones(make_decoder, text):
    model = pruned(make_decoder("llama"), "2:4", bits=8, head_bits=8, group=32)
    ace_triton.set_row_limits(model, ace_triton.RowLimits(packed=1))  # The model's own logits come from exact inputs.
    cpu_library.use_input_bits(8)
    try:
        rounded = distance(model, text)
        assert cpu_library.input_bits() == 8
    finally:
        cpu_library.use_input_bits(30)
    assert distance(model, text) < 1e-5 < TOLERANCES[torch.float32] < rounded


def test_hooks_of_all_modules_are_refused(make_decoder):
    model = make_decoder("llama")
    assert why_not_compiled(model) is None
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why_not_compiled(model) == "torch has hooks for all modules"
    finally:
        hook.remove()


def test_nan_is_refused_and_transformers_decodes(make_decoder):
    model = make_decoder("llama")
    model.model.norm.weight.data[3] = float("nan")
    assert why_not_compiled(model) == "in a trial run it predicts NaN or infinity"


def test_a_written_weight_is_used_and_proven_again(make_decoder, text, monkeypatch):
    from ace_triton.decoding import step as module

    model, trials, compare = make_decoder("llama"), [], module._compare
    monkeypatch.setattr(module, "_compare", lambda *given: (trials.append(1), compare(*given)))
    for expected in (1, 1, 2):
        if expected == 2:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(3)
        assert distance(model, text) < 2e-6
        assert len(trials) == expected


def test_a_full_cache_and_wrong_calls(make_decoder, text):
    model = make_decoder("llama")
    step = CompiledStep(model, 6)
    step.prompt(text[:, :5])
    step(text[0, 5:6])
    with pytest.raises(ArgumentError, match="cache is full: it has room for 6 tokens"):
        step(text[0, 6:7])
    with pytest.raises(GenerationError, match=r"must be \[n_texts, n_tokens\] with a token, got \[2, 0\]"):
        compiled_generate(model, text.view(2, 20)[:, :0])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"num_beams": 2}, "they ask for beam search, and it takes greedy decoding and sampling"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "they ask for contrastive search"),
        ({"dola_layers": "high"}, "they ask for dola generation"),
        ({"prompt_lookup_num_tokens": 3}, "they ask for assisted generation"),
        ({"use_cache": False}, "use_cache=False"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"position_ids": torch.tensor([[0, 1, 2, 50, 51]])}, "position_ids must count from 0"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "it takes padding on the left"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1]])}, "it takes padding on the left"),
        ({"past_key_values": DynamicCache()}, "past_key_values is given"),
        ({"assistant_model": object()}, "assistant_model is given"),
        ({"stop_strings": ["a"]}, "stop_strings need the model's tokenizer as the argument tokenizer"),
        ({"generation_config": GenerationConfig(stop_strings=["a"])}, "a generation config has stop_strings: give"),
        ({"token_healing": True}, "token_healing=True"),
    ],
)
def test_an_option_that_changes_the_algorithm_is_refused_by_name(make_decoder, text, option, reason):
    with pytest.raises(StepRefusedError, match=f"does not decode with these options: {reason}.*transformers decodes"):
        compiled_generate(make_decoder("llama"), text[:, :5], max_new_tokens=2, **option)


def test_stop_strings_stop_where_transformers_does(make_decoder, text, tokenizer):
    model, prompt = make_decoder("llama"), text[:, :5]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = model.generate(prompt, **options)
    options |= {"stop_strings": tokenizer.decode(whole[0, 8:9]), "tokenizer": tokenizer}
    stopped = compiled_generate(model, prompt, **options)
    assert stopped.shape[1] < whole.shape[1]
    assert torch.equal(stopped, model.generate(prompt, **options))
    earlier = compiled_generate(model, prompt, stopping_criteria=[lambda ids, _: ids[:, 0] >= 0], **options)
    assert torch.equal(earlier, whole[:, :6])


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 7}])
def test_a_batch_with_padding_gets_the_tokens_of_transformers(make_decoder, ids, sampling):
    model = pruned(make_decoder("qwen3"), "8:16")
    prompts, mask = ids[:4, :9].clone(), torch.ones(4, 9, dtype=torch.int64)
    for k, before in enumerate((0, 3, 8, 1)):
        prompts[k, :before], mask[k, :before] = 2, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 2, **sampling}

    def tokens(generate, **rest):
        torch.manual_seed(3)
        return generate(prompts, **options, **rest)

    compiled = lambda *given, **rest: compiled_generate(model, *given, **rest)  # noqa: E731
    endless = tokens(model.generate, eos_token_id=None)
    assert torch.equal(tokens(compiled, eos_token_id=None), endless)
    ended = tokens(model.generate, eos_token_id=endless[1, 12].item())
    assert (ended == 2).sum() > (prompts == 2).sum(), "one text ends before another"
    assert torch.equal(tokens(compiled, eos_token_id=endless[1, 12].item()), ended)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(tokens(compiled, eos_token_id=None, position_ids=positions), endless)


def test_positions_from_zero_are_no_option(make_decoder, text):
    model, options = make_decoder("llama"), {"max_new_tokens": 3, "do_sample": False}
    given = compiled_generate(model, text[:, :5], position_ids=torch.arange(5)[None], **options)
    assert torch.equal(given, model.generate(text[:, :5], **options))


def test_the_cache_grows_with_the_text_alone(make_decoder, text, monkeypatch):
    from ace_triton.decoding import step as module

    monkeypatch.setattr(module, "FIRST_CAPACITY", 5)
    model = make_decoder("qwen3")
    assert distance(model, text) < 2e-6
    options = {"max_new_tokens": 10**12, "do_sample": False, "eos_token_id": None}
    stop = [lambda tokens, scores: torch.tensor([tokens.shape[1] >= 30])]
    given = compiled_generate(model, text[:, :3], stopping_criteria=stop, **options)
    assert torch.equal(given, model.generate(text[:, :3], stopping_criteria=stop, **options))
    with pytest.raises(StepRefusedError, match="sliding window of 24 tokens is shorter than the 1000000000003"):
        compiled_generate(make_decoder("mistral", sliding_window=24), text[:, :3], **options)


def test_the_parts_name_every_weight(make_decoder):
    model = pruned(make_decoder("qwen3"), "2:4")
    parts = parts_of(model)
    held = {tensor.data_ptr() for tensor in parts.tensors}
    own = {name for name, tensor in model.state_dict().items() if tensor.data_ptr() not in held}
    assert own <= {"model.embed_tokens.weight"}
