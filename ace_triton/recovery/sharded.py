"""Recovery with the blocks' weights spread over processes: each holds a share of them and of the optimizer's state.

torch's FSDP2 (``torch.distributed.fsdp.fully_shard``) gathers the weights of a block before it runs, and frees them
after it. The gradients are added up in fp32, and each process gets those of its share. A share is a range of rows of
each weight. Embeddings and heads are whole in every process, because they are not trained.

The learning rates, the clipping and the update are those of :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`, so the
weights agree with those of whole models to rounding. The saved state has the same form too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..decoders.batches import trial_ids
from ..decoders.blocks import Block, find_blocks
from ..decoders.calibration_mode import calibration_mode
from ..decoders.loaded_weights import weights_as_loaded
from ..errors import ArgumentError, RecoveryError
from ..kernels.adamw import GradientMoments
from ..processes import Processes
from ..solvers.kept_adamw import KeptAdamW, Rounding, check_state, scale_of
from .stored import as_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ("values", "first", "second")


class ShardedAdamW(KeptAdamW):
    """AdamW on this process's share of sharded parameters.

    Args:
        parameters: parameters that FSDP2 has sharded, by name, in the dtype of forwards.
        values: this process's share of each in fp32; the parameter's own memory if that is in fp32.
        scales: scale of each whole parameter.
        processes: the processes that hold the other shares. They must make the same calls.
        roundings: as for :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`; each rounds any range of rows.
        dense: names of matrices whose entries of 0 are trained too.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        values: Mapping[str, torch.Tensor],
        scales: Mapping[str, float],
        processes: Processes,
        roundings: Mapping[str, Rounding],
        dense: Collection[str] = (),
    ) -> None:
        self._dense = frozenset(dense)
        self._parameters, self._processes, self._roundings = parameters, processes, roundings
        self._scales, self.values = dict(scales), dict(values)
        self._moments = {name: GradientMoments.like(value) for name, value in self.values.items()}
        self._steps = dict.fromkeys(parameters, 0)
        self._saved: dict[str, Any] = {}

    @torch.no_grad()
    def collect(self) -> None:
        """As in :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`. The first process gets 12 bytes for each weight."""
        self._saved = {part: {} for part in _PARTS} | {"taken": self._steps}
        for name in self.values:
            for part in _PARTS:
                whole = self.whole(name, part)
                if self._processes.is_first:
                    self._saved[part][name] = whole.cpu()

    def state_dict(self) -> dict[str, Any]:
        """As in :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`; what :meth:`collect` has gathered, once."""
        saved, self._saved = self._saved, {}
        return saved

    def load_state_dict(self, state: Any) -> None:
        """As in :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`, until :meth:`take_from_first` spreads the state."""
        check_state(state, {name: parameter.shape for name, parameter in self._sharded()})
        self._saved = state

    @torch.no_grad()
    def take_from_first(self) -> None:
        """As in :class:`~ace_triton.solvers.kept_adamw.KeptAdamW`; each process takes its share."""
        wrong = None
        for name, parameter in self._sharded():
            own = self._tensors(name)
            for part in _PARTS:
                whole = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                if self._processes.is_first:
                    whole.copy_(self._saved[part][name])
                self._processes.broadcast_into(whole, 0)
                share = share_of_rows(whole, self._processes)
                if part == "values" and (why := self._why_not_zeros(name, own[part], share)) is not None:
                    wrong = why
                own[part].copy_(share)
            self._held(name).copy_(self.rounded(name))
        self._steps = self._processes.broadcast(self._saved.get("taken", self._steps))
        self._saved = {}
        if (found := next(filter(None, self._processes.gather(wrong)), None)) is not None:
            raise RecoveryError(f"the state of a recovery is damaged ({found}); remove it")

    def whole(self, name: str, part: str = "values") -> torch.Tensor:
        """A whole parameter or moment, gathered from all processes. All of them call this."""
        parameter = dict(self._sharded())[name]
        shape, stride = parameter.shape, parameter.stride()
        share = self._tensors(name)[part]
        mesh = parameter.device_mesh
        return DTensor.from_local(share, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride).full_tensor()

    def whole_rounded(self, name: str) -> torch.Tensor:
        """A whole parameter for forwards, fp32. All processes call this."""
        rounding, whole = self._roundings.get(name), self.whole(name)
        return whole if rounding is None else rounding(whole)

    def _sharded(self) -> Iterator[tuple[str, DTensor]]:
        for name, parameter in self._parameters.items():
            assert isinstance(parameter, DTensor)
            yield name, parameter

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        moments = self._moments[name]
        return {"values": self.values[name], "first": moments.first, "second": moments.second}

    def _held(self, name: str) -> torch.Tensor:
        return dict(self._sharded())[name].to_local().detach()

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This process's shares of the gradients, which FSDP2 has added up."""
        given = ((name, parameter.grad) for name, parameter in self._sharded())
        return {name: grad.to_local().contiguous() for name, grad in given if isinstance(grad, DTensor)}

    def _norm(self, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        total = nn.utils.get_total_norm(gradients).float().square().reshape(1)
        self._processes.add_up(total)
        return total.sqrt()


@contextmanager
def sharded(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    names: Sequence[str],
    dtype: torch.dtype,
    processes: Processes,
    device: torch.device,
    roundings: Mapping[str, Rounding],
    dense: Collection[str] = (),
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, ShardedAdamW]]:
    """Sharded copies of two models, and the optimizer of the parameters to train.

    If the block ends without an error, the first process's model gets the trained parameters. In the other processes
    these parameters are on the meta device then. The teacher does not change.

    Args:
        model, teacher: on the CPU; their blocks' weights are only read, so the maps of their files take no memory.
        names: names of the model's parameters to train.
        dtype: dtype of forwards.
        processes: the processes that hold the other shares.
        device: where this process holds its share.
        roundings: how parameters are rounded for forwards, by name.
        dense: names of matrices whose entries of 0 are trained too.

    Raises:
        RecoveryError: if a model is not on the CPU, there is only one process, or the model cannot be sharded.
    """
    _check(model, teacher, processes)
    with _own_scaling_refused(model), calibration_mode(model):
        model(input_ids=trial_ids(model), use_cache=False)
    mesh = init_device_mesh(device.type, (processes.size,))
    student, target = (_copy(decoder) for decoder in (model, teacher))
    for block in find_blocks(model):  # One after the other, so that only one is converted as a whole.
        for name in (name for name in names if name.startswith(f"{block.name}.")):
            own = model.get_parameter(name).detach()
            if (rounding := roundings.get(name)) is not None:
                own = rounding(own.float())
            own = own.to(dtype)
            _replace_one(student, name, nn.Parameter(own, requires_grad=True))
        _shard(student.get_submodule(block.name), mesh)
    for block in find_blocks(teacher):
        _shard(target.get_submodule(block.name), mesh)
    for decoder in (student, target):
        _move_rest(decoder, device)
    trained = {name: student.get_parameter(name) for name in names}
    values, scales = {}, {}
    for name, parameter in trained.items():
        whole = model.get_parameter(name).detach().float()
        scales[name] = scale_of(whole)
        assert isinstance(parameter, DTensor)
        share = share_of_rows(whole, processes)
        one_tensor = dtype == torch.float32 and name not in roundings
        values[name] = parameter.to_local().detach() if one_tensor else share.to(device, copy=True)
    optimizer = ShardedAdamW(trained, values, processes.broadcast(scales), processes, roundings, dense)
    yield student, target, optimizer
    for name in names:
        parameter, whole = model.get_parameter(name), optimizer.whole_rounded(name)
        if processes.is_first:
            parameter.data = as_stored(name, whole.to("cpu"), parameter.dtype)
        else:
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            _replace_one(model, name, nn.Parameter(meta, requires_grad=parameter.requires_grad))


def _check(model: PreTrainedModel, teacher: PreTrainedModel, processes: Processes) -> None:
    if processes.size == 1:
        raise RecoveryError("to shard a recovery takes several processes: torchrun --nproc-per-node 2 (or more)")
    if any(decoder.device.type != "cpu" for decoder in (model, teacher)):
        raise RecoveryError("to shard a recovery, load both models on the CPU: the shares are copied to the device")
    for decoder in (model, teacher):
        owners: dict[nn.Parameter, Block] = {}
        for block in find_blocks(decoder):
            for parameter in block.module.parameters():
                if owners.setdefault(parameter, block) is not block:
                    raise RecoveryError(
                        f"{owners[parameter].name} and {block.name} share a weight, which cannot be sharded: recover "
                        "without --shard"
                    )


@contextmanager
def _own_scaling_refused(model: nn.Module) -> Iterator[None]:
    try:
        with weights_as_loaded(model, restorable=False):
            yield
    except ArgumentError as error:
        raise RecoveryError(
            f"a {type(model).__name__} changes its own weights, and cannot be sharded: recover without --shard"
        ) from error


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules with the same parameters and buffers, in evaluation mode and without gradients."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    copied: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    _replace(copied, lambda tensor: tensor)
    return copied.eval()


def _replace_one(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._parameters[key] = parameter


def _replace(model: nn.Module, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace all parameters that are not sharded by new ones without gradients; tied ones stay tied."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, old in module._parameters.items():
            if old is not None and not isinstance(old, DTensor):
                if old not in new:
                    new[old] = nn.Parameter(changed(old.data), requires_grad=False)
                module._parameters[key] = new[old]


def share_of_rows(whole: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The rows of a parameter that FSDP2 gives this process."""
    shares = whole.chunk(processes.size)
    return shares[processes.rank] if processes.rank < len(shares) else whole[:0]


def _shard(block: nn.Module, mesh: Any) -> None:
    """Spread a block's weights over the processes; their gradients are added up in fp32, not averaged."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    module: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_reduce_scatter_unused_params(True)


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Move what is not sharded to the device; the model that it is shared with keeps its own."""
    _replace(model, lambda tensor: tensor.to(device))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
