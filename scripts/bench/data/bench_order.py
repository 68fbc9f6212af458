#!/usr/bin/env python
"""The order of data: finding a place in it, what an index costs to build and to hold, and the same asked of a peer.

    python scripts/bench/data/bench_order.py [--rows 10000000] [--repeats 5] [--tokenizer DIR] [--out DIR]

Seek: from a plan that has seen nothing to the packs of a step, at position 0 and at position 10^9, over an index of
--rows samples; steps of 64 samples, and steps of 16 packs, whose table of windows is there (filled with the count of
its first window: counting 122,071 windows takes some core-minutes, once). CPU time; the two positions in turn.

Memory: two processes at once, each a rank's plan over the same index, after some steps. Private: what a process has
alone (smaps_rollup, Private_Clean + Private_Dirty). `shared`: numbers of rows mapped from the index folder, as the
package does it; `copies`: each process finds its own, as it did before. A tenth of a per cent is held out.

Index: one process over text rows of some hundred tokens, and over rows with a picture of its own; CPU time.

Peer: datasets' `interleave_datasets` (streaming, 60 : 40, two files a source, shuffle buffer 1000), stopped after
half of its rows and continued with its own state_dict, against our order over the same rows, continued from the
position. Time: CPU, from the state to the first row. Doubled: of as many draws of a source as it has rows, those that
came before (as many others are missing). By ranks: share of the first 2000 rows of one process that two processes,
by `split_dataset_by_node`, have among their first 2000.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
FAR = 10**9
LINES = 1000


def _recipe(folder: Path, **changes: Any) -> Any:
    import corpus

    mixture = {"text": {"path": str(folder / "text.jsonl")}}
    given = dict(data__index_dir=str(folder / "index"), validation__held_out_share=0.001, validation__every_steps=10**9)
    length: dict[str, Any] = dict(global_batch={"samples": 64}, max_steps=2 * FAR // 64)
    return corpus.make_recipe(folder, mixture, **{**given, **length, **changes})


def write_index(folder: Path, rows: int) -> None:
    """A source of 1000 lines whose index says that they come again and again: `rows` samples of random lengths."""
    import corpus
    from nvlm_train.data import index
    from nvlm_train.data.sources import open_source
    from nvlm_train.data.tokenizer import load_tokenizer

    corpus.write_text_rows(folder / "text.jsonl", LINES)
    recipe = _recipe(folder)
    settings = index.IndexSettings.of(recipe, load_tokenizer(recipe.tokenizer.path))
    source = open_source("text", recipe.data.mixture["text"])
    real = index.open_index(source, settings, folder / "index", max_bad_share=0, rank=0)
    place = folder / "index" / f"text-{real.key}"
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps({**meta, "num_rows": rows, "num_lines": rows}))
    whole = np.lib.format.open_memmap(place / "new.npy", mode="w+", dtype=index.ROW, shape=(rows,))
    draw = np.random.default_rng(0)
    for begin in range(0, rows, LINES * 1000):
        piece = np.tile(np.asarray(real.rows), 1000)[: rows - begin]
        piece["tokens"] = draw.integers(20, 120, len(piece))
        piece["hash"] = draw.integers(0, 2**32, len(piece), dtype=np.uint32)
        whole[begin : begin + len(piece)] = piece
    whole.flush()
    os.replace(place / "new.npy", place / "rows.npy")


# ---------------------------------------------------------------------------------------------------------------- seek


def seek(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds from a plan to the packs of a step; a fresh order for each, the index opened before."""
    from dataclasses import replace

    from nvlm_train.data.mixture import Mixture

    found: dict[str, dict[str, float]] = {}
    by_packs = {"global_batch": {"packs": 16}, "max_steps": FAR * 90 // 256 // 16}
    for unit, changes in (("samples", {}), ("packs", by_packs)):
        plan, packs = _plan_with_table(folder, changes)
        far = FAR // 64 if unit == "samples" else int(FAR / plan.windows.size * packs / 16) - 1
        taken: dict[int, list[float]] = {0: [], far: []}
        sizes = dict(zip(plan.mixture.names, plan.mixture.sizes, strict=True))
        for _ in range(repeats):
            for step in taken:
                begin = time.process_time()
                mixture = Mixture(plan.mixture.seed, sizes, {"text": 1.0})
                order = replace(plan.windows, mixture=mixture, _planned={})
                assert replace(plan, mixture=mixture, windows=order, _dealt={}).deal_step(step)
                taken[step].append(1000 * (time.process_time() - begin))
        found[f"steps of {unit}"] = {
            "position 0, ms": round(statistics.median(taken[0]), 1),
            "position 10^9, ms": round(statistics.median(taken[far]), 1),
        }
    return found


def _plan_with_table(folder: Path, changes: dict[str, Any]) -> tuple[Any, int]:
    """A plan, and the packs of its first window, which its table says of all."""
    from nvlm_train.data import windows as module
    from nvlm_train.data.plan import open_data
    from nvlm_train.data.windows import Windows

    module._MOST_PROCESSES = 1  # others would really count
    count, known = Windows.count, []

    def counted(self: Windows, window: int) -> tuple[int, int]:
        known[:] = known or [count(self, 0)]
        return known[0]

    Windows.count = counted  # type: ignore[method-assign]
    try:
        return open_data(_recipe(folder, **changes), rank=0, world_size=8), known[0][0] if known else 0
    finally:
        Windows.count = count  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------------------- memory


def worker(folder: Path, way: str, rank: int) -> None:
    """A rank's plan; says what it holds once the other one stands there as well."""
    from nvlm_train.data import index
    from nvlm_train.data.plan import open_data

    if way == "copies":
        index._SHARED_ROWS = 1 << 62
    plan = open_data(_recipe(folder), rank=rank, world_size=2)
    for step in range(20):
        plan.deal_step(step * 1000)
    print("ready", flush=True)
    sys.stdin.readline()
    held = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        held[name.rstrip(":")] = int(value) / 1024
    print(json.dumps({"private": held["Private_Clean"] + held["Private_Dirty"], "resident": held["Rss"]}), flush=True)
    sys.stdin.readline()


def memory(folder: Path, way: str) -> dict[str, float]:
    """MiB of a worker, mean of two that run at once."""
    command = [sys.executable, __file__, "--worker", str(folder), way]
    workers = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for one in workers:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    found = []
    for one in workers:
        assert one.stdin is not None and one.stdout is not None
        one.stdin.write("\n")
        one.stdin.flush()
        found.append(json.loads(one.stdout.readline()))
    for one in workers:
        one.communicate("\n")
    return {name: round(statistics.mean(one[name] for one in found), 1) for name in found[0]}


# --------------------------------------------------------------------------------------------------------------- index


def index_rate(folder: Path, tokenizer: str | None) -> dict[str, Any]:
    """Samples and tokens a core-second."""
    import corpus
    from nvlm_train.data import index
    from nvlm_train.data.sources import open_source
    from nvlm_train.data.tokenizer import load_tokenizer

    words = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if "<" not in word]
    rows = [
        {"messages": corpus.turns(f"{k} " + " ".join(words[k : k + 60]), " ".join(words[k + 60 : k + 190]))}
        for k in range(1500)
    ]
    corpus.write_rows(folder / "long.jsonl", rows)
    for k in range(300):
        corpus.write_image(folder / "pictures" / f"{k}.png", 40, 30, k)
    pictures = [
        {"images": [f"pictures/{k % 300}.png"], "messages": corpus.turns(f"{k} what", "yes")} for k in range(3000)
    ]
    corpus.write_rows(folder / "pictures.jsonl", pictures)
    found = {}
    for name in ("long", "pictures"):
        recipe = corpus.make_recipe(
            folder, {name: {"path": str(folder / f"{name}.jsonl")}}, data__max_tokens_per_sample=4096,
            data__pack_tokens=4096, model__language_model__max_position_embeddings=4096,
            **({"tokenizer__path": tokenizer} if tokenizer else {}),
        )  # fmt: skip
        settings = index.IndexSettings.of(recipe, load_tokenizer(recipe.tokenizer.path))
        source = open_source(name, recipe.data.mixture[name])
        begin = time.process_time()
        built = index.open_index(source, settings, folder / "rates", max_bad_share=0, rank=0, num_workers=1)
        spent = time.process_time() - begin
        found[name] = {
            "samples": len(built.rows),
            "tokens a sample": round(float(built.rows["tokens"].mean()), 1),
            "samples a core-second": round(len(built.rows) / spent),
            "tokens a core-second": round(float(built.rows["tokens"].sum()) / spent),
        }
    return found


# ---------------------------------------------------------------------------------------------------------------- peer


def peer(folder: Path, repeats: int, rows: int = 20_000) -> dict[str, Any]:
    """The same rows through datasets and through our order."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    from nvlm_train.data.mixture import Mixture

    sizes = {"a": rows, "b": rows}
    for name in sizes:
        for part in range(2):
            text = "".join(f'{{"id": "{name}{k}"}}\n' for k in range(part, rows, 2))
            (folder / f"peer_{name}_{part}.jsonl").write_text(text)

    def stream(rank: int = 0, world: int = 1) -> Any:
        parts = []
        for name in sizes:
            files = [str(folder / f"peer_{name}_{part}.jsonl") for part in range(2)]
            data = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
            parts.append(data.shuffle(seed=7, buffer_size=1000))
        mixed = datasets.interleave_datasets(parts, probabilities=[0.6, 0.4], seed=7, stopping_strategy="all_exhausted")
        return mixed if world == 1 else split_dataset_by_node(mixed, rank, world)

    def ours() -> Mixture:
        return Mixture(7, sizes, {"a": 0.6, "b": 0.4})

    half = rows // 2
    whole = stream()
    first = []
    for row in whole:
        first.append(row["id"])
        if len(first) == half:
            break
    state = whole.state_dict()
    seconds: dict[str, list[float]] = {"datasets": [], "ours": []}
    for _ in range(repeats):
        begin = time.process_time()
        again = stream()
        again.load_state_dict(state)
        rest = iter(again)
        head = next(rest)["id"]
        seconds["datasets"].append(time.process_time() - begin)
        begin = time.process_time()
        ours().draws(half, half + 1)
        seconds["ours"].append(time.process_time() - begin)
    drawn_a = [name for name in [*first, head] if name[0] == "a"]
    for row in rest:
        if row["id"][0] == "a":
            drawn_a.append(row["id"])
        if len(drawn_a) == rows:
            break
    one, two = stream(), [stream(rank, 2) for rank in range(2)]
    alone = {row["id"] for row, _ in zip(one, range(2000), strict=False)}
    together = {row["id"] for part in two for row, _ in zip(part, range(1000), strict=False)}
    continued = [ours().draws(0, half), ours().draws(half, 2 * rows)]
    a = np.concatenate([part.row[part.source == 0] for part in continued])[:rows]
    return {
        "rows a source": rows,
        "stopped after": half,
        "datasets": {
            "version": datasets.__version__,
            "seek ms": round(1000 * statistics.median(seconds["datasets"]), 1),
            "draws of a": len(drawn_a),
            "doubled": len(drawn_a) - len(set(drawn_a)),
            "by ranks": round(len(alone & together) / len(alone), 3),
        },
        "ours": {
            "seek ms": round(1000 * statistics.median(seconds["ours"]), 2),
            "draws of a": len(a),
            "doubled": len(a) - len(np.unique(a)),
            "by ranks": None,  # a test's matter: test_same_global_batches_on_any_ranks_from_any_start_through_any_kills
        },
        "seek, times ours": round(
            statistics.median(d / o for d, o in zip(seconds["datasets"], seconds["ours"], strict=True)), 1
        ),
    }


# ---------------------------------------------------------------------------------------------------------------- main


def _report(result: dict[str, Any], command: str) -> str:
    lines = [
        f"# The order of data, {result['date']}",
        "",
        f"Machine: {result['machine']} (load average {result['load_average'][0]} at the end). Command: `{command}`.",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        f"| seek over {result['rows']:,} samples | position 0 | position 10^9 |",
        "|---|---|---|",
    ]
    for name, row in result["seek"].items():
        lines.append(f"| {name} | {row['position 0, ms']} ms | {row['position 10^9, ms']} ms |")
    lines += ["", "| samples | private, shared | private, copies | resident, shared |", "|---|---|---|---|"]
    for rows, row in result["memory_mib"].items():
        cells = (row["shared"]["private"], row["copies"]["private"], row["shared"]["resident"])
        lines.append(f"| {int(rows):,} | {' | '.join(f'{cell} MiB' for cell in cells)} |")
    lines += ["", "| index of | tokens a sample | samples a core-second | tokens a core-second |", "|---|---|---|---|"]
    for name, row in result["index"].items():
        what = {"long": "text", "pictures": "rows with a picture"}[name]
        rates = f"{row['samples a core-second']:,} | {row['tokens a core-second']:,}"
        lines.append(f"| {what} | {row['tokens a sample']} | {rates} |")
    lines += [
        "",
        "| continued after half | seek | draws of the larger source | of them doubled | by ranks |",
        "|---|---|---|---|---|",
    ]
    for name in ("datasets", "ours"):
        row = result["peer"][name]
        label = f"datasets {row['version']}" if name == "datasets" else name
        cells = (
            f"{row['seek ms']} ms",
            row["draws of a"],
            row["doubled"],
            "not measured here" if row["by ranks"] is None else f"{row['by ranks']:.1%}",
        )
        lines.append(f"| {label} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything; with --out writes DATE_order.json and .md there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", help="for the index (default: a small one made here)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]
    if args.worker:
        worker(Path(args.worker[0]), args.worker[1], int(args.worker[2]))
        return
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; other work shared the machine",
        "rows": args.rows,
        "tokenizer": "given" if args.tokenizer else "330 entries",
        "memory_mib": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        result["index"] = index_rate(Path(temporary), args.tokenizer)
        print(result["index"], file=sys.stderr, flush=True)
        result["peer"] = peer(Path(temporary), args.repeats)
        print(result["peer"], file=sys.stderr, flush=True)
    for rows in (args.rows // 100, args.rows):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_index(folder, rows)
            result["memory_mib"][str(rows)] = {way: memory(folder, way) for way in ("copies", "shared")}
            print(result["memory_mib"], file=sys.stderr, flush=True)
            if rows == args.rows:
                result["seek"] = seek(folder, args.repeats)
                print(result["seek"], file=sys.stderr, flush=True)
    result["load_average"] = [round(one, 1) for one in os.getloadavg()]
    command = f"python scripts/bench/data/bench_order.py --rows {args.rows} --repeats {args.repeats}"
    text = _report(result, command + (" --tokenizer DIR` with Qwen2's tokenizer `" if args.tokenizer else "")).replace(
        " ``", ""
    )
    print(text)
    if args.out:
        (args.out / f"{result['date']}_order.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{result['date']}_order.md").write_text(text)


if __name__ == "__main__":
    main()
