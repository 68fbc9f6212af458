#!/usr/bin/env python
"""What a checkpoint costs: at once and beside the training, and to load.

    torchrun --standalone --nproc_per_node 2 scripts/bench/engine/bench_checkpoint.py [--rounds 5] [--out FOLDER]

A decoder under ZeRO-3 in fp32, text alone, through the Saver of a training. Each round does everything once, in turn:
steps without a save; a copy of this rank's state, as whole tensors, to memory that has been used before; a save beside
the training, with steps until it is committed; a save at once; a load into the same engine. Times are of the slowest
rank. A stall is how long the training stood still: copying, exchanging, committing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LANGUAGE_MODEL = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=8192,
)  # fmt: skip
VISION = dict(
    hidden_size=18, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=2
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each rank in a step")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result files")
    args = parser.parse_args()

    import torch

    from nvlm_train import checkpoint
    from nvlm_train.engine import dist
    from nvlm_train.engine import engine as zero
    from nvlm_train.engine.deepspeed_config import deepspeed_config
    from nvlm_train.engine.launch import resolve_launch
    from nvlm_train.engine.optim import build_optimizer, parameter_groups
    from nvlm_train.model.nvlm import NvlmD, encode_tiles
    from nvlm_train.model.vision import InternVit
    from nvlm_train.recipe import schema
    from nvlm_train.train import state
    from nvlm_train.train.saving import Saver
    from tiny import make_batch

    torch.set_num_threads(1)
    world = dist.start(resolve_launch(), timeout_s=600)
    folder = dist.gather(world, args.folder or (tempfile.mkdtemp() if world.rank == 0 else None))[0]
    run = Path(folder) / "run"

    def recipe(asynchronous: bool) -> schema.Recipe:
        return schema.Recipe.model_validate(
            {
                "run_name": "bench", "output_dir": str(run), "tokenizer": {"path": "none"},
                "model": {"vision": VISION, "language_model": LANGUAGE_MODEL},
                "data": {"mixture": {"a": {"path": "a"}}, "max_tokens_per_sample": 64, "pack_tokens": 64},
                "global_batch": {"samples": 8}, "max_steps": 1, "precision": "fp32", "optimizer": {"lr": 1e-4},
                "checkpoint": {"asynchronous": asynchronous, "keep_last": 1},
            }
        )  # fmt: skip

    model_config = recipe(False).model
    tower = InternVit(model_config.vision).requires_grad_(False)
    settings = deepspeed_config(recipe(False))
    with zero.partitioned_at_birth(settings, world.device, torch.float32):
        model = NvlmD(model_config, with_vision=False)
    for parameter in model.parameters():  # made without values
        parameter.ds_tensor.normal_(std=0.02)  # type: ignore[attr-defined]
    groups = parameter_groups(
        model.named_parameters(), recipe(False).optimizer, {"vision": 0.0, "projector": 1e-4, "language_model": 1e-4}
    )
    engine = zero.build(model, build_optimizer(groups, recipe(False).optimizer, "cpu"), settings, world)
    built: Any = SimpleNamespace(engine=engine, groups=groups)
    resolved: Any = SimpleNamespace(recipe_hash="bench", recipe=recipe(False))
    said: list[str] = []
    savers = {kind: Saver(built, run, recipe(kind), resolved, said.append, lambda: None) for kind in (True, False)}
    progress = state.Progress()

    def slowest(seconds: float) -> float:
        return max(dist.gather(world, seconds))

    def timed(work: Callable[[], Any], cpu: list[float] | None = None) -> float:
        """Seconds of the slowest rank; `cpu` gets the processor seconds of its calling thread added."""
        dist.barrier(world)
        began, worked = time.perf_counter(), time.thread_time()
        work()
        seconds, worked = time.perf_counter() - began, time.thread_time() - worked
        if cpu is not None:
            cpu.append(slowest(worked))
        return slowest(seconds)

    batch = make_batch([(args.tokens, 0)], seed=world.rank, vocab_size=LANGUAGE_MODEL["vocab_size"])
    features = encode_tiles(tower, batch.tiles, torch.float32)

    def step() -> None:
        loss = zero.forward(engine, batch, features, last=True)
        zero.backward(engine, loss, batch.num_trained_tokens * world.world_size)
        zero.step(engine)
        progress.step += 1

    def save(saver: Saver) -> None:
        saver.save_if_due(
            progress, lambda step: {"fingerprint": "bench"}, asked=True, best=False, final=saver is savers[False]
        )

    def copy() -> None:
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    def load() -> None:
        opened = checkpoint.Checkpoint(run)
        opened.verify_checksums(world.rank, world.world_size)
        zero.write_slices(
            engine, lambda n, k, b, e: opened.read_many({(n, k): (b, e)})[n, k], opened.state["adam_step"]
        )

    for _ in range(2):
        step()
    save(savers[False])  # DeepSpeed's and torch's first-time work
    parameters = sum(torch.Size(shape).numel() for shape in savers[True]._shapes.values())
    flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    moments = [engine.deepspeed.basic_optimizer.state[flat][key] for flat in flats for key in zero.STATE_KEYS[1:]]
    sources = [*flats, *moments]
    targets = [torch.zeros_like(source) for source in sources]
    rounds: list[dict[str, Any]] = []
    saver = savers[True]
    for _ in range(args.rounds):
        copy_cpu: list[float] = []
        stall_cpu: list[float] = []
        found: dict[str, Any] = {"steps": [timed(step) for _ in range(2)]}
        found["copy"] = timed(copy, copy_cpu)
        begun = time.perf_counter()
        found["begin"] = timed(lambda: save(saver), stall_cpu)
        found["steps_beside"], found["commit"] = [], 0.0
        while saver._save is not None:
            found["steps_beside"].append(timed(step))
            votes = dist.sum_over_ranks(world, saver.votes(), torch.float64)
            found["commit"] += timed(functools.partial(saver.agree, votes), stall_cpu)
        found["beside"] = slowest(time.perf_counter() - begun)
        step()
        found["at_once"] = timed(lambda: save(savers[False]))
        found["load"] = timed(load)
        found["copy_cpu"], found["stall_cpu"] = sum(copy_cpu), sum(stall_cpu)
        rounds.append(found)
        if world.rank == 0:  # after every round: on a busy machine the next one may take long
            stored = sum(entry["bytes"] for entry in checkpoint.Checkpoint(run).state["files"].values())
            report(args, rounds, parameters, stored, world.world_size)
    if world.rank == 0 and args.folder is None:
        shutil.rmtree(folder)
    dist.stop(world)


def report(args: Any, rounds: list[dict[str, Any]], parameters: int, stored: int, world_size: int) -> None:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    ratios = {
        "stall / copy": [(r["begin"] + r["commit"]) / r["copy"] for r in rounds],
        "stall / copy, processor time of the training's thread": [r["stall_cpu"] / r["copy_cpu"] for r in rounds],
        "stall to begin / copy": [r["begin"] / r["copy"] for r in rounds],
        "stall beside / at once": [(r["begin"] + r["commit"]) / r["at_once"] for r in rounds],
        "step beside a save / step without": [
            median(r["steps_beside"]) / median(r["steps"]) for r in rounds if r["steps_beside"]
        ],
    }
    seconds = {
        "a copy of the state in memory": [r["copy"] for r in rounds],
        "beside the training: stall to begin": [r["begin"] for r in rounds],
        "beside the training: stalls to commit": [r["commit"] for r in rounds],
        "beside the training: until it is committed": [r["beside"] for r in rounds],
        "save at once": [r["at_once"] for r in rounds],
        "load, with checksums": [r["load"] for r in rounds],
        "step without a save": [median(r["steps"]) for r in rounds],
        "step beside a save": [median(r["steps_beside"]) for r in rounds if r["steps_beside"]],
    }
    lines = [
        f"# Checkpoints, {date.today()}",
        "",
        f"Machine: 2 CPU cores shared with other work, no GPU, ext4 on a virtual disk; {platform.python_version()}. "
        f"Command: `torchrun --standalone --nproc_per_node {world_size} scripts/bench/engine/bench_checkpoint.py "
        f"--rounds {args.rounds} --tokens {args.tokens}`. {len(rounds)} rounds; load average {os.getloadavg()[0]:.0f}.",
        "",
        *(line.strip() for line in __doc__.split("\n\n", 2)[2].strip().splitlines()),
        "",
        f"{parameters:,} trained parameters on {world_size} ranks; a checkpoint takes {stored:,} bytes, "
        f"{stored / parameters:.2f} a parameter; frozen ones take none.",
        "",
        "| seconds | median | least | most |",
        "|---|---|---|---|",
        *(f"| {name} | {median(v):.3f} | {min(v):.3f} | {max(v):.3f} |" for name, v in seconds.items()),
        "",
        "| ratio, of each round | median | least | most |",
        "|---|---|---|---|",
        *(f"| {name} | {median(v):.2f} | {min(v):.2f} | {max(v):.2f} |" for name, v in ratios.items()),
    ]
    print("\n".join(lines))
    if args.out is not None:
        name = args.out / f"{date.today()}_checkpoint"
        name.with_suffix(".md").write_text("\n".join(lines) + "\n")
        content = {"parameters": parameters, "bytes": stored, "world_size": world_size, "rounds": rounds}
        name.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
