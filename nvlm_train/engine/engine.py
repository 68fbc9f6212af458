"""The DeepSpeed engine: building it, one optimizer step, and the slices of its state that a checkpoint holds.

Every stage of ZeRO shows the same face here. A *slice* of a trainable parameter is elements [r*q, (r+1)*q) of its
flattened fp32 master, with q = ceil(numel / world) and r this rank, cut at numel; that is what ZeRO-3 keeps on the rank
anyway, and what torch.distributed.checkpoint calls an evenly sharded one-dimensional DTensor.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.engine.dist import World, gather
from nvlm_train.engine.module_calls import ModuleCalls
from nvlm_train.engine.optim import full_shape
from nvlm_train.errors import NvlmError

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
HPZ_CHECKED_STEPS = 2  # the first as it was built, the second after an optimizer step
HPZ_TOLERANCE = 1e-6  # of the loss; on a CPU both are equal bit for bit


@dataclass
class Engine:
    """A built engine and what this package needs to know about it."""

    deepspeed: Any  # deepspeed.DeepSpeedEngine
    stage: int
    world: World
    calls: ModuleCalls | None = None  # of `debug.collectives`
    hpz_checks: int = 0  # steps whose first loss is still to be compared with hpZ off
    mark: Tensor | None = None  # what one parameter's gradient is multiplied by in backward, see `backward`

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


@contextmanager
def partitioned_at_birth(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context in which a model is built, without values: `model.pretrained.fill` gives every parameter its own.

    Under ZeRO-3 each parameter is partitioned as its module is made; else it is made whole on `device` in `dtype`.
    RoPE frequencies are computed from the configuration in fp32 by the model, so nothing here makes them bf16.
    """
    with _no_initial_values(), _named_to_deepspeed(device), _freed_at_once():
        if config["zero_optimization"]["stage"] == 3:
            import deepspeed

            # The type is the configuration's: given a `dtype`, zero.Init of 0.19.8 takes bf16 instead on every machine
            # without fp16 arithmetic, such as AMD's CPUs, and training in fp32 stops with mixed types.
            with deepspeed.zero.Init(config_dict_or_path=config):
                yield
        else:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                with torch.device(device):
                    yield
            finally:
                torch.set_default_dtype(before)


@contextmanager
def _named_to_deepspeed(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes GPU number LOCAL_RANK, also where the launcher shows a rank its own GPU alone, as number 0."""
    kept = os.environ.get("LOCAL_RANK")
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["LOCAL_RANK"] = kept


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """zero.Init makes each parameter whole, keeps a slice of it and frees the rest. glibc takes such memory from its
    heap once it has seen a few frees, where the slices keep the holes between them from going back: a rank then holds
    more than the whole model (measured: 107 MB of 88 MB; so 57 MB, a share of 44 MB and the largest tensor). Here every
    tensor gets pages of its own, which are given back; afterwards the limits are the largest that glibc itself takes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # another libc has no such thing
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 * 1024 * 1024)
        mallopt(trim_threshold, 64 * 1024 * 1024)


@contextmanager
def _no_initial_values() -> Iterator[None]:
    """torch's modules draw random weights when they are made; of 79 B parameters that takes long and touches all of the
    memory of a parameter where a rank keeps a slice."""
    names = ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_")
    kept = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


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


def build(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    world: World,
    compare_calls_s: float | None = None,
) -> Engine:
    """Hands model and optimizer to DeepSpeed.

    compare_calls_s: ranks compare each module call, and wait so many seconds for each other; None: they do not.
    """
    import deepspeed
    from deepspeed.utils import logger

    _forget_second_copies(model)
    logger.addFilter(_is_news)
    # The config is copied because DeepSpeed writes into the mapping it is given; stdout is kept clean because its bf16
    # optimizer prints memory figures there, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()), _named_to_deepspeed(world.device):
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
        )
    calls = None
    if compare_calls_s is not None and world.world_size > 1:
        calls = ModuleCalls(engine.module, world, compare_calls_s)
    zero = config["zero_optimization"]
    hpz = zero.get("zero_hpz_partition_size", 1) > 1
    built = Engine(engine, zero["stage"], world, calls, HPZ_CHECKED_STEPS if hpz else 0)
    _, marked = min(built.trainable(), key=lambda item: full_shape(item[1]).numel())
    marked.register_hook(lambda gradient: gradient if built.mark is None else gradient * built.mark)
    return built


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed tells every step that it leaves out; so do we, with the step's number and samples."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def backward(engine: Engine, loss_sum: Tensor, trained_tokens: int, *, mark_broken: bool = True) -> None:
    """Back-propagates this micro-step's share of the mean over the trained tokens of the whole step.

    loss_sum: fp32 scalar, sum of cross-entropy on this rank and micro-step.
    trained_tokens: of all ranks and micro-steps of the step. DeepSpeed averages gradients over ranks, hence the factor.
    mark_broken: a loss that is not finite makes one parameter's gradient NaN, even where nothing of the loss reaches a
    trained weight, so that `step` leaves the step out on every rank, without a word between them and without waiting
    for the device.
    """
    loss = loss_sum * (engine.world.world_size / max(trained_tokens, 1))
    # times 1.0 changes no bit; 0 times NaN is NaN
    engine.mark = torch.where(loss_sum.detach().isfinite(), 1.0, torch.nan) if mark_broken else None
    engine.deepspeed.backward(loss, scale_wrt_gas=False)


def forward(engine: Engine, *args: Any, last: bool) -> Tensor:
    """Runs the model; `last` says whether this is the step's last micro-step (DeepSpeed wants to know before)."""
    if engine.hpz_checks:
        _compare_with_hpz_off(engine, args)
    engine.deepspeed.set_gradient_accumulation_boundary(last)
    loss: Tensor = engine.deepspeed(*args)
    if engine.calls is not None:
        engine.calls.compare("end of", "forward")
    return loss


def step(engine: Engine) -> float:
    """Applies the optimizer step; returns the global gradient norm before clipping.

    Where it is not finite, on every rank alike, the step is left out: no weight, no moment and no step count of AdamW
    changes, and the gradients are gone. DeepSpeed does that by itself in stages 1 to 3, silently, and tells neither
    the norm nor whether it was NaN or infinite: NaN stands for both.
    """
    return _update(engine)


def backward_and_discard(engine: Engine, loss_sum: Tensor) -> None:
    """Back-propagates a loss as the last of a step and throws the gradient away, as if neither had been asked for.

    It is made to be a step that is not finite, which leaves no trace.
    """
    backward(engine, loss_sum * torch.nan, 1)
    _update(engine)


def _update(engine: Engine) -> float:
    if engine.stage == 0:  # plain data parallel: gradients are whole and already summed, and nobody looks at them
        norm = float(torch.nn.utils.get_total_norm([p.grad for _, p in engine.trainable() if p.grad is not None]))
        if not math.isfinite(norm):
            engine.deepspeed.zero_grad()
            return float("nan")
        engine.deepspeed.step()
        return norm
    engine.deepspeed.step()
    engine.hpz_checks = max(0, engine.hpz_checks - 1)
    return float("nan") if engine.optimizer.overflow else float(engine.deepspeed.get_global_grad_norm())


def allocate_optimizer_state(engine: Engine) -> None:
    """Makes AdamW's moments now, all zero, instead of in the first step; that step comes out the same."""
    _prepare_optimizer_state(engine)


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes on the device that weights, gradients and optimizer take on this rank just now."""

    def size(tensors: Iterable[Any]) -> int:
        tensors = [t for t in tensors if isinstance(t, Tensor) and t.device.type == engine.world.device.type]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    base, optimizer = engine.deepspeed.basic_optimizer, engine.optimizer
    parameters = list(engine.module.parameters())
    averaged = getattr(optimizer, "averaged_gradients", None) or {}
    gradients = [p.grad for p in parameters] + [g for group in averaged.values() for g in group or ()]
    gradients += getattr(optimizer, "fp32_groups_gradients_flat", ())  # stage 1 in bf16
    masters = _flat_masters(engine) if engine.stage else []
    return {
        "weights": size([*(getattr(p, "ds_tensor", p) for p in parameters)]),
        "gradients": size([*gradients, getattr(optimizer, "grad_partitions_flat_buffer", None)]),
        "optimizer": size([*masters, *(t for state in base.state.values() for t in state.values())]),
    }


def largest_gradients(engine: Engine) -> dict[str, float]:
    """Largest absolute gradient of each trainable parameter, NaN where one is; call it between backward and step.

    Over all ranks in stages 0 to 2 (every rank must call it), over this rank's part in stage 3.
    """
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    read = safe_get_local_grad if engine.stage == 3 else safe_get_full_grad
    found = {}
    for name, parameter in engine.trainable():
        gradient = parameter.grad if engine.stage == 0 else read(parameter)
        found[name] = float(gradient.abs().max()) if gradient is not None and gradient.numel() else 0.0
    return found


# --------------------------------------------------------------------------------------------------------------- hpZ


def _forget_second_copies(model: nn.Module) -> None:
    """hpZ's second copies are cut when a parameter is released after a use. What was written into the first ones since
    then is not in them: weights that were just loaded would not be used until the first optimizer step."""
    parameters: list[Any] = list(model.parameters())
    for parameter in parameters:
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


@torch.no_grad()
def _compare_with_hpz_off(engine: Engine, args: tuple[Any, ...]) -> None:
    """The loss of a step's first micro-step three times: as it is, from the first partitions (that is hpZ off), and
    from the second copies that this use has cut. Raises NvlmError on every rank where they differ on any."""
    losses = []
    engine.deepspeed.eval()
    try:
        for forget in (False, True, False):
            if forget:
                _forget_second_copies(engine.module)
            losses.append(float(engine.deepspeed(*args)))
    finally:
        engine.deepspeed.train()
    for rank, (as_is, off, on) in enumerate(gather(engine.world, losses)):
        if not all(abs(loss - off) <= HPZ_TOLERANCE * abs(off) for loss in (as_is, on)):
            raise NvlmError(
                f"zero.experimental.hpz_partition_size: rank {rank}'s loss is {as_is:.9g}, then {on:.9g}, with hpZ and "
                f"{off:.9g} without; this version of DeepSpeed computes with stale weights here: use 1"
            )


# ------------------------------------------------------------------------------------------------- slices of the state


def slice_bounds(numel: int, world: World) -> tuple[int, int]:
    """Where this rank's slice of `numel` elements begins and ends. Example, 5 on 2 ranks: (0, 3), (3, 5)."""
    size = -(-numel // world.world_size)
    return min(world.rank * size, numel), min((world.rank + 1) * size, numel)


class Snapshot:
    """A copy in host memory of this rank's slices: fp32 master and Adam moments of every trainable parameter.

    The memory, 12 bytes a parameter over all ranks, is taken once (page-locked on a GPU's host) and filled by every
    `take`: to take and touch it anew costs many times the copy.
    """

    def __init__(self, engine: Engine) -> None:
        bounds = {name: slice_bounds(full_shape(p).numel(), engine.world) for name, p in engine.trainable()}
        sizes = {name: end - begin for name, (begin, end) in bounds.items()}
        on_gpu = engine.world.device.type == "cuda"
        buffer = torch.empty(sum(sizes.values()) * len(STATE_KEYS), dtype=torch.float32, pin_memory=on_gpu)
        parts = iter(buffer.zero_().split([size for size in sizes.values() for _ in STATE_KEYS]))
        self.slices = {name: {key: next(parts) for key in STATE_KEYS} for name in sizes}
        self._engine = engine

    def take(self) -> dict[str, dict[str, Tensor]]:
        """Copies the state as it is now: {name: {STATE_KEYS: f32[n]}}, valid until the next `take`.

        Under ZeRO 1 and 2 every rank must call it: their fragments are cut elsewhere, so each parameter is summed once.
        """
        _prepare_optimizer_state(self._engine)
        for name, parameter in self._engine.trainable():
            for key in STATE_KEYS:
                self.slices[name][key].copy_(_read_slice(self._engine, parameter, key), non_blocking=True)
        if self._engine.world.device.type == "cuda":
            torch.cuda.synchronize(self._engine.world.device)
        return self.slices


def read_slices(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """This rank's slices in memory of their own. See `Snapshot`."""
    return Snapshot(engine).take()


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
    _forget_second_copies(engine.module)
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
        return local.detach()[: end - begin]
    if engine.stage == 0:
        full = parameter if key == "master" else engine.deepspeed.basic_optimizer.state[parameter][key]
    else:
        full = safe_get_full_fp32_param(parameter) if key == "master" else safe_get_full_optimizer_state(parameter, key)
    return full.detach().flatten()[begin:end]


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
