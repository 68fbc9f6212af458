"""Parameter groups and AdamW. The optimizer is ours, never DeepSpeed's, so that learning rates per module hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_train.errors import SetupError
from nvlm_train.recipe.schema import Optimizer

BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit moments
QUANTIZED_AT_ONCE = 2**22  # of a tensor that is turned to 8 bits, so that it needs little memory besides

# our parameter names start with the attribute of the model; the recipe names the module
MODULE_OF_PREFIX = {
    "vision_model": "vision",
    "projector": "projector",
    "cross_attention": "cross_attention",
    "language_model": "language_model",
}


def module_of(name: str) -> str:
    """The recipe's name of the module that a parameter belongs to: "language_model.lm_head.weight" → language_model."""
    return MODULE_OF_PREFIX[name.split(".", 1)[0]]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; under ZeRO-3 `parameter.shape` is [0]."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_decayed(name: str, shape: torch.Size) -> bool:
    """Weight decay is for matrices: not for biases, norms and LayerScale, which are the vectors."""
    return len(shape) > 1 and not name.endswith(".bias")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer, module_lr: dict[str, float]
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: one per module and decay, in model order, empty ones left out.

    Each has `name` ("projector/decay"), `peak_lr`, `lr`, `weight_decay`, `params` and `names`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        module, decayed = module_of(name), is_decayed(name, full_shape(parameter))
        group_name = f"{module}/{'decay' if decayed else 'no_decay'}"
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "peak_lr": module_lr[module],
                "lr": module_lr[module],
                "weight_decay": optimizer.weight_decay if decayed else 0.0,
                "params": [],
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def check_implementation(implementation: str, device_type: str) -> None:
    """Raises SetupError where `optimizer.implementation` cannot run here; what the recipe alone can tell is told there.

    device_type: "cpu" or "cuda".
    """
    key = f"optimizer.implementation: {implementation!r}"
    if implementation == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(f"{key} needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.49', or auto")
    if implementation.startswith("deepspeed_") and device_type != "cuda":
        raise SetupError(f"{key} is compiled for a GPU's machine, and this is {device_type}; use auto or torch_fused")


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Optimizer, device_type: str, offloaded: bool = False
) -> torch.optim.Optimizer:
    """The AdamW that `optimizer.implementation` names, over the groups.

    auto: torch's, in its fused form on a GPU and where it steps offloaded masters on the host.
    """
    check_implementation(optimizer.implementation, device_type)
    kept = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    beta1, beta2 = optimizer.betas
    common: dict[str, Any] = {"lr": optimizer.lr, "betas": (beta1, beta2), "eps": optimizer.eps}
    if optimizer.implementation == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        quantized: torch.optim.Optimizer = AdamW8bit(kept, **common)
        return quantized
    if optimizer.implementation == "deepspeed_fused":
        from deepspeed.ops.adam import FusedAdam

        made: torch.optim.Optimizer = FusedAdam(kept, adam_w_mode=True, **common)
        return made
    if optimizer.implementation == "deepspeed_cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        on_host: torch.optim.Optimizer = DeepSpeedCPUAdam(kept, adamw_mode=True, **common)
        return on_host
    fused = optimizer.implementation == "torch_fused" or device_type == "cuda" or offloaded
    return torch.optim.AdamW(kept, **common, fused=fused)


# ------------------------------------------------------------------------------------- moments, however they are kept


def is_8bit(optimizer: Any) -> bool:
    """Whether its moments are bitsandbytes' `state1`, `state2`, in 8 bits or (below 4096 values) in fp32."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def make_state(optimizer: Any, group: dict[str, Any], flat: Tensor) -> None:
    """Zero moments for a tensor that has none yet, as the optimizer's own first step would make them."""
    state = optimizer.state[flat]
    if state:
        return
    if is_8bit(optimizer):
        kept, group["params"] = group["params"], [flat]  # where bitsandbytes looks for its options
        optimizer.init_state(group, flat, optimizer.param_groups.index(group), 0)
        group["params"] = kept
        return
    on_host = isinstance(optimizer, torch.optim.AdamW) and not group.get("fused")
    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu" if on_host else flat.device)
    if not isinstance(optimizer, torch.optim.AdamW):
        state["step"] = 0  # DeepSpeed's own take a number
    state["exp_avg"] = torch.zeros_like(flat, dtype=torch.float32)
    state["exp_avg_sq"] = torch.zeros_like(flat, dtype=torch.float32)


def set_step(state: dict[str, Any], step: int) -> None:
    """AdamW's step count, a tensor or a number as it was."""
    old = state["step"]
    state["step"] = torch.full_like(old, float(step)) if isinstance(old, Tensor) else step


def read_8bit(state: dict[str, Any], key: str, begin: int, end: int) -> Tensor:
    """f32[end - begin] of a moment; key: "exp_avg" or "exp_avg_sq"."""
    from bitsandbytes.functional import dequantize_blockwise

    number = 1 if key == "exp_avg" else 2
    codes = state[f"state{number}"].flatten()
    if codes.dtype == torch.float32:
        return codes[begin:end]
    first, last = begin // BLOCK, -(-end // BLOCK)
    values = dequantize_blockwise(
        codes[first * BLOCK : last * BLOCK].contiguous(),
        absmax=state[f"absmax{number}"][first:last].contiguous(),
        code=state[f"qmap{number}"],
        blocksize=BLOCK,
    )
    return values[begin - first * BLOCK : end - first * BLOCK]


def write_8bit(state: dict[str, Any], key: str, values: Tensor) -> None:
    """Puts a whole moment into its 8 bits. What `read_8bit` gave of the same blocks comes back bit for bit.

    values: f32[n], n the number of values of the tensor.
    """
    number = 1 if key == "exp_avg" else 2
    codes = state[f"state{number}"].view(-1)
    if codes.dtype == torch.float32:
        codes.copy_(values)
        return
    for begin in range(0, len(values), QUANTIZED_AT_ONCE):
        piece = values[begin : begin + QUANTIZED_AT_ONCE].to(codes.device)
        found, scales = _quantize(piece, state[f"qmap{number}"])
        codes[begin : begin + len(piece)] = found
        state[f"absmax{number}"][begin // BLOCK : begin // BLOCK + len(scales)] = scales


def _quantize(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """(codes u8[n], scales f32[blocks]): to the nearest of the map.

    The map of signed values ends at 1 above and at -0.993 below, and a block's scale is its largest absolute value when
    it was quantised. So the largest value of a block that comes back is the scale, or 0.993 of it if it was negative;
    dividing may be off by the last bit, so the scale is the one of three candidates that gives the block again.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)  # [blocks, 256]
    highest, lowest = blocks.amax(1), -blocks.amin(1)
    scales = highest.clamp(min=0)
    negative = (lowest > 0) & (lowest >= highest) & (qmap[0] < 0)
    scales = torch.where(negative, lowest / qmap[0].abs().clamp(min=0.5), scales)
    shares = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
    codes = torch.bucketize(shares, (qmap[1:] + qmap[:-1]) / 2)  # i64[blocks, 256]
    wanted = qmap[codes]
    for away in (torch.inf, -torch.inf):
        other = torch.nextafter(scales, torch.full_like(scales, away))
        better = negative & (wanted * other[:, None] == blocks).all(1) & (wanted * scales[:, None] != blocks).any(1)
        scales = torch.where(better, other, scales)
    return codes.to(torch.uint8).flatten()[: len(values)], scales


def set_learning_rates(optimizer: Any, factor: float) -> dict[str, float]:
    """Sets every group's rate to its peak times `factor`; returns them by module."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"].split("/")[0]] = group["lr"]
    return rates
