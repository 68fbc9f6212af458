"""The DeepSpeed engine: building it, one optimizer step, and the slices of its state that a checkpoint holds.

Every stage of ZeRO shows the same face here. A *slice* of a trainable parameter is elements [r*q, (r+1)*q) of its
flattened fp32 master, with q = ceil(numel / world) and r this rank, cut at numel; that is what ZeRO-3 keeps on the rank
anyway, and what torch.distributed.checkpoint calls an evenly sharded one-dimensional DTensor.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.engine.dist import World
from nvlm_train.engine.optim import full_shape

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Engine:
    """A built engine and what this package needs to know about it."""

    deepspeed: Any  # deepspeed.DeepSpeedEngine
    stage: int
    world: World

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def optimizer(self) -> Any:
        """The object whose param_groups hold the learning rates."""
        return self.deepspeed.optimizer

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, each once (tied heads share one)."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)


def partitioned_at_birth(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Context in which a model is built: under ZeRO-3 every parameter is partitioned as its module is made.

    Its type is the configuration's. (Given a `dtype`, zero.Init of 0.19.8 takes bf16 instead on every machine without
    fp16 arithmetic, such as AMD's CPUs, and fp32 training stops with mixed types.) RoPE frequencies are computed from
    the configuration in fp32 by the model, so nothing here makes them bf16.
    """
    if config["zero_optimization"]["stage"] != 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=config)


def write_slice(
    world: World,
) -> tuple[Callable[[nn.Parameter], tuple[int, int] | None], Callable[[nn.Parameter, Tensor], None]]:
    """`slice_of` and `write` for `model.pretrained.fill`: each rank reads and writes only what it keeps."""

    def slice_of(parameter: nn.Parameter) -> tuple[int, int] | None:
        if not hasattr(parameter, "ds_tensor"):
            return None
        size = parameter.ds_tensor.numel()
        total = full_shape(parameter).numel()
        return min(world.rank * size, total), min((world.rank + 1) * size, total)

    def write(parameter: nn.Parameter, values: Tensor) -> None:
        with torch.no_grad():
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor[: values.numel()].copy_(values)
                parameter.ds_tensor[values.numel() :].zero_()  # padding of the last rank
            else:
                parameter.copy_(values.view_as(parameter))

    return slice_of, write


def build(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World) -> Engine:
    """Hands model and optimizer to DeepSpeed."""
    import deepspeed

    # The config is copied because DeepSpeed writes into the mapping it is given; stdout is kept clean because its bf16
    # optimizer prints memory figures there, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
        )
    return Engine(engine, config["zero_optimization"]["stage"], world)


def backward(engine: Engine, loss_sum: Tensor, trained_tokens: int) -> None:
    """Back-propagates this micro-step's share of the mean over the trained tokens of the whole step.

    loss_sum: fp32 scalar, sum of cross-entropy on this rank and micro-step.
    trained_tokens: of all ranks and micro-steps of the step. DeepSpeed averages gradients over ranks, hence the factor.
    """
    loss = loss_sum * (engine.world.world_size / max(trained_tokens, 1))
    engine.deepspeed.backward(loss, scale_wrt_gas=False)


def forward(engine: Engine, *args: Any, last: bool) -> Tensor:
    """Runs the model; `last` says whether this is the step's last micro-step (DeepSpeed wants to know before)."""
    engine.deepspeed.set_gradient_accumulation_boundary(last)
    return engine.deepspeed(*args)


def step(engine: Engine) -> float:
    """Applies the optimizer step; returns the global gradient norm before clipping, NaN or inf where it was skipped."""
    norm = None
    if engine.stage == 0:  # plain data parallel: gradients are whole and already summed, and nobody keeps their norm
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in engine.trainable() if p.grad is not None])
    engine.deepspeed.step()
    if getattr(engine.optimizer, "overflow", False):
        return float("nan")
    return float(engine.deepspeed.get_global_grad_norm() if norm is None else norm)


# ------------------------------------------------------------------------------------------------- slices of the state


def slice_bounds(numel: int, world: World) -> tuple[int, int]:
    """Where this rank's slice of `numel` elements begins and ends. Example, 5 on 2 ranks: (0, 3), (3, 5)."""
    size = -(-numel // world.world_size)
    return min(world.rank * size, numel), min((world.rank + 1) * size, numel)


def read_slices(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """This rank's slices of fp32 master and Adam moments of every trainable parameter: {name: {STATE_KEYS: f32[n]}}.

    Under ZeRO 1 and 2 every rank must call it (their fragments are cut elsewhere, so each parameter is summed once).
    """
    _prepare_optimizer_state(engine)
    return {
        name: {key: _read_slice(engine, parameter, key) for key in STATE_KEYS} for name, parameter in engine.trainable()
    }


def write_slices(engine: Engine, read: Callable[[str, str, int, int], Tensor], adam_step: int) -> None:
    """Puts a saved state into a fresh engine.

    read(name, key, begin, end): f32[end - begin] of the flattened tensor; asked only for what this rank keeps.
    adam_step: AdamW's step count, the same for all parameters.
    """
    _prepare_optimizer_state(engine)
    for flat in _flat_masters(engine):  # a tensor each: one shared by all groups would be counted once per group
        state = engine.deepspeed.basic_optimizer.state[flat]
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32, device=state["step"].device)
    for name, parameter in engine.trainable():
        for key in STATE_KEYS:
            _write_slice(engine, name, parameter, key, read)
    _refresh_model_weights(engine)


def _flat_masters(engine: Engine) -> list[Tensor]:
    """The fp32 tensors that AdamW really steps; its param_groups name those of ZeRO-3 only while it steps."""
    if engine.stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in engine.deepspeed.basic_optimizer.param_groups for flat in group["params"]]


def _prepare_optimizer_state(engine: Engine) -> None:
    """torch's AdamW makes its state in the first step; a state to read or fill must exist before."""
    base = engine.deepspeed.basic_optimizer
    fused = base.param_groups[0].get("fused")
    for flat in _flat_masters(engine):
        state = base.state[flat]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(flat, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(flat, dtype=torch.float32)
    if engine.stage in (1, 2):
        # DeepSpeed links parameters to their moments once, in the first step, when only the first group has any
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _read_slice(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
    )

    begin, end = slice_bounds(full_shape(parameter).numel(), engine.world)
    if engine.stage == 3:
        local = (
            safe_get_local_fp32_param(parameter) if key == "master" else safe_get_local_optimizer_state(parameter, key)
        )
        return local.detach()[: end - begin].to("cpu", copy=True)
    if engine.stage == 0:
        full = parameter if key == "master" else engine.deepspeed.basic_optimizer.state[parameter][key]
    else:
        full = safe_get_full_fp32_param(parameter) if key == "master" else safe_get_full_optimizer_state(parameter, key)
    return full.detach().flatten()[begin:end].to("cpu", torch.float32, copy=True)


def _write_slice(
    engine: Engine, name: str, parameter: Any, key: str, read: Callable[[str, str, int, int], Tensor]
) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    numel = full_shape(parameter).numel()
    if engine.stage == 3:
        begin, end = slice_bounds(numel, engine.world)
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)
        padded[: end - begin] = read(name, key, begin, end)
        if key == "master":
            safe_set_local_fp32_param(parameter, padded)
            with torch.no_grad():  # DeepSpeed sets the master alone; the weights in use would stay the old ones
                parameter.ds_tensor.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, key)
    elif engine.stage == 0:
        target = parameter if key == "master" else engine.deepspeed.basic_optimizer.state[parameter][key]
        with torch.no_grad():
            target.copy_(read(name, key, 0, numel).view_as(target))
    elif parameter._hp_mapping is not None:
        address = parameter._hp_mapping.lp_fragment_address
        fragment = parameter._hp_mapping.get_hp_fragment(None if key == "master" else key)
        fragment.data.copy_(read(name, key, address.start, address.start + address.numel))


def _refresh_model_weights(engine: Engine) -> None:
    """Makes the weights in use those of the masters, where more than this rank's slice is kept in use."""
    if engine.stage == 3:
        persistent = engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)
    elif engine.stage in (1, 2):
        engine.optimizer.update_lp_params()
