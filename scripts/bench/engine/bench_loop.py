#!/usr/bin/env python
"""What the training loop costs beside the engine and the model, and what a start and mixed modality cost.

    python scripts/bench/engine/bench_loop.py [--steps 12] [--starts 5] [--out scripts/bench/results]

Three parts, each in processes of its own, about three minutes together on two cores; the figures are ratios of things
that are measured in turns.

loop      One rank, ZeRO-3, a decoder of 4 M parameters, pictures and text, a line of metrics for every step. After each
          step of the real loop the same batches go through plain calls of the tower and the engine (the bare loop), so
          both see the same moment of the machine. The loader works on during the bare step. CPU time: that of the
          loop's thread outside calls of tower, forward, backward and engine step; and that of all other threads of the
          process (decoding).
start     The same process, from the call of `train` to the end of its first step: from the beginning, and resumed at
          position 10 and at position 10 million, in turns. The far position is faked: the checkpoint of step 10 under
          the number 10,000,000, with its state.json rewritten and the data state of the plan at that step. Imports
          (the same for all) are not in it.
mixed     Two ranks, ZeRO-3, nothing kept gathered. Text-only micro-steps through the whole model (projector called with
          a row of zeros) beside the same batches through the decoder alone. Collectives are counted where DeepSpeed
          calls torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "train"):
    sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

DECODER = dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=344, max_position_embeddings=512,
)  # fmt: skip
FAR = 10_000_000
DROPPED = 2  # first steps of a part, which warm up


def prepare(folder: Path) -> Path:
    """Data, backbones and the recipe of the first two parts."""
    import yaml

    import runs

    runs.LANGUAGE_MODEL.update(DECODER)
    path = runs.write_inputs(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe |= {"max_steps": 2 * FAR, "validation": None, "global_batch": {"samples": 24}, "worst_case_first": False}
    recipe["schedule"] = {"name": "constant"}
    recipe["checkpoint"] = {"every_steps": FAR}
    recipe["data"]["pack_tokens"] = 1024
    path.write_text(yaml.safe_dump(recipe))
    return path


class _Calls:
    """Thread CPU time inside the calls that are not the loop's own."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begun

        return call


class _Enough(Exception):
    """The part has what it wants; the training is left."""


def loop_part(recipe: Path, out: Path, steps: int) -> dict[str, Any]:
    """Steps of the loop and of the bare loop in turns."""
    import torch

    from nvlm_train.engine import engine as zero
    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.train import loop, step
    from nvlm_train.train.loss import tower_features

    calls, held = _Calls(), {}
    bare_forward, bare_backward, bare_step, bare_train = zero.forward, zero.backward, zero.step, step.train
    for owner, name in ((zero, "forward"), (zero, "backward"), (zero, "step"), (step, "tower_features")):
        setattr(owner, name, calls.around(getattr(owner, name)))
    original_advance = step.advance
    rows: list[dict[str, float]] = []
    begun = [0.0, 0.0, 0.0]

    def train(recipe: Any, world: Any, built: Any, data: Any, trained: int, *more: Any) -> Any:
        held.update(recipe=recipe, world=world, built=built, data=data, trained=trained)
        return bare_train(recipe, world, built, data, trained, *more)

    def bare() -> float:
        start = time.perf_counter()
        built, batches = held["built"], held["data"].micro_batches
        for number, batch in enumerate(batches, start=1):
            features = tower_features(built.tower, batch, built.dtype, held["recipe"].vision_tiles_per_chunk)
            loss = bare_forward(built.engine, batch, features, last=number == len(batches))
            bare_backward(built.engine, loss, held["trained"])
        bare_step(built.engine)
        return time.perf_counter() - start

    def advance(*args: Any, **kwargs: Any) -> None:
        now = (time.perf_counter(), time.thread_time(), time.process_time())
        wall, thread, process = (b - a for a, b in zip(begun, now, strict=True))
        others = process - thread
        row = {"wall": wall, "own": thread - calls.seconds, "others": others, "bare": bare()}
        rows.append(row)
        original_advance(*args, **kwargs)
        if len(rows) == steps + DROPPED:
            raise _Enough
        calls.seconds = 0.0
        begun[:] = [time.perf_counter(), time.thread_time(), time.process_time()]

    step.train, step.advance = train, advance
    torch.set_num_threads(1)
    try:
        loop.train(load_recipe(recipe, [f"output_dir={out}"]))
    except _Enough:
        pass
    rows = rows[DROPPED:]
    ratios = [row["wall"] / row["bare"] for row in rows]
    return {
        "steps": len(rows),
        "bare_step_s": statistics.median(row["bare"] for row in rows),
        "step_time_ratio": statistics.median(ratios),
        "step_time_ratio_range": [min(ratios), max(ratios)],
        "loop_thread_cpu_ms": 1e3 * statistics.median(row["own"] for row in rows),
        "loop_thread_cpu_ms_range": [1e3 * min(row["own"] for row in rows), 1e3 * max(row["own"] for row in rows)],
        "other_threads_cpu_ms": 1e3 * statistics.median(row["others"] for row in rows),
    }


def start_part(recipe: Path, out: Path, starts: int) -> dict[str, Any]:
    """From the call to the end of the first step, three ways in turns."""
    import torch

    from nvlm_train.data.plan import open_data
    from nvlm_train.engine import dist
    from nvlm_train.engine.launch import resolve_launch
    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.train import loop, step

    torch.set_num_threads(1)
    dist.start(resolve_launch(), timeout_s=600)  # a group that trainings find and leave as it is
    original = step.advance
    ended: list[float] = []

    def advance(*args: Any, **kwargs: Any) -> None:
        ended.append(time.perf_counter())
        original(*args, **kwargs)
        if len(ended) == 9:  # the steps of `near`: the next one is the last
            (near / "stop").touch()

    step.advance = advance
    near = out / "near"
    small = ["global_batch.samples=2", "data.num_threads=1"]

    def first_step(run: Path) -> float:
        ended.clear()
        run.mkdir(parents=True, exist_ok=True)
        (run / "stop").touch()  # after its first step
        begun = time.perf_counter()
        loop.train(load_recipe(recipe, [*small, f"output_dir={run}"]))
        return ended[0] - begun

    index = [f"data.index_dir={out / 'index'}"]  # built once; it is no part of a resume
    small += index
    loop.train(load_recipe(recipe, [*small, f"output_dir={near}"]))  # ten steps
    far = out / "far"
    shutil.copytree(near, far)
    (far / "step_10").rename(far / f"step_{FAR}")
    state_file = far / f"step_{FAR}" / "state.json"
    state = json.loads(state_file.read_text())
    plan = open_data(load_recipe(recipe, [*small, f"output_dir={far}"]).recipe, rank=0, world_size=1)
    state |= {"step": FAR, "adam_step": FAR, "data": plan.state(FAR)}
    state["progress"]["step"] = FAR
    state_file.write_text(json.dumps(state))
    (state_file.parent / "COMMITTED").write_text("")  # no checksum of what was written here
    times: dict[str, list[float]] = {"beginning": [], "position_10": [], "position_10_million": []}
    names = list(times)
    for turn in range(starts):
        for name in names[turn % 3 :] + names[: turn % 3]:
            run = out / f"{name}_{turn}"
            if name != "beginning":
                shutil.copytree(near if name == "position_10" else far, run)
            times[name].append(first_step(run))
            shutil.rmtree(run)
    ratios = [far / near for far, near in zip(times["position_10_million"], times["position_10"], strict=True)]
    return {
        "starts": starts,
        **{f"{name}_s": statistics.median(found) for name, found in times.items()},
        "ratio_10_million_to_10": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def mixed_part(steps: int) -> dict[str, Any]:
    """On each of two ranks: text-only micro-steps with and without the image side of the model."""
    import torch
    import torch.distributed
    from torch import Tensor, nn

    from engine.zero_jobs import deepspeed_dict
    from nvlm_train.batch import Batch
    from nvlm_train.engine import dist
    from nvlm_train.engine import engine as zero
    from nvlm_train.engine.launch import resolve_launch
    from nvlm_train.engine.optim import build_optimizer, parameter_groups
    from nvlm_train.model.decoder import LanguageModel
    from nvlm_train.model.nvlm import NvlmD
    from nvlm_train.model.pretrained import fill, merge
    from nvlm_train.recipe import schema
    from tiny import VISION, make_batch

    class DecoderAlone(nn.Module):
        def __init__(self, config: schema.Model) -> None:
            super().__init__()
            self.language_model = LanguageModel(config.language_model)

        def forward(self, batch: Batch) -> Tensor:
            model = self.language_model.model
            x = model.embed_tokens(batch.input_ids)  # [B, S, D]
            hidden = model(x, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)  # [B, S, D]
            return self.language_model.lm_head(hidden, batch.labels, batch.num_trained_tokens)

    torch.set_num_threads(1)
    world = dist.start(resolve_launch(), timeout_s=300)
    import deepspeed.comm.comm as comm

    counts = {"collectives": 0}
    for name in ("all_gather_into_tensor", "all_gather_coalesced", "reduce_scatter_tensor", "all_reduce", "broadcast",
                 "all_gather", "reduce_scatter", "all_to_all_single", "reduce"):  # fmt: skip
        original = getattr(comm.cdb, name, None)
        if original is not None:

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                counts["collectives"] += 1
                return original(*args, **kwargs)

            setattr(comm.cdb, name, counted)

    config = schema.Model.model_validate({"vision": VISION, "language_model": DECODER})
    settings = deepspeed_dict(3, "fp32", 1.0)
    optimizer = schema.Optimizer(lr=1e-4)
    engines = {}
    for name, make in (
        ("whole", lambda: NvlmD(config, with_vision=False)),
        ("decoder", lambda: DecoderAlone(config)),
    ):
        with zero.partitioned_at_birth(settings, world.device, torch.float32):
            model = make()
        fill(model, merge(), config, 0, *zero.write_slice(world))
        groups = parameter_groups(model.named_parameters(), optimizer, dict.fromkeys(schema.Train.model_fields, 1e-4))
        engines[name] = zero.build(model, build_optimizer(groups, optimizer, "cpu"), settings, world)
    own = len({name.rsplit(".", 1)[0] for name, _ in engines["whole"].trainable() if name.startswith("projector")})
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    per_micro_step: dict[str, list[int]] = {name: [] for name in engines}
    for number in range(steps + DROPPED):
        batch = make_batch([(400, 0)] * 5, number, vocab_size=344)
        for name in list(engines)[:: 1 if number % 2 else -1]:
            engine = engines[name]
            begun, counts["collectives"] = time.perf_counter(), 0
            loss = zero.forward(engine, batch, last=True)
            zero.backward(engine, loss, batch.num_trained_tokens)
            per_micro_step[name].append(counts["collectives"])
            zero.step(engine)
            dist.barrier(world)
            seconds[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(seconds["whole"][DROPPED:], seconds["decoder"][DROPPED:], strict=True)]
    found = {
        "steps": steps,
        "decoder_step_s": statistics.median(seconds["decoder"][DROPPED:]),
        "step_time_ratio": statistics.median(ratios),
        "step_time_ratio_range": [min(ratios), max(ratios)],
        "collectives_decoder_alone": per_micro_step["decoder"][-1],
        "collectives_whole_model": per_micro_step["whole"][-1],
        "extra_collectives": per_micro_step["whole"][-1] - per_micro_step["decoder"][-1],
        "projector_modules": own,
    }
    dist.stop(world)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The result as text."""
    loop, start, mixed = found["loop"], found["start"], found["mixed"]

    def spread(values: list[float], digits: int = 3) -> str:
        return f"{values[0]:.{digits}f} to {values[1]:.{digits}f}"

    own = f"{loop['loop_thread_cpu_ms']:.1f} ms ({spread(loop['loop_thread_cpu_ms_range'], 1)})"
    ratio = f"{loop['step_time_ratio']:.3f} ({spread(loop['step_time_ratio_range'])})"
    far = f"{start['ratio_10_million_to_10']:.3f} ({spread(start['ratio_range'])})"
    mixed_ratio = f"{mixed['step_time_ratio']:.3f} ({spread(mixed['step_time_ratio_range'])})"
    collectives = (
        f"{mixed['extra_collectives']} ({mixed['collectives_whole_model']} beside "
        f"{mixed['collectives_decoder_alone']}; the projector's {mixed['projector_modules']} modules are gathered in "
        "forward and in backward)"
    )
    starts = [start[f"{name}_s"] for name in ("beginning", "position_10", "position_10_million")]
    return "\n".join(
        [
            f"# The loop's own cost, {found['date']}",
            "",
            f"Machine: {found['machine']}. Load when it began: {found['load']}. Command: `{found['command']}`.",
            "",
            (__doc__ or "").split("\n\n", 2)[2].strip(),
            "",
            "| what | median (least to most) |",
            "|---|---|",
            f"| CPU time of the loop's thread a step, outside tower and engine | {own} |",
            f"| CPU time of all other threads a step (decoding) | {loop['other_threads_cpu_ms']:.1f} ms |",
            f"| step time by that of the bare loop, steps of {loop['bare_step_s']:.2f} s | {ratio} |",
            f"| first step: from the beginning, resumed at 10, at 10 million | "
            f"{starts[0]:.2f} s, {starts[1]:.2f} s, {starts[2]:.2f} s |",
            f"| first step resumed at 10 million by that at 10 | {far} |",
            f"| extra collectives of a text-only micro-step | {collectives} |",
            f"| text-only step by that of the decoder alone, of {mixed['decoder_step_s']:.2f} s | {mixed_ratio} |",
            "",
        ]
    )


def main() -> None:
    """All parts, or the one that a process of its own is for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results"))
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, folder = args.part[0], Path(args.part[1])
        if name == "loop":
            found = loop_part(prepare(folder), folder / "run", args.steps)
        elif name == "start":
            found = start_part(prepare(folder), folder / "runs", args.starts)
        else:
            found = mixed_part(args.steps)
        if os.environ.get("RANK", "0") == "0":
            (folder / "found.json").write_text(json.dumps(found))
        return
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, no GPU; Python {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "command": f"python scripts/bench/engine/bench_loop.py --steps {args.steps} --starts {args.starts}",
    }
    for name in ("loop", "start", "mixed"):
        with tempfile.TemporaryDirectory() as temporary:
            options = ["--part", name, temporary, "--steps", str(args.steps), "--starts", str(args.starts)]
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [sys.executable, *(launcher if name == "mixed" else []), __file__, *options]
            begun = time.monotonic()
            subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": str(ROOT)})
            result[name] = json.loads((Path(temporary) / "found.json").read_text())
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"{result['date']}_loop"
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
