#!/usr/bin/env python
"""What a tile costs on its way from a file to the process that trains, and what handing it over costs.

    python scripts/bench/data/bench_images.py [--images 40] [--repeats 5] [--out scripts/bench/results]

Compared on the same generated images, interleaved: every repeat runs all, in another order. Ratios are those of one
repeat, their median over the repeats.

    reference      the usual pipeline of InternVL and Megatron: a torch DataLoader with 2 worker processes that decode
                   and resize with Pillow and hand over float32 tiles, normalised
    exact, fast    this package's loader with data.decode exact or fast: 2 decode threads, uint8 tiles, normalised on
                   the device later; in threads of the trainer (data.loader inprocess) or in a process of its own

CPU time is that of all processes together, user and system, from the first image asked for to the last one received,
after a whole pass as warm-up; start-up is left out. Ours includes reading the row, its tokens and laying out the pack,
which the reference does not do here. Wall time depends on what else the machine does; CPU time much less.

Hand-over: seven tiles that are ready, from the process that has them to the one that trains, written and received.

Padding: positions that a model computes for each trained token, by how samples are put together. Its samples are drawn
from the model of a mixture in bench_packing.py (35 % text); 40 % of the text is trained.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from nvlm_train.data import loader, tiling
from nvlm_train.data import loader_process as process
from nvlm_train.data.plan import DataPlan, open_data

ROOT = Path(__file__).resolve().parents[3]
PX = 448
MAX_TILES = 6
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
AHEAD = 4  # batches under way


# ------------------------------------------------------------------------------------------------------------- images


def photo(width: int, height: int, seed: int) -> Image.Image:
    """1/f noise, as photographs have, with a little grain."""
    draw = np.random.default_rng(seed)
    small = (max(2, width // 2), max(2, height // 2))
    frequency = np.hypot(np.fft.fftfreq(small[1])[:, None], np.fft.rfftfreq(small[0])[None, :])
    frequency[0, 0] = 1.0
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(np.fft.rfft2(draw.standard_normal(small[::-1])) / frequency, s=small[::-1])
        planes.append(128 + 48 * (plane - plane.mean()) / plane.std() + 4 * draw.standard_normal(small[::-1]))
    pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def document(width: int, height: int, seed: int) -> Image.Image:
    """Lines of text, a table, a coloured bar."""
    draw = random.Random(seed)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for y in range(12, height - 12, 14):
        pen.text((10, y), "".join(draw.choices("abcdefghij klmno pqrstu 0123456789 ", k=width // 7)), fill="black")
    for x in range(10, width, max(20, width // 6)):
        pen.line((x, height // 2, x, height - 10), fill=(60, 60, 60))
    pen.rectangle((width // 3, height // 3, width // 2, height // 2), fill=(200, 30, 40))
    return page


def make_images(folder: Path, count: int) -> list[str]:
    """60 % photographs (JPEG), 18 % documents as JPEG, the rest PNG; long side 300 to 3000, evenly in its logarithm."""
    draw = random.Random(7)
    names = []
    for k in range(count):
        long = round(300 * 10 ** draw.random())
        aspect = min(max(np.exp(0.4 * draw.gauss(0, 1)), 0.2), 5.0)
        width, height = (long, max(32, round(long / aspect))) if aspect > 1 else (max(32, round(long * aspect)), long)
        kind = k % 50
        name = f"{k}.png" if kind >= 39 else f"{k}.jpg"
        image = photo(width, height, k) if kind < 30 else document(width, height, k)
        image.save(folder / name, **({} if name.endswith("png") else {"quality": draw.randint(85, 95)}))
        names.append(name)
    draw.shuffle(names)
    (folder / "images.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "images": [name],
                    "messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "yes"}],
                }
            )
            + "\n"
            for name in names
        )
    )
    return names


# ----------------------------------------------------------------------------------------------------------- pipelines


class Reference(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Pillow, tile by tile, float32, normalised: what InternVL's and Megatron's transforms do."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, k: int) -> torch.Tensor:
        image = Image.open(self.folder / self.names[k]).convert("RGB")
        columns, rows = tiling.choose_grid(image.width, image.height, MAX_TILES, PX)
        whole = image.resize((columns * PX, rows * PX))
        crops = [whole.crop((x * PX, y * PX, (x + 1) * PX, (y + 1) * PX)) for y in range(rows) for x in range(columns)]
        if len(crops) > 1:
            crops.append(image.resize((PX, PX)))
        return torch.stack([self._transform(crop) for crop in crops])  # [t, 3, px, px]

    @staticmethod
    def _transform(crop: Image.Image) -> torch.Tensor:
        crop = crop.convert("RGB").resize((PX, PX), Image.Resampling.BICUBIC)  # no-op, as in their transforms
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)  # ToTensor
        return pixels.sub_(MEAN).div_(STD)


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """Processes below this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def measured(warm_up: Callable[[], Any], run: Callable[[], int]) -> tuple[float, float, int]:
    """(CPU seconds, wall seconds, tiles) of `run`, after a warm-up."""
    warm_up()
    pids = [os.getpid(), *children()]
    cpu, begin = cpu_s(pids), time.perf_counter()
    tiles = run()
    return cpu_s(pids) - cpu, time.perf_counter() - begin, tiles


def run_reference(folder: Path, names: list[str]) -> tuple[float, float, int]:
    """The DataLoader of 2 processes; its workers stay between the two passes."""
    data = torch.utils.data.DataLoader(
        Reference(folder, names),
        batch_size=1,
        num_workers=2,
        collate_fn=lambda batch: batch[0],
        persistent_workers=True,
    )

    def go() -> int:
        return sum(len(tiles) for tiles in data)

    try:
        return measured(go, go)
    finally:
        _end(data)


def _end(data: Any) -> None:
    """Waits for the worker processes, so that the next measurement does not count them."""
    workers = list(data._iterator._workers)
    data._iterator._shutdown_workers()
    for worker in workers:
        worker.join()


def run_ours(plan: DataPlan) -> tuple[float, float, int]:
    """The recipe's loader, one sample a pack, AHEAD packs under way."""
    builder = loader._open_builder(plan)
    packs = [item for ranks in plan.deal_step(0) for item in ranks[0]]

    def go() -> int:
        tiles, futures = 0, []
        for item in packs:
            futures.append(builder.submit([item], 0))
            if len(futures) > AHEAD:
                tiles += len(futures.pop(0).result().batch.tiles)
        return tiles + sum(len(future.result().batch.tiles) for future in futures)

    try:
        return measured(go, go)
    finally:
        builder.close()


# ----------------------------------------------------------------------------------------------------------- hand-over


class Ready(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Seven tiles that are ready; what remains is handing them over."""

    def __init__(self, dtype: torch.dtype | None, count: int) -> None:
        self.count = count
        self.tiles = None if dtype is None else torch.ones(7, 3, PX, PX, dtype=dtype)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> torch.Tensor:
        return torch.zeros(1) if self.tiles is None else self.tiles.clone()


def hand_over_by_dataloader(dtype: torch.dtype | None, count: int) -> float:
    """CPU ms a sample of 7 tiles, both sides together."""
    data = torch.utils.data.DataLoader(
        Ready(dtype, count), batch_size=1, num_workers=2, collate_fn=lambda batch: batch[0], persistent_workers=True
    )

    def go() -> int:
        return sum(int(tiles.flatten()[::4096].sum()) > 0 for tiles in data)

    try:
        return 1000 * measured(go, go)[0] / count
    finally:
        _end(data)


def _give(descriptor: int, count: int) -> None:
    connection = socket.socket(fileno=descriptor)
    tiles = np.ones((7, 3, PX, PX), dtype=np.uint8)
    connection.recv(1)
    for _ in range(count):
        place = process._shared(tiles.nbytes).reshape(tiles.shape)
        place[...] = tiles  # as the decode threads write them
        given = process._descriptor_of(place)
        process._send(connection, b"x" * 2000, given)
        os.close(given)
        del place
    connection.recv(1)
    os._exit(0)


def hand_over_by_us(count: int) -> float:
    """The same through the loader process's memory."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    worker = multiprocessing.get_context("fork").Process(target=_give, args=(theirs.fileno(), count))
    worker.start()
    time.sleep(0.2)

    def go() -> int:
        ours.send(b"g")
        for _ in range(count):
            _, descriptor = process._receive(ours)
            assert descriptor is not None
            with mmap.mmap(descriptor, 7 * 3 * PX * PX) as memory:
                os.close(descriptor)
                int(np.frombuffer(memory, np.uint8)[::4096].sum())
        return count

    seconds = measured(lambda: None, go)[0]
    ours.send(b"e")
    worker.join()
    return 1000 * seconds / count


# ------------------------------------------------------------------------------------------- padding instead of packs


def slots_per_trained_token(seed: int = 0) -> dict[str, float]:
    """Positions a model computes for each trained token, by how samples are put together."""
    from nvlm_train.data import packing

    draw = np.random.default_rng(seed)
    count = 8192
    is_text = draw.random(count) < 0.35
    text = np.exp(np.where(is_text, draw.normal(np.log(400), 0.9, count), draw.normal(np.log(150), 0.8, count)))
    text = np.clip(text, np.where(is_text, 50, 20), 4000).astype(np.int64)
    tiles = np.where(is_text, 0, draw.choice([1, 3, 4, 5, 7], count, p=[0.1, 0.15, 0.1, 0.2, 0.45]))
    tokens = tiles * 257 + text
    print(f"mixture: {tokens.mean():.0f} tokens, {tiles.mean():.2f} tiles a sample", file=sys.stderr)
    trained = 0.4 * text
    found = {}
    for rows in (4, 8):
        padded = tokens[: count // rows * rows].reshape(-1, rows).max(axis=1).sum() * rows
        found[f"padded to the longest of {rows}"] = float(padded / trained.sum())
    found["padded to 4096, as fixed-length pipelines do"] = float(count * 4096 / trained.sum())
    bins = packing.fill_bins(tokens, tiles, 16384, None)
    found["packs of 16384"] = float(len(bins) * 16384 / trained.sum())
    return found


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Runs everything; with --out writes DATE_images.json and .md there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # as torchrun sets it; threads are samples here, not parts of one
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    sys.path.insert(0, str(ROOT / "tests" / "data"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        result = _measure_all(Path(temporary), args.images, args.repeats)
    command = f"python scripts/bench/data/bench_images.py --images {args.images} --repeats {args.repeats}"
    text = _report(result, command)
    print(text)
    if args.out:
        (args.out / f"{result['date']}_images.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / f"{result['date']}_images.md").write_text(text)


def _report(result: dict[str, Any], command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Images, {result['date']}",
        "",
        f"Machine: {result['machine']} (load average {result['load_average'][0]} at the end); {versions}. "
        f"Command: `{command}`; {result['images']} images, {result['tiles']} tiles, {result['repeats']} repeats.",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
        "| pipeline | CPU ms a tile | tiles/s | times less CPU | times faster | lowest and highest repeat (CPU) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["per_tile"].items():
        low, high = row["ratios_cpu"]
        lines.append(
            f"| {name} | {row['cpu_ms_per_tile']} | {row['tiles_per_s_wall']} | {row['ratio_to_reference_cpu']} | "
            f"{row['ratio_to_reference_wall']} | {low} to {high} |"
        )
    lines += ["", "| hand-over of 7 tiles | CPU ms |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in result["hand_over_of_7_tiles_cpu_ms"].items()]
    lines += [
        "",
        "| samples put together as | positions a trained token | packs need so many times fewer |",
        "|---|---|---|",
    ]
    for name, value in result["model_positions_per_trained_token"].items():
        lines.append(f"| {name} | {value} | {result['packs_against'][name]} |")
    return "\n".join(lines) + "\n"


def _measure_all(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    import corpus

    names = make_images(folder, count)
    mixture = {"images": {"path": str(folder / "images.jsonl")}}

    def plan_of(decode: str, where: str) -> DataPlan:
        recipe = corpus.make_recipe(
            folder, mixture, model__vision__image_size=PX, model__vision__patch_size=14, data__decode=decode,
            data__loader=where, data__num_threads=2, data__max_tokens_per_sample=2048, data__pack_tokens=2048,
            model__language_model__max_position_embeddings=4096, global_batch__samples=count,
        )  # fmt: skip
        return open_data(recipe, rank=0, world_size=1)

    plans = {
        f"{decode} {name}": plan_of(decode, where)
        for decode in ("exact", "fast")
        for name, where in (("in threads", "inprocess"), ("in a process", "process"))
    }
    runs: dict[str, Callable[[], tuple[float, float, int]]] = {"reference": lambda: run_reference(folder, names)}
    runs |= {name: (lambda plan=plan: run_ours(plan)) for name, plan in plans.items()}  # type: ignore[misc]
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(runs), len(runs)):
            found[name].append(runs[name]())
            print(f"repeat {repeat}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    table = {}
    base = [one[0] / one[2] for one in found["reference"]]
    for name, taken in found.items():
        per_tile = [cpu / tiles for cpu, _, tiles in taken]
        table[name] = {
            "cpu_ms_per_tile": round(1000 * statistics.median(per_tile), 2),
            "tiles_per_s_wall": round(statistics.median(tiles / wall for _, wall, tiles in taken), 1),
            "ratios_cpu": [round(pick(b / p for b, p in zip(base, per_tile, strict=True)), 2) for pick in (min, max)],
            "ratio_to_reference_cpu": round(statistics.median(b / p for b, p in zip(base, per_tile, strict=True)), 2),
            "ratio_to_reference_wall": round(
                statistics.median(
                    (tiles / wall) / (other[2] / other[1])
                    for (_, wall, tiles), other in zip(taken, found["reference"], strict=True)
                ),
                2,
            ),
        }
    rounds = 60
    hand_over: dict[str, list[float]] = {}
    ways: list[tuple[str, Callable[[], float]]] = [
        ("nothing, DataLoader", lambda: hand_over_by_dataloader(None, rounds)),
        ("uint8, DataLoader", lambda: hand_over_by_dataloader(torch.uint8, rounds)),
        ("float32, DataLoader", lambda: hand_over_by_dataloader(torch.float32, rounds)),
        ("uint8, loader process", lambda: hand_over_by_us(rounds)),
    ]
    for _ in range(repeats):
        for name, way in ways:
            hand_over.setdefault(name, []).append(way())
    slots = slots_per_trained_token()
    packed = slots["packs of 16384"]
    return {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; other work shared the machine",
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pillow": Image.__version__},
        "images": count,
        "tiles": found["reference"][0][2],
        "repeats": repeats,
        "per_tile": table,
        "hand_over_of_7_tiles_cpu_ms": {name: round(statistics.median(taken), 1) for name, taken in hand_over.items()},
        "model_positions_per_trained_token": {name: round(value, 2) for name, value in slots.items()},
        "packs_against": {name: round(value / packed, 2) for name, value in slots.items()},
    }


if __name__ == "__main__":
    main()
