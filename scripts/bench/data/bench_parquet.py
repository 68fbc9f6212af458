#!/usr/bin/env python
"""What a row of a parquet file costs in random order, by the size of its row groups, and in an order by groups.

    python scripts/bench/data/bench_parquet.py [--repeats 3] [--out scripts/bench/results]

1000 rows with a JPEG of about 0.5 MB each. To read one row its row group is read and decoded whole; decoded ones are
kept up to 256 MiB (`shuffle: rows`), or 1 GiB (`shuffle: shard_groups`, here 4 row groups in a group). CPU ms a sample
over the first 60 samples of an epoch, one process, file in the page cache; beside it the CPU ms that decoding such an
image and cutting it into tiles takes. All sizes in turn in each repeat; medians.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
ROWS, SAMPLES, PER_GROUP = 1000, 60, 4
SIZES = (10, 100, 500)


def jpeg(seed: int) -> bytes:
    """About 0.5 MB: a smooth picture with grain, 1280 x 960."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((1280, 960))
    pixels = (np.asarray(small) + draw.normal(0, 8, (960, 1280, 1))).clip(0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90)
    return data.getvalue()


def cost(path: Path, rows_in_group: int, shuffle: str) -> float:
    """CPU ms a sample, an epoch's first samples."""
    from nvlm_train.data.mixture import Mixture, Shards
    from nvlm_train.data.sources import open_source
    from nvlm_train.recipe import schema

    source: Any = open_source("s", schema.Source.model_validate({"kind": "hf", "path": str(path), "shuffle": shuffle}))
    shards = {"s": Shards(np.full(ROWS // rows_in_group, rows_in_group), PER_GROUP)} if shuffle != "rows" else None
    order = Mixture(0, {"s": ROWS}, {"s": 1.0}, None, shards).draws(0, SAMPLES).row.tolist()
    begin = time.process_time()
    for row in order:
        group, inside = divmod(row, rows_in_group)
        assert source._table(group).slice(inside, 1).to_pylist()
    return 1000 * (time.process_time() - begin) / SAMPLES


def decoding(images: list[bytes]) -> float:
    """CPU ms an image: decoding, and cutting into at most 6 tiles and a thumbnail."""
    from nvlm_train.data import tiling

    begin = time.process_time()
    for data in images:
        tiling.cut(Image.open(io.BytesIO(data)).convert("RGB"), 6, 448, True, False, None)
    return 1000 * (time.process_time() - begin) / len(images)


def main() -> None:
    """Runs everything; with --out writes DATE_parquet.json and .md there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import pyarrow
    import pyarrow.parquet

    images = [jpeg(seed) for seed in range(8)]
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        rows = [
            {
                "images": [{"bytes": images[k % 8] + k.to_bytes(8, "little"), "path": None}],
                "texts": [{"user": f"{k}?", "assistant": "yes"}],
            }
            for k in range(ROWS)
        ]
        table = pyarrow.Table.from_pylist(rows)
        for size in SIZES:
            pyarrow.parquet.write_table(table, Path(temporary) / f"{size}.parquet", row_group_size=size)
        del table, rows
        for _ in range(args.repeats):
            taken.setdefault("decoding", []).append(decoding(images))
            for size in SIZES:
                for shuffle in ("rows", "shard_groups"):
                    spent = cost(Path(temporary) / f"{size}.parquet", size, shuffle)
                    taken.setdefault(f"{size} {shuffle}", []).append(spent)
                    print(size, shuffle, round(spent, 1), file=sys.stderr, flush=True)
    medians = {name: round(statistics.median(one), 2) for name, one in taken.items()}
    result = {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; other work shared the machine",
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "image_bytes": round(statistics.mean(map(len, images))),
        "cpu_ms_a_sample": medians,
    }
    lines = [
        f"# Parquet, {result['date']}",
        "",
        f"Machine: {result['machine']} (load average {result['load_average'][0]} at the end). "
        f"Command: `python scripts/bench/data/bench_parquet.py --repeats {args.repeats}`.",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        f"Decoding and cutting: {medians['decoding']} ms an image of {result['image_bytes'] / 1e3:.0f} kB.",
        "",
        "| rows in a row group | shuffle: rows | shuffle: shard_groups |",
        "|---|---|---|",
        *(f"| {size} | {medians[f'{size} rows']} ms | {medians[f'{size} shard_groups']} ms |" for size in SIZES),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        (args.out / f"{result['date']}_parquet.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{result['date']}_parquet.md").write_text(text)


if __name__ == "__main__":
    main()
