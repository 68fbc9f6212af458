"""Bytes that the ranks exchange in a step, by what for, and the bandwidth that hides them behind the arithmetic.

A gather or a reduce-scatter of N bytes over P ranks brings each rank N (P-1)/P; an all-reduce twice that. Rings that
know the nodes carry a byte into a node once, through all of the node's adapters together: N (nodes-1)/nodes.

tests/test_plan.py compares the bytes with what goes through the collectives of real steps on two ranks.
"""

from __future__ import annotations

from typing import Any

from nvlm_train.model.flops import count_flops
from nvlm_train.plan.trace import PHASES, Gathers, Tensor, gathers, tensors
from nvlm_train.recipe.resolve import batch_arithmetic, most_tiles
from nvlm_train.recipe.schema import Recipe

PEAK_TFLOPS = 989.0  # H100, bf16, dense, as stated by its maker
MFU = 0.4  # useful operations over the peak, while nobody waits for the network
GPUS_PER_NODE = 8

_known: dict[tuple[str, int], tuple[list[Tensor], Gathers]] = {}


def model_trace(recipe: Recipe, chunks: int) -> tuple[list[Tensor], Gathers]:
    """`trace.tensors` and `trace.gathers`, which are the same for every number of ranks, kept once computed."""
    kept = {"model", "train", "zero", "activation_checkpointing"}
    name = recipe.model_dump_json(include=kept)
    if (name, chunks) not in _known:
        _known[name, chunks] = (tensors(recipe), gathers(recipe, chunks))
    return _known[name, chunks]


def micro_step(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """A full micro-step of a rank: its tokens, tiles, calls of a tower inside the engine, and operations (`useful`,
    and `executed` with recompute). A step has at most `micro_steps` of them."""
    batch = batch_arithmetic(recipe, world_size)
    tokens = recipe.micro_batch_size * recipe.data.pack_tokens
    tiles = recipe.micro_batch_size * -(-most_tiles(recipe, batch) // batch.max_packs)
    flops = count_flops(recipe.model, recipe.train, recipe.data.max_tokens_per_sample, recipe.activation_checkpointing)
    useful, executed = flops.step(tokens, tiles)
    inside = not recipe.tower_is_replicated
    return {
        "micro_steps": batch.max_micro_steps,
        "tokens": tokens,
        "tiles": tiles,
        "tower_calls": max(-(-tiles // recipe.vision_tiles_per_chunk), int(inside)) if inside else 0,
        "useful": useful,
        "executed": executed,
    }


def communication(
    recipe: Recipe,
    world_size: int,
    gpus_per_node: int = GPUS_PER_NODE,
    *,
    mfu: float = MFU,
    peak_tflops: float = PEAK_TFLOPS,
) -> dict[str, Any]:
    """What one optimizer step of full packs sends around, and how fast the network must be so that nobody waits.

    A pure function; imports neither torch nor deepspeed. Raises RecipeError where the ranks cannot be filled.

    ranks, nodes, micro_steps: `world_size`, on nodes of `gpus_per_node`; micro-steps of a step.
    micro_step: bytes that a rank receives in each micro-step: `gather_forward`, `gather_backward` (stage 3; what runs
        again included), `reduce` (gradients; stages 2 and 3).
    update: bytes that a rank receives once a step: `reduce` (stages 0 and 1), `gather_updated` (weights that are whole
        on every rank: all in stages 1 and 2, the small ones in stage 3), `gather_after_update` (hpZ: weights that
        are asked of all ranks once).
    received_per_micro_step, received_per_step: their sums.
    into_node_per_micro_step, into_node_per_step: bytes that enter a node from others; hpZ's gathers stay inside.
    gathers_per_weight: how often a weight is gathered in a micro-step, on average over the elements (stage 3).
    compute_s: seconds of a step's arithmetic on a GPU, at `mfu` of `peak_tflops`.
    needed_gpu_gbps, needed_node_gbps: Gbit/s that a GPU must receive inside the node, and a node from the network (all
        adapters together, as reached), for the exchange to take no longer than the arithmetic. With the steps' peaks
        and imperfect overlap count on needing 1.3 times that.
    """
    work = micro_step(recipe, world_size)
    steps = work["micro_steps"]
    nodes = -(-world_size // gpus_per_node)
    stage, zero = recipe.zero.stage, recipe.zero
    all_tensors, gathered = model_trace(recipe, work["tower_calls"])
    weight = 2 if recipe.precision == "bf16" else 4
    gradient = 4 if zero.communication_data_type == "fp32" else 2
    trained = [tensor for tensor in all_tensors if tensor.trained]

    def padded(tensor: Tensor) -> int:
        return -(-tensor.numel // world_size) * world_size

    hpz = zero.experimental.hpz_partition_size
    within = min(hpz, world_size) if hpz > 1 else world_size  # ranks that a repeated gather asks
    per_micro: dict[str, float] = {}
    into_micro = 0.0
    update: dict[str, float] = {}
    into_update = 0.0

    def share(ranks: int) -> tuple[float, float]:
        """Of the whole bytes: what a rank receives, and what enters a node."""
        spans = -(-ranks // gpus_per_node)
        return (ranks - 1) / ranks, (spans - 1) / spans

    per_weight = 0.0
    if stage == 3:
        sizes = {tensor.name: padded(tensor) * weight for tensor in all_tensors}
        is_trained = {tensor.name for tensor in trained}
        asked: set[str] = set()
        first_of_step = 0.0
        for phase in PHASES:
            total = 0
            for name, count in gathered.counts[phase].items():
                total += count * sizes[name]
                if name not in asked and name in is_trained:
                    first_of_step += sizes[name]
                asked.add(name)
            to_rank, to_node = share(within)
            per_micro[f"gather_{phase}"] = total * to_rank
            into_micro += total * to_node
            per_weight += total
        per_weight /= sum(sizes.values())
        if within < world_size:  # the first gather of a trained weight after an update asks all ranks
            (all_rank, all_node), (in_rank, in_node) = share(world_size), share(within)
            update["gather_after_update"] = first_of_step * (all_rank - in_rank)
            into_update += first_of_step * (all_node - in_node)
        to_rank, to_node = share(world_size)
        reduced = sum(padded(tensor) for tensor in trained) * gradient
        per_micro["reduce"] = reduced * to_rank
        into_micro += reduced * to_node
        small = sum(sizes[name] for name in gathered.persistent)
        update["gather_updated"] = small * to_rank
        into_update += small * to_node
    else:
        to_rank, to_node = (2 * part for part in share(world_size))  # all-reduces, in stages 1 and 2 too
        reduced = sum(tensor.numel for tensor in trained) * gradient
        if stage == 2:
            per_micro["reduce"] = reduced * to_rank
            into_micro += reduced * to_node
        else:
            update["reduce"] = reduced * to_rank
            into_update += reduced * to_node
        if stage:
            to_rank, to_node = share(world_size)
            update["gather_updated"] = sum(tensor.numel for tensor in trained) * weight * to_rank
            into_update += sum(tensor.numel for tensor in trained) * weight * to_node
    received, received_update = sum(per_micro.values()), sum(update.values())
    compute_s = steps * work["useful"] / (mfu * peak_tflops * 1e12)
    step_bytes, step_into = steps * received + received_update, steps * into_micro + into_update
    return {
        "ranks": world_size,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "micro_steps": steps,
        "micro_step": {kind: round(size) for kind, size in per_micro.items()},
        "update": {kind: round(size) for kind, size in update.items()},
        "received_per_micro_step": round(received),
        "received_per_step": round(step_bytes),
        "into_node_per_micro_step": round(into_micro),
        "into_node_per_step": round(step_into),
        "gathers_per_weight": per_weight,
        "compute_s": compute_s,
        "needed_gpu_gbps": step_bytes * 8e-9 / compute_s,
        "needed_node_gbps": step_into * 8e-9 / compute_s,
    }
