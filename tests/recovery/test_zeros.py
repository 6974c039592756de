"""Training loops that know nothing of zeros keep them with keep_zeros and MaskCallback."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import ace_triton
from ace_triton import ArgumentError, keep_zeros
from ace_triton.recovery.zeros import pruned_zeros


@pytest.fixture
def model(make_decoder):
    model = make_decoder("llama")
    ace_triton.prune_model(model, None, "magnitude", "2:4")
    return model


def zeros_of(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}


def assert_kept(model, zeros, before):
    """All zeros are there, the other weights moved, and every weight has its pattern."""
    assert len(zeros) == 21
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert torch.equal(parameter.detach() == 0, zeros[name])
            assert not torch.equal(parameter.detach(), before[name])


def step(model, ids, optimizer, backward=torch.Tensor.backward):
    backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_loop_of_ones_own(model, ids, optimizer):
    zeros, before = zeros_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    kept = keep_zeros(model, optimizer)
    assert set(kept.names) == set(zeros)
    for _ in range(2):
        step(model, ids, optimizer)
        assert_kept(model, zeros, before)
    kept.remove()
    step(model, ids, optimizer)
    assert all(not torch.equal(model.get_parameter(name) == 0, mask) for name, mask in zeros.items())
    kept.apply()
    assert_kept(model, zeros, before)


def test_a_loop_of_accelerate(model, ids):
    zeros, before = zeros_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    keep_zeros(prepared, optimizer)
    for _ in range(2):
        with accelerator.accumulate(prepared):
            step(prepared, ids, optimizer, accelerator.backward)
    assert_kept(model, zeros, before)


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def test_a_trainer(model, ids, tmp_path):
    zeros, before = zeros_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = arguments(tmp_path, save_steps=2, save_only_model=True, logging_strategy="no")
    Trainer(model, options, train_dataset=rows, callbacks=[ace_triton.MaskCallback()]).train()
    assert_kept(model, zeros, before)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert_kept(saved, zeros, before)
    ace_triton.pack_model(model)


def test_without_it_the_zeros_are_lost(model, ids, tmp_path):
    zeros = zeros_of(model)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=rows).train()
    assert all(not bool((model.get_parameter(name)[mask] == 0).any()) for name, mask in zeros.items())


def test_a_model_without_trained_zeros_is_an_error(make_decoder, model, ids, tmp_path):
    dense = make_decoder("llama")
    with pytest.raises(ArgumentError, match="no weight that is trained has 5% zeros or more: prune the model first"):
        keep_zeros(dense, torch.optim.SGD(dense.parameters()))
    with pytest.raises(ArgumentError, match="no weight that is trained"):
        keep_zeros(model, torch.optim.SGD([model.model.norm.weight]))
    with pytest.raises(ArgumentError, match=r"a NoneType is not a torch\.optim\.Optimizer"):
        keep_zeros(model, None)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(dense, arguments(tmp_path), train_dataset=rows, callbacks=[ace_triton.MaskCallback])
    with pytest.raises(ArgumentError, match="no weight that is trained"):
        trainer.train()


def test_which_weights_are_pruned():
    half = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert torch.equal(pruned_zeros(half), half == 0)
    for other in (torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([0.0, 1.0]), torch.empty(0, 2)):
        assert pruned_zeros(other) is None


def test_the_zeros_follow_the_model_in_dtype(model, ids):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    zeros = zeros_of(model)
    keep_zeros(model, optimizer)
    model.to(torch.bfloat16)
    step(model, ids, optimizer)
    assert all(bool((model.get_parameter(name)[mask] == 0).all()) for name, mask in zeros.items())


def test_the_package_names_the_callback_and_nothing_else():
    assert ace_triton.MaskCallback.__name__ == "MaskCallback"
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        ace_triton.nosuch  # noqa: B018
