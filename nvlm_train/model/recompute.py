"""Computing activations again in the backward pass instead of keeping them: `activation_checkpointing` of the recipe.

none       everything that backward needs is kept
selective  of a layer only its input and what its matrix products and attention gave are kept; norms, activations and
           rotations, which cost memory and hardly any time, are computed again
full       of a layer only its input is kept
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
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


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _kept_operators() or getattr(operator, "namespace", "") in _KEPT_LIBRARIES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


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
            contexts: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
            contexts = partial(create_selective_checkpoint_contexts, _policy, allow_cache_entry_mutation=True)
            options["context_fn"] = contexts
        function: Callable[..., Tensor] = layer if self.draws is None else self.draws.kept_for(layer)
        out = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)
        return out
