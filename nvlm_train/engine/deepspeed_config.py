"""The DeepSpeed configuration a recipe implies: a pure function, shown by `recipe show`, never written by hand.

What is left out matters as much as what is in: no optimizer and no scheduler (ours; in the JSON they would override the
learning rates of single modules), no accumulation (the loop sets the boundary itself, because the number of micro-steps
differs from step to step).
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from nvlm_train.recipe.schema import Recipe

# The releases whose ZeRO options were tried one by one; pyproject.toml asks for the same range.
SUPPORTED_FROM, SUPPORTED_BEFORE = "0.19.8", "0.20"


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """What `deepspeed.initialize(config=...)` is given. Keys as of DeepSpeed 0.19; the same for every world size."""
    zero = recipe.zero
    stage: dict[str, Any] = {"stage": zero.stage, "reduce_bucket_size": zero.reduce_bucket_size}
    if zero.stage == 3:
        stage |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
            "stage3_gather_16bit_weights_on_model_save": False,  # our checkpoints hold the slices, nothing is gathered
            "memory_efficient_linear": True,  # otherwise every gathered weight stays alive until backward
        }
        if zero.experimental.hpz_partition_size > 1:
            stage["zero_hpz_partition_size"] = zero.experimental.hpz_partition_size
    for name, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_param)):
        if device != "none":
            stage[name] = {"device": device}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.max_grad_norm,  # always written: DeepSpeed's own default is 1.0
        "communication_data_type": zero.communication_data_type,
        "data_types": {"grad_accum_dtype": "fp32"},  # in bf16 ZeRO-3 would accumulate in bf16
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded masters are stepped by our AdamW too: nothing is compiled
        "wall_clock_breakdown": False,
    }
    if recipe.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def installed_deepspeed() -> str | None:
    """Its version, without importing it; None where it is not installed, as on a login node."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def unsupported(recipe: Recipe, version: str | None) -> list[tuple[str, str]]:
    """(key, what is wrong and what would be right) of every ZeRO option in use that this DeepSpeed is not known to do.

    Options that no release in the range supports together are refused by the schema itself.
    """
    if version is None or _numbers(SUPPORTED_FROM) <= _numbers(version) < _numbers(SUPPORTED_BEFORE):
        return []
    zero = recipe.zero
    used = {
        "zero.stage": True,
        "zero.offload_optimizer": zero.offload_optimizer != "none",
        "zero.offload_param": zero.offload_param != "none",
        "zero.experimental.hpz_partition_size": zero.experimental.hpz_partition_size > 1,
    }
    message = (
        f"deepspeed {version} is installed, and this option was tried with {SUPPORTED_FROM} up to before "
        f"{SUPPORTED_BEFORE} alone; install deepspeed>={SUPPORTED_FROM},<{SUPPORTED_BEFORE}"
    )
    return [(key, message) for key, is_used in used.items() if is_used]


def _numbers(version: str) -> tuple[int, ...]:
    """0.19.8+cu128 -> (0, 19, 8)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
