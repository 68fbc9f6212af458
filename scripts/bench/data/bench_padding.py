#!/usr/bin/env python
"""What a trained token costs the decoder when samples are packed, and when they are padded: measured, in miniature.

    python scripts/bench/data/bench_padding.py [--samples 256] [--repeats 3] [--out scripts/bench/results]

Forward and backward of a small decoder (hidden 192, 2 layers) over the same samples, put together in different ways;
CPU time by trained tokens, on one thread. Samples are drawn from the model of a mixture in bench_packing.py (35 % text,
image tokens in the sequence), all lengths divided by 8 so that it ends in a minute: packs of 2048 stand for 16,384 and
rows of 512 for 4096. The last 40 % of a sample's text are trained, at least one token. The same work is asked of each
way: every sample once. Ours: packs of `fill_bins`, attention inside each sample. Padding: rows of one sample, filled up
to the longest of 4 or 8 in the order they come, or to 512 as pipelines of fixed length do; a filled row is attended to
as a whole, as there. Each repeat runs all ways, in another order; ratios are those of one repeat, their median.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[3]
PACK, LONGEST = 2048, 512
Row = list[tuple[int, int]]  # (tokens, trained) of each sample of a row


def samples_of(count: int) -> list[tuple[int, int, int]]:
    """(tokens, tiles, trained) of samples, lengths divided by 8."""
    from bench_packing import draw

    tokens, tiles = draw(count, 0.35, "D", 0)
    short = np.clip(tokens // 8, 4, LONGEST)
    trained = np.maximum(1, 0.4 * (tokens - 257 * tiles) / 8).astype(np.int64)
    return list(zip(short.tolist(), tiles.tolist(), np.minimum(trained, short - 1).tolist(), strict=True))


def run(model: Any, batches: list[tuple[list[Row], int]], padded: bool) -> tuple[float, int, int]:
    """(CPU seconds, trained tokens, positions) of forward and backward over batches of (rows, width)."""
    from nvlm_train.batch import IGNORE_INDEX

    trained = positions = 0
    begin = time.process_time()
    for rows, width in batches:
        ids = torch.randint(0, 500, (len(rows), width))  # [B, S]
        labels = torch.full_like(ids, IGNORE_INDEX)  # [B, S]
        places = torch.zeros_like(ids)  # [B, S]
        bounds = [0]
        for b, row in enumerate(rows):
            at = 0
            for tokens, held in row:
                end = width if padded else at + tokens
                places[b, at:end] = torch.arange(end - at)
                labels[b, at + tokens - held : at + tokens] = 7
                bounds.append(b * width + end)
                trained, at = trained + held, end
            if at < width:
                bounds.append((b + 1) * width)
        lengths = torch.tensor(bounds, dtype=torch.int32)
        x = model.model.embed_tokens(ids)  # [B, S, D]
        hidden = model.model(x, places, lengths, int(lengths.diff().max()))  # [B, S, D]
        model.lm_head(hidden, labels).backward()
        positions += ids.numel()
    return time.process_time() - begin, trained, positions


def main() -> None:
    """Runs everything; with --out writes DATE_padding.json and .md there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    torch.set_num_threads(1)
    from nvlm_train.data.packing import fill_bins
    from nvlm_train.model.decoder import LanguageModel
    from nvlm_train.recipe import schema

    sizes = dict(
        hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=4096,
    )  # fmt: skip
    model = LanguageModel(schema.LanguageModel.model_validate(sizes))
    drawn = samples_of(args.samples)
    rows: list[Row] = [[(tokens, held)] for tokens, _, held in drawn]
    ways: dict[str, list[tuple[list[Row], int]]] = {}
    bins = fill_bins(np.array([one[0] for one in drawn]), np.array([one[1] for one in drawn]), PACK, None)
    ways["packs"] = [([[(drawn[i][0], drawn[i][2]) for i in held]], PACK) for held in bins]
    for at_once in (4, 8):
        pieces = [rows[k : k + at_once] for k in range(0, len(rows), at_once)]
        ways[f"padded to the longest of {at_once}"] = [(piece, max(row[0][0] for row in piece)) for piece in pieces]
    ways["padded to the longest allowed"] = [(rows[k : k + 4], LONGEST) for k in range(0, len(rows), 4)]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, float] = {}
    run(model, ways["packs"][:1], False)  # warm-up
    for repeat in range(args.repeats):
        for name in random.Random(repeat).sample(list(ways), len(ways)):
            spent, trained, positions = run(model, ways[name], name != "packs")
            taken[name].append(1e6 * spent / trained)
            counts[name] = positions / trained
            print(repeat, name, round(taken[name][-1], 1), file=sys.stderr, flush=True)
    table = {
        name: {
            "cpu_us_a_trained_token": round(statistics.median(one), 1),
            "times_packs": round(statistics.median(a / b for a, b in zip(one, taken["packs"], strict=True)), 2),
            "positions_a_trained_token": round(counts[name], 2),
        }
        for name, one in taken.items()
    }
    result = {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; other work shared the machine",
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "mean_tokens": round(statistics.mean(one[0] for one in drawn), 1),
        "ways": table,
    }
    lines = [
        f"# Packs against padding, {result['date']}",
        "",
        f"Machine: {result['machine']} (load average {result['load_average'][0]} at the end). Command: "
        f"`python scripts/bench/data/bench_padding.py --samples {args.samples} --repeats {args.repeats}`.",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        "| samples put together as | CPU us a trained token | times packs | positions a trained token |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(str(value) for value in row.values())} |" for name, row in table.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        (args.out / f"{result['date']}_padding.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{result['date']}_padding.md").write_text(text)


if __name__ == "__main__":
    main()
