#!/usr/bin/env python
"""Loading published weights into ZeRO-3's partitions: time, bytes read and anonymous memory of each rank.

    python scripts/bench/engine/bench_loading.py [--layers 10] [--out scripts/bench/results]

Two ranks on this machine, each in a process of its own: our loading (`train.state.build`, every rank reads its slices),
and transformers' `from_pretrained` under `HfDeepSpeedConfig` of the same decoder, which reads and hands out whole
tensors. Both variants by turns. Files are in the page cache after the first of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]


def ours(folder: Path, sizes: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train.state.build` up to the engine."""
    from loading_jobs import load

    return load(rank=rank, world_size=2, recipe=json.loads((folder / "recipe.json").read_text()))


def transformers(folder: Path, sizes: dict[str, Any], rank: int) -> dict[str, Any]:
    """`from_pretrained` under `HfDeepSpeedConfig`, the decoder alone."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from loading_jobs import PeakOfAnonymous
    from nvlm_train.engine import dist
    from nvlm_train.engine.launch import resolve_launch

    dist.start(resolve_launch(), timeout_s=600)
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3},
    }  # fmt: skip
    kept = HfDeepSpeedConfig(config)  # transformers looks for it while it loads
    began = time.monotonic()
    with PeakOfAnonymous() as memory:
        model = AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.bfloat16)
        seconds = time.monotonic() - began
    assert kept is not None
    return {"seconds": seconds, "growth": memory.growth, "share": sum(p.ds_tensor.nbytes for p in model.parameters())}


VARIANTS = {"ours": ours, "transformers": transformers}


def run(variant: str, folder: Path) -> list[dict[str, Any]]:
    """Both ranks' figures."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(2):
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environ = os.environ | {key: str(value) for key, value in values.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--variant", variant, "--folder", str(folder)]
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{variant} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        found = VARIANTS[args.variant](args.folder, {}, int(os.environ["RANK"]))
        print(json.dumps(found))
        return 0
    from test_loading import _recipe

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = _recipe(folder, 1024, args.layers, 24000)
        (folder / "recipe.json").write_text(json.dumps(recipe))
        results: dict[str, list[Any]] = {name: [] for name in VARIANTS}
        for _ in range(args.repeats):
            for name in VARIANTS:
                results[name].append(run(name, folder))
                print(name, results[name][-1], flush=True)
    summary = {
        "date": str(date.today()),
        "machine": "2 CPU cores, no GPU; other work shared the machine",
        "command": f"python scripts/bench/engine/bench_loading.py --layers {args.layers} --repeats {args.repeats}",
        "results": results,
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{date.today()}_loading.json").write_text(json.dumps(summary, indent=1) + "\n")
        (args.out / f"{date.today()}_loading.md").write_text(_markdown(summary))
    print(_markdown(summary))
    return 0


def _markdown(summary: dict[str, Any]) -> str:
    lines = [
        "# Loading into ZeRO-3's partitions, 2 ranks",
        "",
        f"{summary['date']}, {summary['machine']}. `{summary['command']}`",
        "",
        "| | seconds, best and worst | most anonymous memory of a rank above its start, MB | a rank's share, MB "
        "| read from storage, MB (rank 0, rank 1) |",
        "|---|---|---|---|---|",
    ]
    for name, runs in summary["results"].items():
        seconds = [max(rank["seconds"] for rank in ranks) for ranks in runs]
        growth = max(rank["growth"] for ranks in runs for rank in ranks) / 1e6
        share = max(rank["share"] for ranks in runs for rank in ranks) / 1e6
        read = ", ".join(f"{rank['bytes_read'] / 1e6:.0f}" for rank in runs[0]) if "bytes_read" in runs[0][0] else "–"
        lines.append(f"| {name} | {min(seconds):.1f}, {max(seconds):.1f} | {growth:.0f} | {share:.0f} | {read} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
