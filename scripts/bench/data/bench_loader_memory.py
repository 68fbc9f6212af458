#!/usr/bin/env python
"""Whether memory grows while samples go by: resident memory of the trainer and of the loader process over 10^5 samples.

    python scripts/bench/data/bench_loader_memory.py [--samples 100000] [--out scripts/bench/results]

2000 rows, two thirds with one or two small images, again and again; every batch is dropped as soon as it is there. Both
ways of loading, one after the other, each in a process of its own. The first tenth is the warm-up; what is printed for
it is where memory stands after it. Counted are also the open descriptors and the mapped pieces of shared memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def resident_mib(pid: int) -> float:
    """Resident memory of a process, shared pages included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(where: str, samples: int, folder: Path) -> list[dict[str, Any]]:
    """Goes through the samples; a line for every tenth of them."""
    import corpus
    from nvlm_train.data.loader import StepLoader
    from nvlm_train.data.plan import open_data

    mixture = {
        "images": {"path": str(folder / "images.jsonl"), "weight": 2.0},
        "text": {"path": str(folder / "text.jsonl"), "weight": 1.0},
    }
    recipe = corpus.make_recipe(
        folder, mixture, data__loader=where, global_batch__samples=100, max_steps=samples // 100
    )
    steps = StepLoader(open_data(recipe, rank=0, world_size=1), start_step=0, end_step=samples // 100)
    lines = []
    begin = time.monotonic()
    seen = tiles = 0
    with steps:
        for data in steps:
            seen, tiles = seen + data.samples, tiles + data.tiles
            number, done = data.step + 1, samples // 100
            del data
            if number % (done // 10):
                continue
            gc.collect()
            line = {
                "samples": seen,
                "tiles": tiles,
                "seconds": round(time.monotonic() - begin, 1),
                "trainer_mib": round(resident_mib(os.getpid()), 1),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "shared_pieces": Path("/proc/self/maps").read_text().count("memfd:nvlm-tiles"),
            }
            if where == "process":
                pid: int = steps._builder.pid  # type: ignore[attr-defined]
                line["loader_mib"] = round(resident_mib(pid), 1)
                line["loader_descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
            print(json.dumps(line), file=sys.stderr, flush=True)
            lines.append(line)
    return lines


def main() -> None:
    """Both ways of loading; prints the lines and the growth after the first tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "data"))
    if args.watch:
        print(json.dumps(watch(args.watch[0], args.samples, Path(args.watch[1]))))
        return
    import corpus

    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; other work shared the machine",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus.write_image_rows(folder / "images.jsonl", 1300)
        corpus.write_text_rows(folder / "text.jsonl", 700)
        for where in ("inprocess", "process"):
            command = [sys.executable, __file__, "--samples", str(args.samples), "--watch", where, temporary]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines = json.loads(done.stdout)
            result[where] = {"lines": lines, "growth_mib_after_first_tenth": {}}
            for who in ("trainer_mib", "loader_mib"):
                if who in lines[0]:
                    growth = round(lines[-1][who] - lines[0][who], 1)
                    result[where]["growth_mib_after_first_tenth"][who.removesuffix("_mib")] = growth
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        (args.out / f"{result['date']}_loader_memory.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
