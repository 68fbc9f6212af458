"""Which implementation of each op runs where, and why.

`KERNELS[op][name]` says when an implementation can run and how it is loaded; the implementations live in one file per
op and are imported only when they are used, so that choosing costs no import.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

from nvlm_train.errors import SetupError

TORCH = "torch"  # the plain PyTorch implementation that every op has
UNMEASURED = "not yet run on a GPU; ask for it: kernels: {name}"


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    entry: "module:function".
    why: what speaks for it, printed with the choice.
    obstacle: given a device type ("cpu", "cuda"), why it cannot run here, or None where it can.
    measured: whether it is known to be right and fast on a GPU: from its library, or by a run of ours. `auto` passes
        over the others and says so: what only an interpreter has run is not taken silently.
    """

    entry: str
    why: str
    obstacle: Callable[[str], str | None]
    measured: bool = True


class FlashAttn(NamedTuple):
    """A version of the flash-attn packages: where its `flash_attn_varlen_func` is, and what it runs on."""

    module: str
    capability: int  # major compute capability that it needs
    newer: bool  # whether it runs on later ones too
    max_head_size: int


FLASH_ATTN = {
    "flash_attn_3": FlashAttn("flash_attn_interface", 9, newer=False, max_head_size=256),
    "flash_attn_4": FlashAttn("flash_attn.cute", 9, newer=True, max_head_size=128),
    "flash_attn_2": FlashAttn("flash_attn", 8, newer=True, max_head_size=256),
}


def _no_obstacle(device_type: str) -> str | None:
    return None


def _varlen_obstacle(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"runs on cuda only, this is {device_type}"
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return "this torch has no torch.nn.attention.varlen"
    return None if hasattr(module, "varlen_attn") else "this torch's torch.nn.attention.varlen has no varlen_attn"


def _flash_attn_obstacle(device_type: str, name: str) -> str | None:
    module, capability, newer, _ = FLASH_ATTN[name]
    if device_type != "cuda":
        return f"runs on cuda only, this is {device_type}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{module} is not installed" if module.startswith(error.name or "?") else f"{module}: {error}"
    except Exception as error:  # a package built for another torch fails in many ways
        return f"{module} cannot be imported: {error}"
    if not hasattr(found, "flash_attn_varlen_func"):
        return f"{module} has no flash_attn_varlen_func"
    torch = importlib.import_module("torch")
    have: int = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else capability
    if have < capability or (have > capability and not newer):
        return f"needs compute capability {capability}.x{' or newer' if newer else ''}, this GPU has {have}.x"
    return None


def _flash_attn(op: str) -> dict[str, Kernel]:
    """The flash-attn packages' versions of an attention."""
    return {
        name: Kernel(
            f"nvlm_train.kernels.attention:{name}_{op}",
            f"{FLASH_ATTN[name].module}.flash_attn_varlen_func",
            partial(_flash_attn_obstacle, name=name),
            measured=False,
        )
        for name in FLASH_ATTN
    }


def _triton_obstacle(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if device_type == "cuda" else f"runs on cuda only, this is {device_type}"


def _liger_obstacle(device_type: str) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return _triton_obstacle(device_type)


def _triton(op: str, why: str, file: str = "") -> dict[str, Kernel]:
    """An op with our Triton kernel and its PyTorch reference; both are in the file of its name unless `file` says."""
    where = f"nvlm_train.kernels.{file or op}"
    return {
        "triton": Kernel(f"{where}:triton_{op}", why, _triton_obstacle, measured=False),
        TORCH: Kernel(f"{where}:torch_{op}", "plain PyTorch", _no_obstacle),
    }


# In order of preference; `auto` takes the first that is measured and can run. Only a run on a GPU makes `measured` true
# of a kernel, and only where it wins.
KERNELS: dict[str, dict[str, Kernel]] = {
    "attention": {
        "varlen": Kernel(
            "nvlm_train.kernels.attention:varlen_attention",
            "torch's variable-length flash attention (fp32 activations take torch)",
            _varlen_obstacle,
        ),
        **_flash_attn("attention"),
        TORCH: Kernel("nvlm_train.kernels.attention:torch_attention", "plain PyTorch", _no_obstacle),
    },
    "cross_attention": {
        "varlen": Kernel(
            "nvlm_train.kernels.attention:varlen_cross_attention",
            "torch's variable-length flash attention (fp32 activations take torch)",
            _varlen_obstacle,
        ),
        **_flash_attn("cross_attention"),
        TORCH: Kernel("nvlm_train.kernels.attention:torch_cross_attention", "plain PyTorch", _no_obstacle),
    },
    "linear_cross_entropy": {
        "triton": Kernel(
            "nvlm_train.kernels.linear_cross_entropy:triton_linear_cross_entropy",
            "logits turned into their gradient in place, weight gradient summed in fp32",
            _triton_obstacle,
            measured=False,
        ),
        "liger": Kernel(
            "nvlm_train.kernels.linear_cross_entropy:liger_linear_cross_entropy",
            "Liger's fused linear cross-entropy",
            _liger_obstacle,
            measured=False,  # with our head and ZeRO-3; it also waits for the device in backward
        ),
        TORCH: Kernel(
            "nvlm_train.kernels.linear_cross_entropy:torch_linear_cross_entropy", "plain PyTorch", _no_obstacle
        ),
    },
    "rms_norm": _triton("rms_norm", "one pass over the rows"),
    "add_rms_norm": _triton("add_rms_norm", "residual, scale and norm in one pass over the rows", "rms_norm"),
    "norm_rope": _triton("norm_rope", "norm over all heads and rotary positions in one pass over queries or keys"),
    "splice": _triton("splice", "each row of tokens and images written once"),
    "shuffle_layer_norm": _triton(
        "shuffle_layer_norm", "pixel shuffle and LayerNorm in one pass (behind a trained tower: plain PyTorch)"
    ),
}


def select(choice: str, device_type: str) -> dict[str, tuple[str, str]]:
    """The implementation of every op and the reason, for the first screen of a run.

    choice: "auto" takes the first that is measured and can run; "torch" plain PyTorch; any other name is forced on the
        ops that have it, and the others are chosen as by auto. Several names are joined by "+": each op takes the
        first of them that it has.
    device_type: "cpu" or "cuda".
    Example: `select("auto", "cpu")` is
        `{"attention": ("torch", "plain PyTorch; not varlen: runs on cuda only, this is cpu")}`.
    Raises SetupError where a forced name is unknown or cannot run here.
    """
    return dict(_select(choice, device_type))


@cache
def _select(choice: str, device_type: str) -> MappingProxyType[str, tuple[str, str]]:
    known = sorted({name for kernels in KERNELS.values() for name in kernels})
    names = [] if choice == "auto" else choice.split("+")
    for name in names:
        if name not in known:
            raise SetupError(f"kernels: {name!r} is not known; known are auto, {', '.join(known)}")
    chosen: dict[str, tuple[str, str]] = {}
    for op, kernels in KERNELS.items():
        if asked := next((name for name in names if name in kernels), None):
            interpreted = asked in ("triton", "liger") and os.environ.get("TRITON_INTERPRET") == "1"  # tests on a CPU
            obstacle = None if interpreted else kernels[asked].obstacle(device_type)
            if obstacle is not None:
                raise SetupError(f"kernels: {asked!r} was asked for {op}, but {obstacle}; use auto or torch")
            chosen[op] = (asked, f"{kernels[asked].why}; asked for")
            continue
        reasons = [f"{op} has no {' or '.join(names)}"] if names else []
        for name, kernel in kernels.items():
            obstacle = kernel.obstacle(device_type)
            if obstacle is None and not kernel.measured:
                obstacle = UNMEASURED.format(name=name)
            if obstacle is None:
                chosen[op] = (name, "; ".join([kernel.why, *reasons]))
                break
            reasons.append(f"not {name}: {obstacle}")
    return MappingProxyType(chosen)


@cache
def load(op: str, name: str) -> Callable[..., Any]:
    """The function behind `KERNELS[op][name]`."""
    module, function = KERNELS[op][name].entry.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


@cache
def chosen(op: str, choice: str, device_type: str) -> Callable[..., Any]:
    """The function that `select` takes for an op: what modules call."""
    return load(op, select(choice, device_type)[op][0])
