#!/usr/bin/env python
"""Packing compared: how full packs are, how well ranks are used, and what planning costs.

    python scripts/bench/data/bench_packing.py [--repeats 3] [--windows 4] [--out scripts/bench/results]

Samples are drawn from a model of a mixture, not from data: a share of text (log-normal lengths, median 400, 50 to 4000
tokens), the rest images of 1 to 7 tiles of 257 tokens with a short text (log-normal, median 150); with 35 % text the
mean is about 1190 tokens and 3.3 tiles. Accounting D counts image tokens in the decoder's sequence; X does not, and
then packs have a capacity in tiles as well, because tokens bound nothing.

Three ways of packing stand beside ours, written from their description, no line of theirs:
    sequential    samples in the order they come; a new pack when the next one does not fit
    best-fit      best-fit decreasing over the whole window (our `best_fit`); packs shuffled
    knapsack      as LLaMA-Factory (and Megatron's NVLM example) describe it: again and again, fill a pack with the
                  longest of the remaining samples that still fits; packs shuffled
They look at lengths alone; with a capacity in tiles, sequential opens a new pack, and the other two take the next
pack or sample that fits. Only their result counts there: their time is that of our way to look for it.

What a rank waits for, as in `packing.utilisation`: ranks meet after the tower and after the decoder of each micro-step,
so a micro-step takes the longest tower and then the longest decoder. Work: decoder 6 N tokens + 6 d L sum(length^2),
tower 3 x 12.4 TFLOP a tile (a decoder of 7.6 B parameters, d = 3584, L = 28, and the 6 B tower, both trained). Global
batches are 64 packs; ours deals them in the order of their cost, as training does; for the others both are given:
dealt as they come (what those tools do), and sorted by cost as ours.

All methods pack the same windows, one after the other in an order that turns with every repeat, in one process; time is
CPU time, its median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from nvlm_train.data.packing import Cost, Pack, balance, best_fit, by_cost, deal, fill_bins, work_and_time

WINDOW = 8192
GLOBAL_BATCH = 64
COST = Cost(per_token=6 * 7.6e9, per_square=6.0 * 3584 * 28, per_tile=3 * 1.24e13)
Bins = list[list[int]]


def draw(count: int, text_share: float, accounting: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, tiles) of `count` samples of the model."""
    chance = np.random.default_rng(seed)
    text = chance.random(count) < text_share
    tiles = np.where(text, 0, chance.choice([1, 3, 4, 5, 6, 7], count, p=[0.12, 0.13, 0.11, 0.15, 0.04, 0.45]))
    alone = np.clip(np.exp(chance.normal(np.log(400), 0.9, count)), 50, 4000).astype(np.int64)
    beside = np.clip(np.exp(chance.normal(np.log(150), 0.8, count)), 10, 2000).astype(np.int64)
    return np.where(text, alone, beside + (257 * tiles if accounting == "D" else 0)), tiles.astype(np.int64)


def sequential(tokens: np.ndarray, tiles: np.ndarray, capacity: int, tile_capacity: int | None) -> Bins:
    bins: Bins = [[]]
    used = held = 0
    for i, (length, count) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        if used + length > capacity or (tile_capacity is not None and held + count > tile_capacity):
            bins.append([])
            used = held = 0
        bins[-1].append(i)
        used, held = used + length, held + count
    return bins


def best_fit_decreasing(tokens: np.ndarray, tiles: np.ndarray, capacity: int, tile_capacity: int | None) -> Bins:
    if tile_capacity is None:
        return best_fit(tokens, capacity)
    # of the bins that the tokens fit, the fullest that the tiles fit too
    room: list[tuple[int, int]] = []
    free: list[int] = []
    bins: Bins = []
    for i in np.lexsort((np.arange(len(tokens)), -tokens)).tolist():
        need, count = int(tokens[i]), int(tiles[i])
        at = bisect_right(room, (need, -1))
        while at < len(room) and free[room[at][1]] < count:
            at += 1
        if at < len(room):
            left, b = room.pop(at)
        else:
            left, b = capacity, len(bins)
            bins.append([])
            free.append(tile_capacity)
        bins[b].append(i)
        free[b] -= count
        if free[b] > 0:  # a bin without room for a tile would be looked at for ever
            entry = (left - need, b)
            room.insert(bisect_right(room, entry), entry)
    return bins


def knapsack(tokens: np.ndarray, tiles: np.ndarray, capacity: int, tile_capacity: int | None) -> Bins:
    left = sorted((int(length), i) for i, length in enumerate(tokens))
    bins: Bins = []
    while left:
        held: list[int] = []
        room, tile_room = capacity, tile_capacity if tile_capacity is not None else 1 << 60
        while left:
            at = bisect_right(left, (room, len(tokens))) - 1
            while at >= 0 and tiles[left[at][1]] > tile_room:
                at -= 1
            if at < 0:
                break
            length, i = left.pop(at)
            held.append(i)
            room, tile_room = room - length, tile_room - int(tiles[i])
        bins.append(held)
    return bins


METHODS: dict[str, Callable[..., Bins]] = {
    "sequential": sequential,
    "best-fit": best_fit_decreasing,
    "knapsack": knapsack,
    "ours": fill_bins,
}


def packs_of(bins: Bins, tokens: np.ndarray, tiles: np.ndarray, shuffle: int | None) -> list[Pack]:
    """Packs in the order in which they are trained on; their samples do not matter here."""
    if shuffle is not None:
        bins = [bins[b] for b in np.random.default_rng(shuffle).permutation(len(bins)).tolist()]
    packs = []
    for held in bins:
        lengths = tokens[held].astype(np.float64)
        count = int(tiles[held].sum())
        price = COST.per_token * lengths.sum() + COST.per_square * (lengths**2).sum() + COST.per_tile * count
        packs.append(Pack((None,), int(lengths.sum()), count, float(price)))  # type: ignore[arg-type]
    return packs


def used(packs: list[Pack], ranks: int, by_falling_cost: bool) -> float:
    """Share of the time of `ranks` that is work, over whole global batches."""
    work = spent = 0.0
    for begin in range(0, len(packs) // GLOBAL_BATCH * GLOBAL_BATCH, GLOBAL_BATCH):
        batch = packs[begin : begin + GLOBAL_BATCH]
        done, time_ = work_and_time(deal(by_cost(batch) if by_falling_cost else batch, ranks, 1), COST)
        work, spent = work + done, spent + time_
    return work / spent


def imbalance(packs: list[Pack], ranks: int, by_falling_cost: bool) -> dict[str, float]:
    """Most of any rank by the mean of the ranks, of decoder work (tokens and attention) and of tiles, over whole global
    batches: 1 is even."""
    dealt = []
    for begin in range(0, len(packs) // GLOBAL_BATCH * GLOBAL_BATCH, GLOBAL_BATCH):
        batch = packs[begin : begin + GLOBAL_BATCH]
        dealt += deal(by_cost(batch) if by_falling_cost else batch, ranks, 1)
    found = balance(dealt, COST)
    return {"decoder": found.decoder, "tiles": found.tiles}


def measure(text_share: float, accounting: str, capacity: int, windows: int, repeats: int) -> dict[str, Any]:
    """Every method on the same windows."""
    data = [draw(WINDOW, text_share, accounting, seed) for seed in range(windows)]
    # X: as many tiles as a pack of D holds on average, so that both have the same work in the tower
    tile_capacity = None if accounting == "D" else capacity // 360
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    packs: dict[str, list[Pack]] = {}
    names = list(METHODS)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            spent, made = 0.0, []
            for seed, (tokens, tiles) in enumerate(data):
                begin = time.process_time()
                bins = METHODS[name](tokens, tiles, capacity, tile_capacity)
                spent += time.process_time() - begin
                assert sorted(i for held in bins for i in held) == list(range(WINDOW))
                made += packs_of(bins, tokens, tiles, None if name == "sequential" else seed)
            seconds[name].append(spent)
            packs[name] = made
    rows: dict[str, Any] = {}
    for name, made in packs.items():
        tokens_full = sum(p.tokens for p in made) / (len(made) * capacity)
        rows[name] = {
            "packs": len(made),
            "token_efficiency": tokens_full,
            "tile_efficiency": None
            if tile_capacity is None
            else sum(p.tiles for p in made) / (len(made) * tile_capacity),
            "utilisation": {
                order: {str(ranks): used(made, ranks, order == "by_cost") for ranks in (8, 64)}
                for order in ("as_they_come", "by_cost")
            },
            "imbalance": {
                order: {str(ranks): imbalance(made, ranks, order == "by_cost") for ranks in (8, 64)}
                for order in ("as_they_come", "by_cost")
            },
            "us_per_sample": statistics.median(seconds[name]) / (windows * WINDOW) * 1e6,
        }
        rows[name]["time_ratio_to_ours"] = statistics.median(
            a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)
        )
    return {
        "accounting": accounting,
        "text_share": text_share,
        "pack_tokens": capacity,
        "pack_tiles": tile_capacity,
        "mean_tokens": float(np.mean([t.mean() for t, _ in data])),
        "mean_tiles": float(np.mean([t.mean() for _, t in data])),
        "methods": rows,
    }


def markdown(results: list[dict[str, Any]], head: str) -> str:
    text = [
        head,
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        "Full: tokens by what packs could hold (X: tiles). Used: share of the ranks' time that is work, 8 / 64 ranks. "
        "Decoder, tiles: imbalance, most of any rank by the mean (1 is even), of the decoder's work with attention and "
        "of tiles, 8 / 64 ranks. "
        "Slower: time to plan, in times ours.",
    ]
    for found in results:
        tiles = "" if found["pack_tiles"] is None else f", at most {found['pack_tiles']} tiles"
        text += [
            "",
            f"## {found['accounting']}, {found['text_share']:.0%} text, packs of {found['pack_tokens']} tokens{tiles} "
            f"(mean sample {found['mean_tokens']:.0f} tokens, {found['mean_tiles']:.2f} tiles)",
            "",
            "| packing | full % | used %, as they come | used %, dealt by cost | decoder, as they come | "
            "decoder, by cost | tiles, as they come | tiles, by cost | us a sample | slower |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in found["methods"].items():
            full = row["token_efficiency"] if row["tile_efficiency"] is None else row["tile_efficiency"]
            one, other = row["utilisation"]["as_they_come"], row["utilisation"]["by_cost"]
            uneven = " | ".join(
                " / ".join(f"{row['imbalance'][order][ranks][unit]:.3f}" for ranks in ("8", "64"))
                for unit in ("decoder", "tiles")
                for order in ("as_they_come", "by_cost")
            )
            text.append(
                f"| {name} | {100 * full:.1f} | {100 * one['8']:.1f} / {100 * one['64']:.1f} | "
                f"{100 * other['8']:.1f} / {100 * other['64']:.1f} | {uneven} | {row['us_per_sample']:.1f} | "
                f"{row['time_ratio_to_ours']:.2f} |"
            )
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4, help="windows of 8192 samples")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results"))
    args = parser.parse_args()
    results = [
        measure(text_share, accounting, capacity, args.windows, args.repeats)
        for accounting in ("D", "X")
        for text_share in (0.35, 0.6)
        for capacity in (4096, 8192, 16384, 32768)
    ]
    today = date.today().isoformat()
    machine = f"{os.cpu_count()} CPU cores, no GPU"
    head = (
        f"# Packing, {today}\n\nMachine: {machine}; Python {platform.python_version()}, numpy {np.__version__}. "
        f"Command: `python scripts/bench/data/bench_packing.py --repeats {args.repeats} --windows {args.windows}`."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"{today}_packing"
    base.with_suffix(".md").write_text(markdown(results, head), encoding="utf-8")
    base.with_suffix(".json").write_text(
        json.dumps({"date": today, "machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    print(markdown(results, head))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
