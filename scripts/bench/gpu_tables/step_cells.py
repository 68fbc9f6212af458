"""Tables 3 and 4: whole optimizer steps through the engine that trains, of ours and of the peer's way."""

from __future__ import annotations

import gc
import hashlib
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_tables import shapes
from gpu_tables.worker import spread
from nvlm_train.batch import IGNORE_INDEX, Batch, Memory
from nvlm_train.data.chat import Rendered, TileReads
from nvlm_train.data.loader import StepData
from nvlm_train.data.memory import lay_out_memory
from nvlm_train.engine import dist
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.kernels import select
from nvlm_train.model.flops import image_tokens_per_tile
from nvlm_train.model.pretrained import initial_value
from nvlm_train.recipe import schema
from nvlm_train.recipe.resolve import resolve
from nvlm_train.train import state, step
from nvlm_train.train.metrics import Clock

WARM, STEPS = {"cuda": 2, "cpu": 1}, {"cuda": 6, "cpu": 2}
_world: list[dist.World] = []


class RandomWeights:
    """Weights for `state.build`: drawn on the device from the seed and the name, so that every provider has the same.

    They are 10^10 numbers: on the host that takes minutes.
    """

    def __init__(self, recipe: schema.Recipe, device: torch.device, wanted: dict[str, tuple[int, ...]]) -> None:
        self._recipe, self._device, self._shapes = recipe, device, wanted
        self._dtype = state.DTYPES[recipe.precision]

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> Tensor:
        own = self._shapes[name]
        if len(own) == 1:  # norms, biases, scales and gates: what they start from
            return initial_value(name, own, self._recipe.seed, self._recipe.model).to(self._device, self._dtype)
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator(self._device).manual_seed(number)
        value = torch.empty(*own, dtype=self._dtype, device=self._device)
        return value.normal_(0.0, 0.02, generator=generator)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        return self.read(name).flatten()[begin:end]

    def where(self, name: str) -> str:
        return f"random:{name}"


def shapes_of(recipe: schema.Recipe) -> dict[str, tuple[int, ...]]:
    """Every parameter of a recipe's model, by name."""
    from nvlm_train.model.nvlm import class_of

    with torch.device("meta"):
        model = class_of(recipe.model)(recipe.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def make_batch(recipe: schema.Recipe, device: str) -> Batch:
    """The samples of `shapes.SAMPLES` as one pack: of each its picture's tiles, a tag before each, then text."""
    model = recipe.model
    per_tile, chance = image_tokens_per_tile(model.vision), torch.Generator().manual_seed(0)
    hybrid = model.architecture == "nvlm_h"
    own_lengths = shapes.lengths(model.architecture, device, per_tile)
    begins = shapes.starts(own_lengths)
    slots: list[int] = []
    rendered: list[Rendered] = []
    trained: list[int] = []
    first_tile = 0
    for length, (_, tiles) in zip(own_lengths, shapes.samples(device), strict=True):
        shown = range(tiles - shapes.in_sequence(model.architecture, tiles), tiles)
        own: list[tuple[int, int]] = []
        line: list[int] = []
        for tile in range(tiles):
            own.append((0, 0))
            if not hybrid or tile in shown:  # in nvlm_h the other tags are in the memory
                own[-1] = (len(line), len(line) + shapes.TAG)
                line += [-1] * shapes.TAG
            if tile in shown:
                line += range((first_tile + tile) * per_tile, (first_tile + tile + 1) * per_tile)
        behind = len(line)
        reads = tuple(
            TileReads(0, k not in shown, (0, 0) if hybrid else own[k], behind,
                      tuple(range(5, 5 + shapes.TAG)) if hybrid and k not in shown else ())
            for k in range(tiles)
        )  # fmt: skip
        stream = np.zeros(length, dtype=np.int32)  # of which only the length counts here
        rendered.append(Rendered(stream, stream, (-1,) * tiles, reads if model.architecture != "nvlm_d" else ()))
        slots += line + [-1] * (length - behind)
        text = shapes.samples(device)[len(trained)][0] - (per_tile + shapes.TAG) * tiles  # alike in D, X and H
        trained.append(max(1, int(shapes.TRAINED_SHARE * text)))
        first_tile += tiles
    total = sum(own_lengths)
    ids = torch.randint(16, model.language_model.vocab_size, (1, total), generator=chance)
    labels = torch.full((1, total), IGNORE_INDEX)
    positions = torch.empty(1, total, dtype=torch.int64)
    for begin, length, count in zip(begins, own_lengths, trained, strict=True):
        end = begin + length
        labels[0, end - 1 - count : end - 1] = ids[0, end - count : end]
        positions[0, begin:end] = torch.arange(length)
    memory = None
    if model.architecture != "nvlm_d":
        arrays = lay_out_memory(model, list(zip(begins, rendered, strict=True)), per_tile, pad=0)
        fields: dict[str, Any] = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()}
        memory = Memory(**fields)
    pixels = model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=torch.tensor([*begins, total], dtype=torch.int32),
        max_seqlen=max(own_lengths),
        tiles=torch.randint(0, 256, (first_tile, 3, pixels, pixels), generator=chance, dtype=torch.uint8),
        image_slots=torch.tensor(slots)[None],
        num_trained_tokens=int((labels != IGNORE_INDEX).sum()),
        memory=memory,
    )


def step_data(batch: Batch, number: int) -> StepData:
    return StepData(
        step=number,
        micro_batches=[batch],
        trained_tokens=batch.num_trained_tokens,
        tokens=batch.input_ids.numel(),
        tiles=len(batch.tiles),
        samples=len(batch.cu_seqlens) - 1,
        samples_by_source={},
        tokens_by_source={},
        bad={},
    )


def world() -> dist.World:
    """Of one rank, started once a process."""
    if not _world:
        _world.append(dist.start(resolve_launch({}), timeout_s=600))
    return _world[0]


class Peak:
    """Highest memory since it was made: of torch's allocator on a GPU; on a CPU growth of the resident memory, which a
    small model hardly moves."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
            self.before = self._resident()

    def _resident(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._resident() - self.before


def timed(cuda: bool, run: Any) -> tuple[float, Any]:
    """(milliseconds of a whole step, its result): the work of the host counts."""
    if cuda:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), found
    begun = time.perf_counter()
    found = run()
    return (time.perf_counter() - begun) * 1e3, found


def measure_step(cell: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """One row and provider: builds, warms up, and times whole optimizer steps.

    cell: {"row": what `shapes.fit` gave, "architecture", "provider": ours | torch | peer, "recompute"}.
    """
    device, row, provider = task["device"], cell["row"], cell["provider"]
    gc.collect()
    recipe = shapes.make_recipe(
        device,
        row["decoder"],
        architecture=cell["architecture"],
        tower_layers=row["tower_layers"],
        recompute=cell["recompute"],
        kernels="torch" if provider in ("torch", "peer") else task.get("kernels", "auto"),
        implementation=row["implementation"],
    )
    rank = world()
    peak = Peak(rank.device)
    resolved = resolve(recipe, 1, num_steps=1000)
    batch = make_batch(recipe, device)
    if rank.device.type == "cuda":
        batch = batch.pin_memory()
    clock = Clock(rank.device)
    weights = RandomWeights(recipe, rank.device, shapes_of(recipe))
    begun = time.monotonic()
    about: dict[str, Any]
    if provider == "peer":
        from gpu_tables import peer

        theirs, about = peer.build(recipe, resolved, rank, weights)
        batches = peer.padded(batch)
        about["positions"] = sum(int(part.ids.numel()) for part in batches)

        def run(number: int) -> tuple[list[float], float]:
            return peer.train(rank, theirs, batches, batch.num_trained_tokens)
    else:
        made = state.build(recipe, resolved, rank, weights, skip_trained=False)
        about = {"kernels": {op: name for op, (name, _) in select(recipe.kernels, rank.device.type).items()}}
        about["positions"] = batch.input_ids.numel()

        def run(number: int) -> tuple[list[float], float]:
            step.set_rates(recipe, resolved, made, number)
            return step.train(recipe, rank, made, step_data(batch, number), batch.num_trained_tokens, clock)

    build_s = time.monotonic() - begun
    if rank.device.type == "cuda":
        peak = Peak(rank.device)  # of steps alone
    times: list[float] = []
    losses: list[float] = []
    norms: list[float] = []
    parts: dict[str, list[float]] = {}  # of ours
    for number in range(WARM[device] + STEPS[device]):
        taken, (found, norm) = timed(rank.device.type == "cuda", lambda number=number: run(number))
        losses.append(sum(found) / batch.num_trained_tokens)
        norms.append(norm)
        if not math.isfinite(losses[-1] + norm):  # the engine left the step out, so it took less than a step
            raise ValueError(f"step {number + 1}: loss {losses[-1]}, gradient norm {norm}; it is no measurement")
        own_parts = clock.take()
        if number >= WARM[device]:
            times.append(taken)
            for part, seconds in own_parts.items():
                parts.setdefault(part, []).append(seconds * 1e3)
    whole, without_tower = shapes.operations(recipe, device)
    return {
        "ms": spread(times),
        "times": times,
        "parts": {part: statistics.median(values) for part, values in parts.items()},
        "tokens": batch.input_ids.numel(),
        "trained_tokens": batch.num_trained_tokens,
        "samples": len(batch.cu_seqlens) - 1,
        "tiles": len(batch.tiles),
        "flop": whole,
        "flop_without_tower": without_tower,
        "loss": losses[0],
        "grad_norm": norms[0],
        "losses": losses,
        "peak": peak.bytes(),
        "predicted": shapes.predicted(recipe) if provider != "peer" else None,
        "recompute": cell["recompute"],
        "note": row["note"],
        "decoder": row["decoder"],
        "build_s": build_s,
        **about,
    }
