"""Jobs for warm ranks: train the tiny model under ZeRO, and tell what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed

from nvlm_train import checkpoint
from nvlm_train.batch import Batch, Memory
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.engine.optim import build_optimizer, full_shape, module_of, parameter_groups
from nvlm_train.model.nvlm import class_of
from nvlm_train.model.vision import InternVit, encode_tiles
from nvlm_train.recipe import schema
from tiny import IMAGE_TOKENS, make_batch, model_config, null_batch, seeded_value

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def deepspeed_dict(stage: int, precision: str, clip: float, **zero_keys: Any) -> dict[str, Any]:
    """The recipe's own DeepSpeed dict, with thresholds that make every module of a tiny model gather."""
    from nvlm_train.engine.deepspeed_config import deepspeed_config

    recipe = schema.Recipe.model_validate(
        {
            "run_name": "t", "output_dir": "t", "model": model_config().model_dump(), "tokenizer": {"path": "t"},
            "data": {"mixture": {"a": {"path": "a"}}, "max_tokens_per_sample": 64, "pack_tokens": 64},
            "global_batch": {"samples": 8}, "max_steps": 1, "optimizer": {"lr": 1e-3, "max_grad_norm": clip},
            "precision": precision,
            "zero": {
                "stage": stage, "param_persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0,
                **zero_keys,
            },
        }
    )  # fmt: skip
    return deepspeed_config(recipe)


def start(
    *,
    stage: int,
    precision: str = "fp32",
    clip: float = 1.0,
    train: dict[str, str] | None = None,
    tied: bool = False,
    checkpointing: str = "none",
    tiles_per_chunk: int = 2,
    lr: float = 1e-2,
    seed: int = 3,
    compare_calls_s: float | None = None,
    architecture: str = "nvlm_d",
    gate: float = 0.5,
    kernels: str = "auto",
    implementation: str = "auto",
    **zero_keys: Any,
) -> tuple[zero.Engine, InternVit | None, dist.World]:
    world = dist.start(resolve_launch(), timeout_s=240)
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's: DeepSpeed makes it once a process, and then always uses it
    modes = schema.Train.model_validate(train or {})
    dtype = DTYPES[precision]
    config = model_config(architecture, tie_word_embeddings=tied)
    tower = None
    if modes.vision == "frozen" and zero_keys.get("tower") != "partitioned":
        tower = make_tower(config, seed, dtype)
    settings = deepspeed_dict(stage, precision, clip, **zero_keys)
    with zero.partitioned_at_birth(settings, world.device, dtype):
        model = class_of(config)(
            config,
            with_vision=tower is None,
            activation_checkpointing=checkpointing,
            tiles_per_chunk=tiles_per_chunk,
            kernels=kernels,
        )
    slice_of, write = zero.write_slice(world)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(modes, module_of(name)) == "full")
        value = seeded_value(name, tuple(full_shape(parameter)), seed, gate)
        part = slice_of(parameter)
        write(parameter, value if part is None else value.flatten()[part[0] : part[1]])
    # the rates below are what counts
    optimizer = schema.Optimizer.model_validate(
        {"lr": lr or 1.0, "weight_decay": 0.1, "betas": [0.9, 0.95], "implementation": implementation}
    )
    rates = {"vision": lr, "projector": lr * 2, "cross_attention": lr * 3, "language_model": lr}
    groups = parameter_groups(model.named_parameters(), optimizer, rates)
    offloaded = "offload_optimizer" in settings["zero_optimization"]
    made = build_optimizer(groups, optimizer, "cpu", offloaded)
    return zero.build(model, made, settings, world, compare_calls_s), tower, world


def make_tower(config: schema.Model, seed: int, dtype: torch.dtype) -> InternVit:
    """The frozen tower outside the engine."""
    tower = InternVit(config.vision)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.copy_(seeded_value("vision_model." + name, tuple(parameter.shape), seed))
    return tower.to(dtype).requires_grad_(False)


def deal(
    samples: list[tuple[int, int]],
    seed: int,
    packs: int,
    world_size: int,
    tiles_per_chunk: int,
    architecture: str = "nvlm_d",
) -> list[list[Any]]:
    """[micro_step][rank] -> Batch: sample i in pack i % packs, pack p in micro-step p // world_size."""
    made = []
    for pack in range(packs):
        numbers = range(pack, len(samples), packs)
        made.append([samples[i] for i in numbers])
    micro_steps = -(-packs // world_size)
    table = []
    for micro in range(micro_steps):
        row_samples = [made[p] if (p := micro * world_size + r) < packs else None for r in range(world_size)]
        chunks = max(-(-sum(t for _, t in s) // tiles_per_chunk) if s else 0 for s in row_samples)
        table.append(
            [
                null_batch(chunks, architecture)
                if s is None
                else make_batch(
                    s, seed * 100 + micro * world_size + r, num_tile_chunks=chunks, architecture=architecture
                )
                for r, s in enumerate(row_samples)
            ]
        )
    return table


def table_of(
    step: dict[str, Any], world_size: int, tiles_per_chunk: int, architecture: str = "nvlm_d"
) -> list[list[Batch]]:
    """[micro_step][rank] -> Batch of a step: {"samples", "seed", "packs"} as `deal` places them, or {"slots", "seed"},
    where slots[micro_step][rank] is what the pack holds, (text tokens, tiles) each, or None for a null pack."""
    if "slots" not in step:
        return deal(step["samples"], step["seed"], step["packs"], world_size, tiles_per_chunk, architecture)
    table = []
    for micro, row in enumerate(step["slots"]):
        chunks = max(-(-sum(tiles for _, tiles in pack or ()) // tiles_per_chunk) for pack in row)
        seeds = [step["seed"] * 100 + micro * world_size + rank for rank in range(world_size)]
        table.append(
            [
                null_batch(chunks, architecture)
                if pack is None
                else make_batch(pack, seed, num_tile_chunks=chunks, architecture=architecture)
                for pack, seed in zip(row, seeds, strict=True)
            ]
        )
    return table


def train_steps(
    *,
    rank: int,
    world_size: int,
    steps: list[dict[str, Any]],
    gradients_of: tuple[int, ...] = (),
    tiles_per_chunk: int = 2,
    precision: str = "fp32",
    architecture: str = "nvlm_d",
    **options: Any,
) -> dict[str, Any]:
    """Trains on `steps`, see `table_of`.

    Returns losses, gradient norms, gradients of the steps asked for, and the final parameters (rank 0; others None).
    """
    engine, tower, world = start(
        precision=precision, tiles_per_chunk=tiles_per_chunk, architecture=architecture, **options
    )
    out: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}}
    for number, step in enumerate(steps):
        table = table_of(step, world_size, tiles_per_chunk, architecture)
        total = sum(batch.num_trained_tokens for row in table for batch in row)
        loss_sum = 0.0
        for micro, row in enumerate(table):
            batch = row[rank]
            features = None
            if tower is not None:
                with torch.no_grad():
                    features = encode_tiles(tower, batch.tiles, DTYPES[precision], tiles_per_chunk=tiles_per_chunk)
            loss = zero.forward(engine, batch, features, last=micro == len(table) - 1)
            zero.backward(engine, loss, total)
            loss_sum += float(loss.detach())
        if number in gradients_of:
            from deepspeed.utils import safe_get_full_grad

            out["gradients"][number] = {
                name: safe_get_full_grad(p).float().view(full_shape(p)).clone() for name, p in engine.trainable()
            }
        out["norms"].append(zero.step(engine))
        out["losses"].append(dist.sum_over_ranks(world, [loss_sum], torch.float64)[0] / total)
    out["parameters"] = full_state(engine, world)["master"]
    if rank:
        out["parameters"] = out["gradients"] = None
    return out


def full_state(engine: zero.Engine, world: dist.World) -> dict[str, dict[str, torch.Tensor]]:
    """{key: {name: whole tensor}} put together from every rank's slices."""
    parts = dist.gather(world, zero.read_slices(engine))
    shapes = {name: full_shape(p) for name, p in engine.trainable()}
    return {
        key: {name: torch.cat([part[name][key] for part in parts]).view(shape) for name, shape in shapes.items()}
        for key in zero.STATE_KEYS
    }


def same_samples(
    *,
    rank: int,
    world_size: int,
    samples: list[tuple[int, int]],
    packs: int,
    steps: int,
    stage: int = 3,
    architecture: str = "nvlm_d",
) -> dict[str, Any]:
    """Trains on the very same samples, dealt into `packs` packs, so that different deals can be compared."""
    engine, tower, world = start(stage=stage, architecture=architecture)
    out: dict[str, Any] = {"losses": []}
    for number in range(steps):
        # each sample a pack of its own, then packs joined: content depends on the sample's number alone
        singles = [make_batch([s], 5000 * (number + 1) + i, architecture=architecture) for i, s in enumerate(samples)]
        joined = [join([singles[i] for i in range(p, len(samples), packs)]) for p in range(packs)]
        micro_steps = -(-packs // world_size)
        total = sum(batch.num_trained_tokens for batch in joined)
        loss_sum = 0.0
        for micro in range(micro_steps):
            pack = micro * world_size + rank
            batch = joined[pack] if pack < packs else null_batch(0, architecture)
            features = encode_tiles(tower, batch.tiles, torch.float32)
            loss = zero.forward(engine, batch, features, last=micro == micro_steps - 1)
            zero.backward(engine, loss, total)
            loss_sum += float(loss.detach())
        if number == 0:
            from deepspeed.utils import safe_get_full_grad

            out["gradients"] = {
                n: safe_get_full_grad(p).float().view(full_shape(p)).clone() for n, p in engine.trainable()
            }
        zero.step(engine)
        out["losses"].append(dist.sum_over_ranks(world, [loss_sum], torch.float64)[0] / total)
    return out


def join(batches: list[Batch]) -> Batch:
    """Several one-row batches as one row."""
    lengths = [int(n) for b in batches for n in (b.cu_seqlens[1:] - b.cu_seqlens[:-1])]
    slots, before = [], 0
    for b in batches:
        slots.append(torch.where(b.image_slots >= 0, b.image_slots + before, b.image_slots))
        before += len(b.tiles) * IMAGE_TOKENS
    return Batch(
        input_ids=torch.cat([b.input_ids for b in batches], 1),
        labels=torch.cat([b.labels for b in batches], 1),
        position_ids=torch.cat([b.position_ids for b in batches], 1),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        tiles=torch.cat([b.tiles for b in batches]),
        image_slots=torch.cat(slots, 1),
        num_trained_tokens=sum(b.num_trained_tokens for b in batches),
        memory=_join_memory(batches),
    )


def _join_memory(batches: list[Batch]) -> Memory | None:
    parts: dict[str, list[torch.Tensor]] = {}
    tokens = rows = image_tokens = 0
    counts: list[int] = []
    for b in batches:
        if b.memory is None:
            return None
        counts += [b.memory.max_queries, b.memory.max_rows]
        for name, value in (
            ("ids", b.memory.ids),
            ("slots", torch.where(b.memory.slots >= 0, b.memory.slots + image_tokens, b.memory.slots)),
            ("query_rows", b.memory.query_rows + tokens),
            ("queries", b.memory.cu_queries.diff()),
            ("rows", b.memory.rows + rows),
            ("lengths", b.memory.cu_rows.diff()),
        ):
            parts.setdefault(name, []).append(value)
        tokens += b.input_ids.numel()
        image_tokens += len(b.tiles) * IMAGE_TOKENS
        rows += len(b.memory.ids) or len(b.tiles) * IMAGE_TOKENS  # nvlm_x: all image tokens
        if len(b.memory.ids) == 0 and (b.image_slots >= 0).any():  # nvlm_h, an image of one tile
            rows -= len(b.tiles) * IMAGE_TOKENS
    joined = {name: torch.cat(value) for name, value in parts.items()}
    return Memory(
        ids=joined["ids"],
        slots=joined["slots"],
        query_rows=joined["query_rows"],
        cu_queries=torch.tensor([0, *joined["queries"].cumsum(0).tolist()], dtype=torch.int32),
        rows=joined["rows"],
        cu_rows=torch.tensor([0, *joined["lengths"].cumsum(0).tolist()], dtype=torch.int32),
        max_queries=max(counts[::2]),
        max_rows=max(counts[1::2]),
    )


def save_and_restore(
    *,
    rank: int,
    world_size: int,
    folder: str,
    stage: int,
    precision: str,
    restore_only: bool = False,
    implementation: str = "auto",
) -> dict[str, Any]:
    """Three steps, a checkpoint, three more; then the checkpoint into a fresh engine and the same three again."""
    run, out = Path(folder), {}
    samples = [(9, 1), (7, 0), (12, 2), (5, 0)]

    def train(engine: zero.Engine, tower: Any, world: dist.World, steps: range) -> list[float]:
        losses = []
        for number in steps:
            singles = [make_batch([s], 100 * number + i) for i, s in enumerate(samples)]
            total = sum(b.num_trained_tokens for b in singles)
            mine = singles[rank::world_size]
            loss_sum = 0.0
            for micro, batch in enumerate(mine):
                features = encode_tiles(tower, batch.tiles, DTYPES[precision])
                loss = zero.forward(engine, batch, features, last=micro == len(mine) - 1)
                zero.backward(engine, loss, total)
                loss_sum += float(loss.detach())
            zero.step(engine)
            losses.append(dist.sum_over_ranks(world, [loss_sum], torch.float64)[0] / total)
        return losses

    if not restore_only:
        engine, tower, world = start(stage=stage, precision=precision, implementation=implementation)
        train(engine, tower, world, range(3))
        shapes = {name: tuple(full_shape(p)) for name, p in engine.trainable()}
        checkpoint.save(
            run, 3, zero.read_slices(engine), shapes, {"adam_step": 3}, rank=rank, world_size=world_size,
            gather=lambda value: dist.gather(world, value),
        )  # fmt: skip
        out["uninterrupted"] = train(engine, tower, world, range(3, 6))
        out["state_uninterrupted"] = full_state(engine, world)
        states = engine.deepspeed.basic_optimizer.state.values()
        out["moments"] = {t.dtype for state in states for t in state.values() if isinstance(t, torch.Tensor)}
    engine, tower, world = start(stage=stage, precision=precision, seed=8, implementation=implementation)
    if tower is not None:  # the frozen tower comes from the base weights, not from the checkpoint
        tower = start(stage=0 if precision == "fp32" else 1, precision=precision)[1]
    opened = checkpoint.Checkpoint(run)
    zero.write_slices(engine, lambda n, k, b, e: opened.read_many({(n, k): (b, e)})[n, k], opened.state["adam_step"])
    out["resumed"] = train(engine, tower, world, range(3, 6))
    out["state_resumed"] = full_state(engine, world)
    return out
