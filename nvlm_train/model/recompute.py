"""Computing activations again in the backward pass instead of keeping them: `activation_checkpointing` of the recipe.

none       everything that backward needs is kept
selective  of a layer only its input and what its matrix products and attention gave are kept; norms, activations and
           rotations, which cost memory and hardly any time, are computed again
full       of a layer only its input is kept
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nvlm_train.model.dropout import Draws

# Matrix products and attention, as torch names them below autograd; those that a release lacks are left out.
_KEPT = (
    "mm", "addmm", "bmm", "baddbmm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward",
    "_cudnn_attention_forward",
)  # fmt: skip
_KEPT_LIBRARIES = ("torch_attn", "flash_attn")  # attention of torch.library


@cache
def _kept_operators() -> frozenset[Any]:
    packets = [getattr(torch.ops.aten, name) for name in _KEPT if hasattr(torch.ops.aten, name)]
    operators = {getattr(packet, overload) for packet in packets for overload in packet.overloads()}
    # DeepSpeed's linear layer adds its bias in place, to the very product that is kept. Kept as well, the addition is
    # not made a second time; without this line every gradient behind a bias is silently wrong under ZeRO-3.
    return frozenset({*operators, torch.ops.aten.add_.Tensor})


def _is_kept(operator: Any) -> bool:
    return operator in _kept_operators() or getattr(operator, "namespace", "") in _KEPT_LIBRARIES


class _PastGathers(TorchDispatchMode):
    """Shows torch's selective mode the operators that are kept and no others.

    torch counts every operator of a layer and refuses a second run that has more of one kind. ZeRO-3's gathers run
    inside layers, but not in the same ones each time: a weight may be there already in forward (a tower that is called
    twice, a prefetch) and be gathered in backward.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func):
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _selective() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a layer's first and second run."""

    def keep(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    first, second = create_selective_checkpoint_contexts(keep, allow_cache_entry_mutation=True)
    return _PastGathers(first), _PastGathers(second)


class Recompute:
    """Runs a layer, and in backward runs it again as `mode` says; without gradients it just runs it.

    Under ZeRO-3 a layer that runs again gathers its weights again: two gathers of a weight become three.
    Nothing in a layer takes from a generator (dropout is a function of its keys), so no generator's state is kept; the
    keys of the layer's rows are, because they may be others' by the time of the backward pass.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.draws: Draws | None = None  # set where LoRA has dropout

    def __call__(self, layer: nn.Module, *args: Any) -> Tensor:
        if self.mode == "none" or not torch.is_grad_enabled():
            out: Tensor = layer(*args)
            return out
        options: dict[str, Any] = {}
        if self.mode == "selective":
            options["context_fn"] = _selective
        function: Callable[..., Tensor] = layer if self.draws is None else self.draws.kept_for(layer)
        out = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)
        return out
