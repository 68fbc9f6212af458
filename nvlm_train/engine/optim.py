"""Parameter groups and AdamW. The optimizer is ours, never DeepSpeed's, so that learning rates per module hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nvlm_train.recipe.schema import Optimizer

# our parameter names start with the attribute of the model; the recipe names the module
MODULE_OF_PREFIX = {"vision_model": "vision", "projector": "projector", "language_model": "language_model"}


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


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Optimizer, device_type: str, offloaded: bool = False
) -> torch.optim.AdamW:
    """torch's AdamW over the groups; its fused form on a GPU, and where it steps offloaded masters on the host."""
    kept = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    beta1, beta2 = optimizer.betas
    return torch.optim.AdamW(
        kept, lr=optimizer.lr, betas=(beta1, beta2), eps=optimizer.eps, fused=device_type == "cuda" or offloaded
    )


def set_learning_rates(optimizer: Any, factor: float) -> dict[str, float]:
    """Sets every group's rate to its peak times `factor`; returns them by module."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"].split("/")[0]] = group["lr"]
    return rates
