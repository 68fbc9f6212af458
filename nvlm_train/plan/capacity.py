"""Whether a recipe fits on a cluster, how long a step and the run take there, and what to turn where it does not fit.

Everything is a prediction from sizes: memory as `engine.memory` has it, operations as `model.flops`, bytes on the wire
as `plan.communication`. Two figures are the caller's: the share of the peak that the arithmetic reaches (`mfu`) and the
bandwidths as reached. What is not in it: waiting for data, stragglers, saves, validation, restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from nvlm_train.errors import RecipeError, SetupError
from nvlm_train.plan.communication import communication, micro_step
from nvlm_train.recipe.resolve import known_steps, resolve
from nvlm_train.recipe.schema import Optimizer, Recipe

GIB = 2**30
BYTES_SAVED = {"checkpoint": 12, "milestone": 2}  # of a trained parameter, README "What a checkpoint takes"
SWEEP = (1, 2, 4, 8, 16, 32)  # nodes
# what `--gpus-per-node` and `--nodes` may be at most: above it somebody mistyped
MOST_GPUS = 65536


@dataclass(frozen=True)
class Cluster:
    """The machines. Bandwidths are as reached by collectives; None: not known, so times of exchanges are not told.

    gpu_gib: memory of a GPU. reserve_gib: of it, for CUDA, NCCL and the allocator's slack. node_gbps: of a node's
    network, all adapters together. gpu_gbps: what a GPU receives inside its node. peak_tflops: of a GPU.
    """

    nodes: int
    gpus_per_node: int
    gpu_gib: float
    reserve_gib: float
    node_gbps: float | None
    gpu_gbps: float
    mfu: float
    peak_tflops: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def with_gpus(self, gpus: int) -> Cluster:
        """As many GPUs, on nodes of the same kind; fewer than a node has are part of one."""
        per_node = min(gpus, self.gpus_per_node)
        values = {**vars(self), "gpus_per_node": per_node, "nodes": -(-gpus // per_node)}
        return Cluster(**values)

    def __post_init__(self) -> None:
        if self.gpus > MOST_GPUS:
            raise SetupError(f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node}: more than {MOST_GPUS} GPUs")
        if not 0 <= self.reserve_gib < self.gpu_gib:
            raise SetupError(
                f"--reserve-gib {self.reserve_gib:g}: leaves nothing of {self.gpu_gib:g} GiB; give 0 or more, and less "
                "than --gpu-gib"
            )


def plan(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """All figures, as plain values; bytes, seconds, GiB and Gbit/s as their names say.

    Raises RecipeError where the ranks cannot be filled.
    """
    resolved = resolve(recipe, cluster.gpus)
    memory = _memory(recipe, cluster)
    time = _time(recipe, cluster)
    found = {
        "cluster": vars(cluster),
        "gpus": cluster.gpus,
        "parameters": {kind: sum(counts.values()) for kind, counts in resolved.parameters.items()},
        "memory": memory,
        "host": _host(recipe, cluster),
        "disk": _disk(recipe, cluster),
        "batch": {
            "packs": resolved.batch.max_packs,
            "samples": resolved.batch.samples,
            "tokens": resolved.batch.max_tokens,
            "micro_steps": resolved.batch.max_micro_steps,
            "empty_share": resolved.batch.max_null_share,
        },
        **time,
        "smallest": smallest(recipe, cluster),
        "knobs": [] if memory["fits"] else knobs(recipe, cluster),
        "room_for": room_for(recipe, cluster) if memory["fits"] else [],
        "sweep": [_row(recipe, cluster, nodes * cluster.gpus_per_node) for nodes in SWEEP],
        "warnings": list(resolved.warnings),
    }
    return found


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """Bytes by kind and when; `sum_bytes` is all of them together, and more than any moment needs."""
    kinds = dict(resolve(recipe, cluster.gpus).memory)
    total, host = kinds.pop("total"), kinds.pop("host")
    limit = (cluster.gpu_gib - cluster.reserve_gib) * GIB
    peaks = _peaks(recipe, kinds)
    return {
        "by_kind": kinds,
        "sum_bytes": total,
        "peaks": peaks,
        "highest_bytes": max(peaks.values()),
        "limit_bytes": round(limit),
        "fits": total <= limit,
        "tight": max(peaks.values()) <= limit < total,
        "offloaded_bytes": host,
    }


def _peaks(recipe: Recipe, kinds: dict[str, int]) -> dict[str, int]:
    """What is there at the same time. States and the replicated tower always are."""
    passing = ("gathered", "buckets", "activations", "recomputed_layer", "loss", "vision_activations")
    always = sum(size for kind, size in kinds.items() if kind not in passing)
    whole = kinds["gathered"]
    tower_trained = recipe.train.modes["vision"] != "frozen"
    kept = kinds["activations"] + kinds["vision_activations"] * tower_trained
    return {
        "tower": always + whole * (not recipe.tower_is_replicated) + kinds["vision_activations"],
        "loss": always + whole + kept + kinds["loss"],
        "backward": always + whole + kinds["buckets"] + kept + kinds["recomputed_layer"],
        "update": always + kinds["buckets"],
    }


def _total(recipe: Recipe, gpus: int) -> int:
    """Raises RecipeError where the ranks cannot be filled."""
    return resolve(recipe, gpus).memory["total"]


def smallest(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """The smallest number of GPUs on which it fits: `gpus`, None where there is none, and then `reason`."""
    limit = (cluster.gpu_gib - cluster.reserve_gib) * GIB
    last = least = 0
    for gpus in _numbers_of_gpus(cluster.gpus_per_node):
        try:
            total = _total(recipe, gpus)
        except RecipeError as error:
            if not last:
                continue  # hpZ, say, wants a multiple
            why = str(error).splitlines()[0].split(": a rank needs")[0]
            return {"gpus": None, "reason": f"{why}, and on {last} it takes {_gib(least)} GiB"}
        last, least = gpus, total
        if total <= limit:
            return {"gpus": gpus, "sum_bytes": total}
    return {
        "gpus": None,
        "reason": f"on {last} GPUs it still takes {_gib(least)} GiB, which more of them hardly change",
    }


def _numbers_of_gpus(per_node: int) -> Iterator[int]:
    gpus = 1
    while gpus < per_node:
        yield gpus
        gpus *= 2
    yield from range(per_node, 512 + 1, per_node)
    yield from (1024, 2048, 4096)


# --------------------------------------------------------------------------------------------------------- host, disk


def _host(recipe: Recipe, cluster: Cluster) -> dict[str, int]:
    """Bytes of a node's memory: what is offloaded, the copy that asynchronous saves take, prepared data at most.

    Python, torch and page-locked buffers come on top, some GiB a rank.
    """
    resolved = resolve(recipe, cluster.gpus)
    ranks = min(cluster.gpus, cluster.gpus_per_node)
    trained = sum(resolved.parameters["trainable"].values())
    copy = -(-12 * trained // cluster.gpus) if recipe.checkpoint.asynchronous else 0
    parts = {
        "offloaded": resolved.memory["host"] * ranks,
        "snapshot": copy * ranks,
        "prepared_data_at_most": recipe.data.prefetch_bytes * ranks,
    }
    return {**parts, "sum_per_node": sum(parts.values())}


def _disk(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """Bytes of a checkpoint and a milestone, and of all that the run keeps at its end (one more while one is saved)."""
    resolved = resolve(recipe, cluster.gpus)
    keys, steps = recipe.checkpoint, resolved.num_steps
    counts, trainable = resolved.parameters["total"], resolved.parameters["trainable"]
    trained = sum(trainable.values())
    checkpoint = BYTES_SAVED["checkpoint"] * trained
    milestone = BYTES_SAVED["milestone"] * trained
    kept = keys.keep_last + (recipe.validation is not None)
    every = 0 if keys.keep_every_steps is None else None if steps is None else steps // keys.keep_every_steps
    milestones = 0 if keys.weights_every is None else None if steps is None else steps // keys.weights_every
    number = 2 if recipe.precision == "bf16" else 4
    frozen = sum(count for module, count in counts.items() if recipe.train.modes[module] != "full")
    base = number * frozen if keys.base == "copy" else 0
    known = every is not None and milestones is not None
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoint_bytes_per_gpu": -(-checkpoint // cluster.gpus),
        "milestone_bytes": milestone,
        "checkpoints_kept": kept,
        "checkpoints_kept_for_good": every,
        "milestones": milestones,
        "base_copy_bytes": base,
        "run_bytes": (kept + 1 + every) * checkpoint + milestones * milestone + base  # type: ignore[operator]
        if known
        else None,
    }


# ----------------------------------------------------------------------------------------------------------------- time


def _time(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """Operations, bytes on the wire, and seconds of a step of full packs; days of the run where its length is known."""
    sent = communication(recipe, cluster.gpus, cluster.gpus_per_node, mfu=cluster.mfu, peak_tflops=cluster.peak_tflops)
    work = micro_step(recipe, cluster.gpus)
    inside = sent["received_per_step"] * 8e-9 / cluster.gpu_gbps
    between = 0.0
    if sent["nodes"] > 1:
        between = sent["into_node_per_step"] * 8e-9 / cluster.node_gbps if cluster.node_gbps else None  # type: ignore[assignment]
    exchange = None if between is None else max(inside, between)
    compute = sent["compute_s"]
    hidden = None if exchange is None else max(compute, exchange)
    steps = known_steps(recipe)
    useful = work["useful"] * work["micro_steps"]
    found: dict[str, Any] = {
        "micro_step": work,
        "flops_per_step_of_a_gpu": useful,
        "communication": sent,
        "compute_s": compute,
        "exchange_inside_s": inside if cluster.gpus > 1 else 0.0,
        "exchange_between_s": between,
        "step_s_hidden": hidden,
        "step_s_exposed": None if exchange is None else compute + exchange,
        "tokens_per_gpu": work["tokens"],
        "tokens_per_gpu_to_hide": None if exchange is None else round(work["tokens"] * exchange / compute),
        "steps": steps,
    }
    if hidden is not None:
        tokens = work["tokens"] * work["micro_steps"]
        found["tokens_per_s_and_gpu"] = tokens / hidden * (1 - resolve(recipe, cluster.gpus).batch.max_null_share)
        if steps is not None:
            found["days"] = steps * hidden / 86400
            found["gpu_hours"] = steps * hidden * cluster.gpus / 3600
    return found


def _row(recipe: Recipe, cluster: Cluster, gpus: int) -> dict[str, Any]:
    """A line of the table over numbers of GPUs."""
    try:
        other = cluster.with_gpus(gpus)
        memory, time = _memory(recipe, other), _time(recipe, other)
        empty = resolve(recipe, gpus).batch.max_null_share
    except RecipeError as error:
        return {"gpus": gpus, "error": str(error).splitlines()[0]}
    return {
        "gpus": gpus,
        "sum_bytes": memory["sum_bytes"],
        "fits": memory["fits"],
        "tight": memory["tight"],
        "micro_steps": time["micro_step"]["micro_steps"],
        "empty_share": empty,
        "compute_s": time["compute_s"],
        "exchange_s": None
        if time["exchange_between_s"] is None
        else max(time["exchange_inside_s"], time["exchange_between_s"]),
        "needed_node_gbps": time["communication"]["needed_node_gbps"],
        "step_s": time["step_s_hidden"],
        "days": time.get("days"),
        "gpu_hours": time.get("gpu_hours"),
    }


# ---------------------------------------------------------------------------------------------------------------- knobs


def changed(recipe: Recipe, keys: dict[str, Any]) -> Recipe | None:
    """The recipe with dotted keys set; None where that is no recipe."""
    values = recipe.model_dump(mode="python")
    for name, value in keys.items():
        place = values
        *path, last = name.split(".")
        for part in path:
            place = place[part]
        place[last] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None


def _turns(recipe: Recipe, gpus: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that make room and what each costs, the cheapest first."""
    zero, data = recipe.zero, recipe.data
    if recipe.vision_tiles_per_chunk > 4:
        yield {"vision_tiles_per_chunk": 4}, "nothing to speak of"
    if zero.reduce_bucket_size > 100_000_000:
        yield {"zero.reduce_bucket_size": 100_000_000}, "smaller messages"
    if recipe.activation_checkpointing == "none":
        yield {"activation_checkpointing": "selective"}, "norms and activations computed again"
    if recipe.activation_checkpointing != "full":
        yield {"activation_checkpointing": "full"}, "every layer's forward pass once more"
    if recipe.micro_batch_size > 1:
        yield {"micro_batch_size": 1}, "more micro-steps, so more gathers"
    if zero.stage < 3 and gpus > 1:
        yield {"zero.stage": 3}, "weights are gathered in every micro-step"
    if zero.stage == 3 and zero.max_live_parameters > 200_000_000:
        yield {"zero.max_live_parameters": 200_000_000}, "less is fetched ahead"
    smaller = max(data.max_tokens_per_sample, data.pack_tokens // 2)
    if smaller < data.pack_tokens:
        yield {"data.pack_tokens": smaller}, "smaller packs, so less to hide gathers behind (--accept data)"
    if recipe.tower_is_replicated and zero.stage == 3 and gpus > 1:
        yield {"zero.tower": "partitioned"}, "the tower is gathered in every micro-step with an image"
    for name in ("name", "kind", "type"):  # kinds of optimizers, where the recipe knows some
        field = Optimizer.model_fields.get(name)
        for kind in get_args(field.annotation) if field is not None else ():
            yield {f"optimizer.{name}": kind}, "another optimizer: look at the learning rate"
    if zero.offload_optimizer == "none" and zero.stage:
        yield {"zero.offload_optimizer": "cpu"}, "the update runs on the host's cores"
    if zero.offload_param == "none" and zero.stage == 3:
        keys = {"zero.offload_param": "cpu", "zero.offload_optimizer": "cpu"}
        yield keys, "weights come over PCIe in every micro-step too"
    if recipe.train.language_model == "full":
        yield {"train.language_model": "lora"}, "adapters alone are trained: another result"


def knobs(recipe: Recipe, cluster: Cluster) -> list[dict[str, Any]]:
    """Each change alone, predicted again, and after each other until it fits: {keys, cost, gain_bytes, sum_bytes, fits,
    together_bytes, together_fits}; changes that gain nothing are left out."""
    limit = (cluster.gpu_gib - cluster.reserve_gib) * GIB
    before = _total(recipe, cluster.gpus)
    found = []
    together = recipe
    for keys, cost in _turns(recipe, cluster.gpus):
        alone = changed(recipe, keys)
        if alone is None:
            continue
        try:
            total = _total(alone, cluster.gpus)
        except RecipeError:
            continue
        if total >= before:
            continue
        row: dict[str, Any] = {
            "keys": keys,
            "cost": cost,
            "gain_bytes": before - total,
            "sum_bytes": total,
            "fits": total <= limit,
        }
        both = changed(together, keys)
        if both is not None and _total(together, cluster.gpus) > limit:
            together = both
            row["together_bytes"] = _total(together, cluster.gpus)
            row["together_fits"] = row["together_bytes"] <= limit
        found.append(row)
    return found


def room_for(recipe: Recipe, cluster: Cluster) -> list[dict[str, Any]]:
    """Faster settings that would fit as well: {keys, sum_bytes, gain}."""
    limit = (cluster.gpu_gib - cluster.reserve_gib) * GIB
    wishes: list[tuple[dict[str, Any], str]] = []
    if recipe.activation_checkpointing != "none":
        wishes.append(({"activation_checkpointing": "none"}, "nothing is computed again"))
    if recipe.activation_checkpointing == "full":
        wishes.append(({"activation_checkpointing": "selective"}, "products are not computed again"))
    double = 2 * recipe.data.pack_tokens
    wishes.append(({"data.pack_tokens": double}, "half as many gathers a token"))
    if recipe.zero.offload_optimizer != "none":
        wishes.append(({"zero.offload_param": "none", "zero.offload_optimizer": "none"}, "the update runs on the GPU"))
    found = []
    for keys, gain in wishes:
        other = changed(recipe, keys)
        if other is None:
            continue
        try:
            total = _total(other, cluster.gpus)
        except RecipeError:
            continue
        if total <= limit:
            found.append({"keys": keys, "sum_bytes": total, "gain": gain})
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
