"""Out of memory: what was predicted, what was there, and which recipe key makes room."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from nvlm_train.engine import engine as zero
from nvlm_train.errors import NvlmError
from nvlm_train.recipe.resolve import Resolved
from nvlm_train.recipe.schema import Recipe, all_keys
from nvlm_train.train import state

STATES = ("weights", "gradients", "optimizer", "tower_replicated")  # what stays; everything else comes and goes


@contextmanager
def explained(recipe: Recipe, resolved: Resolved, built: state.Built) -> Iterator[None]:
    """Turns an out-of-memory error into an NvlmError that says what to do.

    The other ranks wait in a collective then; the launcher ends them when this one is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = str(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of torch's allocator on a CPU
            raise
        text = str(error)
    else:
        return
    raise NvlmError(explanation(recipe, resolved, built, text))


def explanation(recipe: Recipe, resolved: Resolved, built: state.Built, error: str) -> str:
    """Several lines: the error's first one, a table of predicted and actual bytes, and keys to turn."""
    world, predicted = built.engine.world, resolved.memory
    held = zero.held_bytes(built.engine)
    if built.tower is not None:
        held["tower_replicated"] = sum(p.numel() * p.element_size() for p in built.tower.parameters())
    peak = _peak(world.device)
    lines = [
        f"rank {world.rank} on {platform.node()} is out of memory: {error.splitlines()[0] if error else 'no details'}",
        f"  {'kind':<18}{'predicted':>12}{'actual':>12}",
    ]
    for kind in STATES:
        lines.append(f"  {kind:<18}{_gib(predicted[kind]):>12}{_gib(held.get(kind, 0)):>12}")
    passing = {kind: size for kind, size in predicted.items() if kind not in (*STATES, "total")}
    rest = max(0, peak - sum(held.values()))
    lines.append(f"  {'all else':<18}{_gib(sum(passing.values())):>12}{_gib(rest):>12}  at the peak")
    lines.append(f"  {'sum':<18}{_gib(predicted['total']):>12}{_gib(peak):>12}  {_device(world.device)}")
    lines.append(
        "  all else, predicted: " + ", ".join(f"{kind} {_gib(size)}" for kind, size in passing.items() if size)
    )
    lines.append("to make room, the largest first: " + "; ".join(knobs(recipe, predicted, world.world_size)))
    return "\n".join(lines)


def knobs(recipe: Recipe, predicted: Mapping[str, int], world_size: int) -> list[str]:
    """Up to three changes of the recipe, those that free most by the prediction first."""
    found: list[tuple[int, str]] = []

    def offer(size: int, text: str) -> None:
        found.append((size, f"{text} ({_gib(size)} predicted)"))

    if recipe.activation_checkpointing == "none":
        offer(predicted["activations"], "activation_checkpointing=full: activations")
    elif recipe.micro_batch_size > 1:
        offer(predicted["activations"] + predicted["recomputed_layer"], "micro_batch_size=1: activations")
    elif recipe.data.pack_tokens > recipe.data.max_tokens_per_sample:
        smaller = max(recipe.data.pack_tokens // 2, recipe.data.max_tokens_per_sample)
        offer(
            predicted["activations"] + predicted["recomputed_layer"],
            f"data.pack_tokens={smaller} (a run that has begun needs --accept data.pack_tokens): activations",
        )
    if recipe.vision_tiles_per_chunk > 1:
        offer(
            predicted["vision_activations"],
            f"vision_tiles_per_chunk={recipe.vision_tiles_per_chunk // 2}: the tower's activations",
        )
    states = predicted["weights"] + predicted["gradients"] + predicted["optimizer"]
    if recipe.zero.stage < 3 and world_size > 1:
        offer(states, "zero.stage=3: weights, gradients and optimizer shared out over the ranks")
    elif recipe.zero.stage > 0:
        if "zero.offload_optimizer" in all_keys() and getattr(recipe.zero, "offload_optimizer", None) == "none":
            offer(predicted["optimizer"], "zero.offload_optimizer=cpu: moments and masters")
        offer(states, "more ranks: weights, gradients and optimizer")
    if predicted["gathered"]:
        smaller = recipe.zero.max_live_parameters // 4
        offer(predicted["gathered"], f"zero.max_live_parameters={smaller}: gathered weights")
    offer(predicted["buckets"], f"zero.reduce_bucket_size={max(recipe.zero.reduce_bucket_size // 4, 1)}: buckets")
    return [text for _, text in sorted(found, key=lambda item: -item[0])[:3]]


def _peak(device: torch.device) -> int:
    """Most bytes of torch's allocator on a GPU; on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return "of the process, libraries included"
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.max_memory_reserved(device)
    return f"at the peak; {_gib(kept)} reserved by torch, {_gib(free)} free of the device's {_gib(total)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
