"""A tensor without its own memory, or with too little for its shape, gets a one-line error before any kernel runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

from ace_triton.kernels import memory
from ace_triton.kernels.adamw import GradientMoments, Step, adamw
from ace_triton.kernels.assignment import assignment
from ace_triton.kernels.backend import choose_backend
from ace_triton.kernels.column_scale import ColumnScale, column_scale
from ace_triton.kernels.coupling import coupling
from ace_triton.kernels.divergence import divergence
from ace_triton.kernels.finite import all_finite
from ace_triton.kernels.gram_product import gram_product
from ace_triton.kernels.join_gains import join_gains
from ace_triton.kernels.moments import moments
from ace_triton.kernels.nm_linear import nm_linear
from ace_triton.kernels.pack_nm import PackedNM, pack_nm, pack_scored
from ace_triton.kernels.round_groups import round_groups
from ace_triton.kernels.score_terms import ScoreTerms
from ace_triton.kernels.select_nm import select_nm
from ace_triton.kernels.select_rows import select_rows
from ace_triton.kernels.token_norms import token_norms
from ace_triton.kernels.unpack_nm import unpack_nm
from ace_triton.kernels.variance_factor import variance_factor
from ace_triton.kernels.weight_sums import relative_importance, weight_sums
from ace_triton.kernels.weighted_squares import weighted_squares

Call = Callable[[torch.Tensor], object]


def packed_zeros() -> PackedNM:
    return pack_nm(torch.zeros(16, 16), 2, 4)


OPERATIONS: dict[str, Call] = {
    "select_nm": lambda x: select_nm(x, ScoreTerms(), 2, 4),
    "select_nm, mask": lambda x: select_nm(x, ScoreTerms(), 2, 4, output="mask"),
    "select_rows": lambda x: select_rows(x, ScoreTerms(), 8),
    "a score's coupling": lambda x: select_nm(torch.ones(16, 16), ScoreTerms(coupling=x), 2, 4, output="mask"),
    "pack_nm": lambda x: pack_nm(x, 2, 4),
    "pack_scored": lambda x: pack_scored(x, ScoreTerms(), 2, 4),
    "packed values": lambda x: unpack_nm(PackedNM(x, torch.zeros(16, 1, dtype=torch.int32), 2, 4, (16, 32))),
    "unpack_nm into": lambda x: unpack_nm(packed_zeros(), x),
    "nm_linear": lambda x: nm_linear(x, packed_zeros()),
    "nm_linear's bias": lambda x: nm_linear(torch.ones(1, 16), packed_zeros(), x[0]),
    "weight_sums": weight_sums,
    "relative_importance": relative_importance,
    "column_scale": lambda x: column_scale(ColumnScale(base=x[0])),
    "variance_factor": lambda x: variance_factor(x, "channel", 1.0, 0.01),
    "moments": moments,
    "token_norms": token_norms,
    "weighted_squares": lambda x: weighted_squares(torch.ones(16, 4), x[:2]),
    "coupling": lambda x: coupling(x, torch.ones(16, 4), torch.ones(16)),
    "gram_product": gram_product,
    "all_finite": all_finite,
    "join_gains": lambda x: join_gains(x[None], torch.ones(1, 16, 4)),
    "assignment": lambda x: assignment(x[None]),
    "divergence": lambda x: divergence(x, torch.ones(16, 16)),
    "divergence into": lambda x: divergence(torch.ones(16, 16), torch.ones(16, 16), into=x),
    "adamw": lambda x: adamw(x, GradientMoments(torch.zeros(16, 16), torch.zeros(16, 16)), x, Step(0.1, 1)),
    "round_groups": lambda x: round_groups(x, 8, 32, torch.float32),
    "round_groups into": lambda x: round_groups(torch.ones(16, 16), 8, 32, torch.float32, into=x),
}


def fake(values: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(values.shape)


def masked(values: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masked_tensor(values, torch.ones(values.shape, dtype=torch.bool))


def freed(values: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A weight as FSDP leaves it between forward passes: a view with an offset into freed memory."""
    whole = torch.cat([values.flatten(), values.flatten()])
    view = whole[values.numel() :].view(values.shape)
    view = view.t() if transposed else view
    whole.untyped_storage().resize_(0)
    return view


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("make", "message"),
    [(fake, "is a FakeTensor, which has no data"), (masked, "is a MaskedTensor, whose mask kernels do not support")],
)
def test_what_stands_for_other_tensors_is_refused(operation, make, message):
    with pytest.raises(ValueError, match=message):
        OPERATIONS[operation](make(torch.full((16, 16), 0.5)))


@pytest.mark.skipif(choose_backend(torch.ones(1)) == "reference", reason="torch's own operations read the tensor")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "operation", ["select_nm", "select_rows", "pack_nm", "weight_sums", "all_finite", "token_norms"]
)
def test_weights_whose_memory_was_given_back_are_refused(operation, transposed):
    with pytest.raises(ValueError, match="has no memory"):
        OPERATIONS[operation](freed(torch.full((16, 16), 0.5), transposed))


def test_a_distributed_tensor_is_refused_with_what_to_do():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.ones(16, 16), init_device_mesh("cpu", (1,)), [Replicate()])
        for operation in ("select_nm", "weight_sums", "moments", "all_finite", "pack_nm"):
            with pytest.raises(ValueError, match=r"is a DTensor, .*gather it first, with tensor.full_tensor\(\)"):
                OPERATIONS[operation](weight)
    finally:
        dist.destroy_process_group()


def test_a_call_inside_of_a_transform_or_a_fake_mode_is_refused():
    with pytest.raises(ValueError, match="is wrapped by a transform"):
        torch.vmap(lambda row: token_norms(row[None]))(torch.ones(3, 4))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="FakeTensor"):
        token_norms(torch.ones(3, 4))


def numbers(result: object) -> object:
    """All results of an operation, as plain lists."""
    if isinstance(result, torch.Tensor):
        return result.tolist()
    if isinstance(result, ScoreTerms):
        return {name: numbers(tensor) for name, tensor in result.tensors.items()}
    if dataclasses.is_dataclass(result):
        return {field.name: numbers(getattr(result, field.name)) for field in dataclasses.fields(result)}
    return [numbers(part) for part in result] if isinstance(result, tuple) else result


class Labelled(torch.Tensor):
    """A tensor subclass with memory of its own, as many libraries define."""


@pytest.mark.parametrize(
    "operation", ["select_nm", "moments", "weight_sums", "token_norms", "gram_product", "all_finite"]
)
def test_subclasses_with_memory_are_served(operation):
    plain = torch.arange(256, dtype=torch.float32).reshape(16, 16)
    labelled = plain.clone().as_subclass(Labelled)
    assert numbers(OPERATIONS[operation](labelled)) == numbers(OPERATIONS[operation](plain))


def negated(values: torch.Tensor) -> torch.Tensor:
    """The same numbers as a lazily negated view: memory holds the opposite sign."""
    view = torch._neg_view(-values)
    assert view.is_neg()
    return view


TAKEN_AS_THEY_LIE = {
    "a score's coupling",
    "packed values",
    "unpack_nm into",
    "column_scale",
    "join_gains",
    "assignment",
    "adamw",
    "round_groups",
    "round_groups into",
}
"""Operations that pass tensors to the compiled library without a copy."""


@pytest.mark.parametrize("operation", OPERATIONS)
def test_views_that_negate_give_their_own_numbers_or_are_refused(operation):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(16, 16, generator=generator) + 0.1
    if operation == "pack_nm":
        values = values * torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(4)
    expected, got = values.clone(), negated(values)
    if choose_backend(expected) == "triton" or operation in TAKEN_AS_THEY_LIE:
        with pytest.raises(ValueError, match="resolve_neg"):
            OPERATIONS[operation](got)
        return
    assert numbers(OPERATIONS[operation](got)) == numbers(OPERATIONS[operation](expected))
    assert torch.equal(got, expected)


def test_weights_that_overlap_in_memory_are_not_written():
    if choose_backend(torch.ones(1)) != "cpu":
        pytest.skip("the compiled library's own check")
    for weight in (torch.ones(1, 16).expand(16, 16), torch.ones(300).as_strided((16, 16), (8, 1))):
        with pytest.raises(ValueError, match="without overlapping elements"):
            select_nm(weight, ScoreTerms(), 2, 4)
    interleaved = torch.arange(256.0).as_strided((16, 16), (1, 16))
    assert select_nm(interleaved, ScoreTerms(), 2, 4) is interleaved
    assert int((interleaved != 0).sum()) == 128


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), r"must be contiguous torch.float32 \(3, 4\); got torch.float64"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(12, dtype=torch.float32), r"got torch.float32 \(12,\)"),
        (torch.zeros(4, 3, dtype=torch.float32).t(), r"strides \(1, 3\)"),
        (torch.zeros(3, 4, dtype=torch.float32, device="meta"), "meta device"),
        (torch.zeros(3, 4, dtype=torch.float32).to_sparse(), "is sparse"),
        (torch._neg_view(torch.zeros(3, 4, dtype=torch.float32)), "resolve_neg"),
    ],
)
def test_the_door_takes_one_dtype_shape_and_layout(tensor, message):
    with pytest.raises(ValueError, match=f"the vector .*{message}"):
        memory.address(tensor, torch.float32, (3, 4), "the vector")
    sound = torch.zeros(3, 4, dtype=torch.float32)
    assert memory.address(sound, torch.float32, (3, 4), "the vector") == sound.data_ptr()


def test_a_view_must_lie_inside_of_its_memory():
    whole = torch.zeros(100, dtype=torch.float32)
    views = {"address": whole[20:80], "matrix": whole[20:80].view(6, 10), "sequences": whole[20:80].view(2, 3, 10)}
    takes = {
        "address": lambda view: memory.address(view, torch.float32, view.shape, "it"),
        "matrix": lambda view: memory.matrix(view, "it"),
        "sequences": lambda view: memory.sequences(view, "it"),
    }
    for name, take in takes.items():
        take(views[name])
    whole.untyped_storage().resize_(79 * 4)
    for name, take in takes.items():
        with pytest.raises(ValueError, match="has no memory"):
            take(views[name])
