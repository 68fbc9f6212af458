#!/usr/bin/env python
"""What an export takes: our exporter beside DeepSpeed's zero_to_fp32, each on its own checkpoint of the same weights.

    scripts/bench/export/bench_export.py [--gb 0.25 1] [--rounds 3] [--out FOLDER]

For each size a decoder is trained for a step under ZeRO-3 on two ranks in fp32 and saved in both formats: fp32 weights
of so many GB, and twice that of Adam moments beside them. Then each way is run once a round, in turn, in a process of
its own, to safetensors in fp32. Memory is the largest anonymous memory (RssAnon, read from outside every 5 ms) above
what the process had after its imports; mapped files are not in it, nobody has to have room for them.

ours                 `nvlm-train export --no-verify`: compares the checkpoint's checksums, fsyncs, hashes, finds NaN
ours, no checksums   the same without them
full                 get_fp32_state_dict_from_zero_checkpoint, then one file
lazy                 the same with lazy_mode=True, tensor by tensor, a file each
sharded              convert_zero_checkpoint_to_fp32_state_dict with shards of the same size as ours
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/export")]
SHARD = "100MB"
WAYS = ("ours", "ours, no checksums", "full", "lazy", "sharded")
VISION = dict(
    hidden_size=18, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=2
)
LARGEST = 8192 * 1024  # elements of embedding and head


def language_model(gb: float) -> dict[str, int]:
    """Layers of 11.8 M parameters, so that the largest tensor is the same in every size."""
    layers = max(1, round((gb * 1e9 / 4 - 2 * LARGEST) / 11.8e6))
    return dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=8192,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.25, 1.0], help="of fp32 weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result files")
    parser.add_argument("--make", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make is not None:
        make(args.folder, args.make)
    elif args.way is not None:
        convert(args.folder, args.way)
    else:
        compare(args)


# ------------------------------------------------------------------------------------------------------ the checkpoints


def make(folder: Path, gb: float) -> None:
    """On each rank: one step, then RUN and DeepSpeed's checkpoint in `folder`."""
    import torch
    from safetensors.torch import save_file

    from nvlm_train import checkpoint
    from nvlm_train.engine import dist
    from nvlm_train.engine import engine as zero
    from nvlm_train.engine.deepspeed_config import deepspeed_config
    from nvlm_train.engine.launch import resolve_launch
    from nvlm_train.engine.optim import build_optimizer, full_shape, parameter_groups
    from nvlm_train.model.nvlm import NvlmD, encode_tiles
    from nvlm_train.model.vision import InternVit
    from nvlm_train.recipe import schema
    from tiny import make_batch
    from tiny_nvlm import make_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = dist.start(resolve_launch(), timeout_s=1800)
    run = folder / "run"
    recipe = schema.Recipe.model_validate(
        {
            "run_name": "bench", "output_dir": str(run), "tokenizer": {"path": str(folder / "tokenizer")},
            "model": {"vision": VISION, "language_model": language_model(gb)},
            "data": {"mixture": {"a": {"path": "a", "license": "own"}}, "max_tokens_per_sample": 64, "pack_tokens": 64},
            "global_batch": {"samples": 8}, "max_steps": 1, "precision": "fp32", "optimizer": {"lr": 1e-4},
        }
    )  # fmt: skip
    tower = InternVit(recipe.model.vision).requires_grad_(False)
    settings = deepspeed_config(recipe)
    with zero.partitioned_at_birth(settings, world.device, torch.float32):
        model = NvlmD(recipe.model, with_vision=False)
    for parameter in model.parameters():  # made without values
        parameter.ds_tensor.normal_(std=0.02)  # type: ignore[attr-defined]
    rates = {"vision": 0.0, "projector": 1e-4, "language_model": 1e-4}
    groups = parameter_groups(model.named_parameters(), recipe.optimizer, rates)
    engine = zero.build(model, build_optimizer(groups, recipe.optimizer, "cpu"), settings, world)
    batch = make_batch([(4, 0)], seed=world.rank, vocab_size=recipe.model.language_model.vocab_size)
    loss = zero.forward(engine, batch, encode_tiles(tower, batch.tiles, torch.float32), last=True)
    zero.backward(engine, loss, batch.num_trained_tokens * world.world_size)
    zero.step(engine)

    shapes = {name: tuple(full_shape(parameter)) for name, parameter in engine.trainable()}
    checkpoint.save(
        run, 1, zero.read_slices(engine), shapes, {"recipe_hash": "bench"},
        rank=world.rank, world_size=world.world_size, gather=lambda value: dist.gather(world, value),
    )  # fmt: skip
    engine.deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="step_1")
    if world.rank == 0:
        make_tokenizer(folder / "tokenizer")
        frozen = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
        save_file(frozen, folder / "tower.safetensors")
        checkpoint.write_base(run, {name: f"{folder / 'tower.safetensors'}:{name}" for name in frozen})
        content = {"format": 1, "recipe": recipe.model_dump(mode="json"), "attempts": []}
        checkpoint.write_json(run / "recipe.json", content)
    dist.barrier(world)
    dist.stop(world)


# --------------------------------------------------------------------------------------------------------- one way each


def convert(folder: Path, way: str) -> None:
    """Imports, says so, waits for a line, works, says so."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    out = folder / "out"
    if way.startswith("ours"):
        from nvlm_train.checkpoint import open_checkpoint
        from nvlm_train.export import hf
        from nvlm_train.model import nvlm  # noqa: F401

        def work() -> None:
            opened = open_checkpoint(folder / "run", checksums=way == "ours")
            hf.export(opened, opened.recipe, out, dtype="fp32", max_shard_size=SHARD, identity=opened.identity)
    else:
        from deepspeed.utils import zero_to_fp32

        def work() -> None:
            given = str(folder / "deepspeed")
            out.mkdir()
            if way == "sharded":
                zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(
                    given, str(out), max_shard_size=SHARD, safe_serialization=True
                )
                return
            tensors = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(given, lazy_mode=way == "lazy")
            if way == "full":
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
                return
            for name in list(tensors):
                save_file({name: tensors[name].contiguous()}, out / f"{name}.safetensors")

    print("ready", file=answers, flush=True)
    sys.stdin.readline()
    work()
    print("done", file=answers, flush=True)
    sys.stdin.readline()


def measure(folder: Path, way: str) -> dict[str, float]:
    """Seconds, peak anonymous MB above the base, and the base."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--way", way, "--folder", str(folder)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    )
    assert child.stdin is not None and child.stdout is not None

    def until(word: str) -> None:
        for line in child.stdout or ():
            if line.strip() == word:
                return
        raise SystemExit(f"{way}: ended with {child.wait()}")

    until("ready")
    base = anonymous(child.pid)
    began = time.perf_counter()
    child.stdin.write("go\n")
    peak = base
    while not select.select([child.stdout], [], [], 0.005)[0]:
        peak = max(peak, anonymous(child.pid))
    until("done")
    seconds = time.perf_counter() - began
    child.stdin.write("end\n")
    child.wait()
    return {"seconds": seconds, "mb": (peak - base) / 1e6, "base_mb": base / 1e6}


def anonymous(pid: int) -> int:
    """Bytes of RssAnon."""
    with open(f"/proc/{pid}/status", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def tensors_of(folder: Path) -> dict[str, Any]:
    """{name: (file, slice opener)} of all safetensors files of a folder."""
    from safetensors import safe_open

    found = {}
    for file in folder.glob("*.safetensors"):
        opened = safe_open(file, framework="pt")
        found.update(dict.fromkeys(opened.keys(), opened))
    return found


def require_same(ours: Path, theirs: Path) -> int:
    """How many tensors of both are equal, bit for bit; the tower is in ours alone."""
    from nvlm_train.model import key_map

    mine, others = tensors_of(ours), tensors_of(theirs)
    for name, opened in others.items():
        published = key_map.to_published(name)
        if not opened.get_tensor(name).equal(mine[published].get_tensor(published)):
            raise SystemExit(f"{name} differs between {ours} and {theirs}")
    return len(others)


# ------------------------------------------------------------------------------------------------------------ the table


def compare(args: Any) -> None:
    parent = args.folder or Path(tempfile.mkdtemp())
    results: dict[str, Any] = {}
    for gb in args.gb:
        folder = parent / f"{gb:g}"
        folder.mkdir(parents=True, exist_ok=True)
        made = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*made, __file__, "--make", str(gb), "--folder", str(folder)], check=True)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(args.rounds):
            for way in WAYS:
                found[way].append(measure(folder, way))
                print(f"{gb:g} GB, round {number + 1}, {way}: {found[way][-1]}", file=sys.stderr, flush=True)
                if number == 0 and way in ("ours", "sharded"):
                    (folder / "out").rename(folder / f"first_{way}")
        same = require_same(folder / "first_ours", folder / "first_sharded")
        files = sum(file.stat().st_size for file in (folder / "run/step_1/weights").iterdir())
        results[f"{gb:g}"] = {"ways": found, "equal_tensors": same, "checkpoint_bytes": files}
        shutil.rmtree(folder)
    report(args, results)


def report(args: Any, results: dict[str, Any]) -> None:
    def median(gb: str, way: str, key: str) -> float:
        return statistics.median(found[key] for found in results[gb]["ways"][way])

    sizes = list(results)
    lines = [
        f"# Export, {date.today()}",
        "",
        f"Machine: 2 CPU cores shared with other work, no GPU, ext4 on a virtual disk; {platform.python_version()}. "
        f"Command: `scripts/bench/export/bench_export.py --gb {' '.join(sizes)} --rounds {args.rounds}`. "
        f"Load average {os.getloadavg()[0]:.0f}; medians of {args.rounds} round{'s' if args.rounds > 1 else ''}.",
        "",
        *(line.strip() for line in __doc__.split("\n\n", 2)[2].split("\n\n")[0].strip().splitlines()),
        "",
        f"The largest tensor is {4 * LARGEST / 1e6:.1f} MB, a shard {SHARD}. "
        + " ".join(
            f"At {gb} GB the checkpoint's files have {r['checkpoint_bytes'] / 1e9:.2f} GB; the {r['equal_tensors']} "
            "tensors of both exports are equal bit for bit."
            for gb, r in results.items()
        ),
        "",
        "| way | " + " | ".join(f"{gb} GB: peak MB | s" for gb in sizes) + " | base MB |",
        "|---|" + "---|" * (2 * len(sizes) + 1),
    ]
    for way in WAYS:
        cells = [f"{median(gb, way, 'mb'):.0f} | {median(gb, way, 'seconds'):.1f}" for gb in sizes]
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {median(sizes[-1], way, 'base_mb'):.0f} |")
    lines += ["", *(line for line in __doc__.strip().split("\n\n")[-1].splitlines())]
    print("\n".join(lines))
    if args.out is not None:
        name = args.out / f"{date.today()}_export"
        name.with_suffix(".md").write_text("\n".join(lines) + "\n")
        name.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
