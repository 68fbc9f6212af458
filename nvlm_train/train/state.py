"""What a run is made of: its directory, its weights, its engine, and how both are saved and restored."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_train import checkpoint, provenance
from nvlm_train.data.plan import DataPlan
from nvlm_train.data.windows import Stretch
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.node import ReadOncePerNode
from nvlm_train.engine.optim import build_optimizer, full_shape, module_of, parameter_groups
from nvlm_train.errors import CheckpointError, DataError, RecipeError
from nvlm_train.hub import local_folder
from nvlm_train.kernels import select
from nvlm_train.model import lora
from nvlm_train.model.dropout import Draws
from nvlm_train.model.nvlm import class_of
from nvlm_train.model.pretrained import Weights, fill, part_of
from nvlm_train.model.quantize import hold_in_nf4
from nvlm_train.model.vision import InternVit
from nvlm_train.recipe.resolve import Resolved, check_resume, recipe_to_dict
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train.branch import Branch, recorded_branch
from nvlm_train.train.feature_cache import FeatureCache, open_cache

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# ------------------------------------------------------------------------------------------------------ run directory


@dataclass
class Progress:
    """How far a run has come; what a resume needs beside the weights."""

    step: int = 0  # optimizer steps done
    samples: int = 0
    trained_tokens: int = 0
    samples_by_source: dict[str, int] = field(default_factory=dict)
    tokens_by_source: dict[str, int] = field(default_factory=dict)  # trained tokens; the model card tells them
    bad_samples: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_measure: str | None = None  # what `best_loss` was measured on, see `validation_measure`
    validations_without_improvement: int = 0
    validation_due: bool = False  # the run was asked to stop where it would have validated
    skipped_steps: int = 0  # of `step`, those left out because a loss or gradient was not finite
    nonfinite_in_a_row: int = 0  # such steps just before this one

    @property
    def adam_step(self) -> int:
        """Updates that AdamW has really made."""
        return self.step - self.skipped_steps

    def forget_best(self) -> None:
        """For a run that goes on from another's checkpoint: the best one so far is not in its own directory."""
        self.best_loss = self.best_step = self.best_measure = None
        self.validations_without_improvement = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Progress:
        """From a checkpoint's state.json: what an older version did not write keeps its default."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def validation_measure(recipe: Recipe) -> str | None:
    """What a validation loss is measured on; losses compare only where this is equal."""
    if recipe.validation is None:
        return None
    kept = recipe.validation.model_dump(mode="json", exclude={"every_steps", "early_stop"})
    sources = {name: source["kind"] for name, source in kept.pop("sources").items()}  # files may move
    return hashlib.sha256(json.dumps([kept, sources], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Start:
    """Where this attempt begins."""

    run: Path
    step: int  # 0: from `init_from`
    changes: list[str]  # keys that differ from the last attempt, allowed
    resume: str = "auto"
    new_init_from: bool = False  # init_from is not what the last attempt had
    later: list[str] = field(default_factory=list)  # complete checkpoints after `step`, to be set aside
    branch: Branch | None = None  # where the run began, if in another run's checkpoint
    leaves: bool = False  # `checkpoint` is that of the other run

    @property
    def checkpoint(self) -> Path | None:
        if self.leaves and self.branch is not None:
            return self.branch.checkpoint
        return self.run / f"step_{self.step}" if self.step else None

    @property
    def goes_on_from(self) -> Path | None:
        """The checkpoint to go on from, where init_from names what it did when that was saved."""
        return None if self.new_init_from or self.leaves else self.checkpoint

    @property
    def skipped(self) -> tuple[Stretch, ...]:
        """Data steps that this run never draws."""
        return self.branch.skipped if self.branch is not None else ()

    @property
    def skipped_before(self) -> tuple[Stretch, ...]:
        """Those that `checkpoint` knew of."""
        return self.branch.inherited if self.leaves and self.branch is not None else self.skipped


def find_start(recipe: Recipe, resume: str, accept: Sequence[str], branch: Branch | None = None) -> Start:
    """Looks at the run directory before anything is built. branch: what `--from` names.

    Raises RecipeError when the directory belongs to a run that this recipe would change, or that did not begin with
    `branch`, or when `resume` is "never" and it is not empty, or names a step without a complete checkpoint.
    """
    run = Path(recipe.output_dir)
    if run.exists() and not run.is_dir():
        raise RecipeError(
            f"output_dir: '{run}' is a file; name a folder that does not exist yet or belongs to this run"
        )
    steps = checkpoint.committed_steps(run)
    if not (run / "recipe.json").exists():
        if steps:
            raise RecipeError(
                f"output_dir: '{run}' holds checkpoints but no recipe.json, so it cannot be told whose they are; "
                "name another folder"
            )
        ours = (
            "data_index",
            "stop",
            "save",
            "bad_samples",
            "slurm",
            "attempts",
            "logs",
            "stacks_rank_",
            "base",
            provenance.TEXTS,
            ".lock",
        )
        foreign = [] if not run.exists() else sorted(p.name for p in run.iterdir() if not p.name.startswith(ours))
        if foreign:
            log.warning(
                "output_dir '%s' is no run of ours and not empty (%s, ...); the run's files are written beside what is "
                "there", run, ", ".join(foreign[:3]),
            )  # fmt: skip
        if branch is None:
            return Start(run, 0, [])
        then = checkpoint.read_json(branch.checkpoint.parent / "recipe.json")["recipe"]
        changes = [str(difference.key) for difference in check_resume(then, recipe, accept)]
        moved = then.get("init_from") != recipe_to_dict(recipe)["init_from"]
        return Start(run, branch.step, changes, new_init_from=moved, branch=branch, leaves=True)
    if resume == "never":
        raise RecipeError(f"output_dir: '{run}' already holds a run and --resume is never; name another folder")
    content = checkpoint.read_json(run / "recipe.json")
    began = recorded_branch(content)
    if branch is not None and (began is None or began.recorded != branch.recorded):
        where = "from its init_from" if began is None else f"from {began.checkpoint}, skipping {began.skips()}"
        raise RecipeError(
            f"output_dir: '{run}' already holds a run, which began {where}, not from {branch.checkpoint}, skipping "
            f"{branch.skips()}; give the new run an output_dir of its own"
        )
    differences = check_resume(content["recipe"], recipe, accept)
    leaves = not steps and began is not None
    step = steps[-1] if steps else began.step if began is not None else 0
    if content["attempts"] and content["attempts"][-1].get("resume") == resume:
        log.info("the last attempt went back to %s already; going on from step_%d", resume, step)
    elif resume.startswith("step_"):
        step = int(resume.removeprefix("step_"))
        if step not in steps:
            there = ", ".join(f"step_{n}" for n in steps) or "none"
            if step in checkpoint.committed_steps(run, "weights"):
                there += f" (weights_{step} holds bf16 weights alone, which a new run can start from: init_from.run)"
            raise RecipeError(f"--resume {resume}: '{run}' has no complete checkpoint of that step; there are: {there}")
    changes = [str(difference.key) for difference in differences]
    later = [f"step_{n}" for n in steps if n > step]
    if resume == f"step_{step}":
        later = [f"weights_{n}" for n in checkpoint.committed_steps(run, "weights") if n > step] + later
    moved = _named(content["recipe"].get("init_from") or {}) != _named(recipe_to_dict(recipe)["init_from"])
    return Start(run, step, changes, resume, moved, later, began, leaves)


def _named(init_from: Mapping[str, Any]) -> dict[str, Any]:
    """What init_from names; an older version did not write all of its keys."""
    return {name: value for name, value in init_from.items() if value is not None}


def set_aside(start: Start) -> None:
    """Moves what comes after the step that the run goes back to into RUN/set_aside/N/: checkpoints and metrics."""
    if not start.later:
        return
    parent = start.run / "set_aside"
    numbers = [int(folder.name) for folder in parent.glob("*") if folder.name.isdigit()]
    folder = parent / str(max(numbers, default=0) + 1)
    folder.mkdir(parents=True)
    metrics = start.run / "metrics.jsonl"
    if metrics.exists():
        shutil.copy2(metrics, folder / metrics.name)
    for name in reversed(start.later):  # the newest first: interrupted, the rest is still a run without a gap
        (start.run / name).rename(folder / name)
    log.info("set aside %s in %s", ", ".join(start.later), folder)


def write_run_files(
    start: Start,
    recipe: Recipe,
    resolved: Resolved,
    attempt: dict[str, Any],
    revisions: dict[str, str],
    hashes: Mapping[str, str] | None = None,
    plan: DataPlan | None = None,
) -> None:
    """Writes RUN/recipe.json and RUN/licenses; earlier attempts stay listed in it.

    revisions: see `hub.pin`. hashes: see `hash_weights`. plan: of the data, whose sources are recorded by content.
    """
    start.run.mkdir(parents=True, exist_ok=True)
    path = start.run / "recipe.json"
    before = checkpoint.read_json(path) if path.exists() else {}
    attempts = before.get("attempts", [])
    if not before and start.leaves and start.branch is not None:  # what the other run came from is behind this one too
        before = checkpoint.read_json(start.branch.checkpoint.parent / "recipe.json")
    earlier = before.get("earlier_run") if start.step and not start.new_init_from else _earlier_run(recipe)
    went_back = start.resume if start.resume.startswith("step_") else None
    attempts.append({"from_step": start.step, "changed": start.changes, "resume": went_back, **attempt})
    content = {
        "format": checkpoint.FORMAT,
        "recipe_hash": resolved.recipe_hash,
        "recipe": recipe_to_dict(recipe),
        "revisions": {**before.get("revisions", {}), **revisions},
        "earlier_run": earlier,
        "continued_from": start.branch.recorded if start.branch is not None else None,
        "parts": _parts(start, recipe, before if start.step else {}, earlier, hashes or {}, plan),
        "attempts": attempts,
    }
    checkpoint.write_json(path, content)


def _parts(
    start: Start,
    recipe: Recipe,
    before: Mapping[str, Any],
    earlier: Mapping[str, Any] | None,
    hashes: Mapping[str, str],
    plan: DataPlan | None,
) -> list[dict[str, Any]]:
    """What the weights derive from, for recipe.json; texts of licences are copied below the run.

    before: recipe.json of the attempt or run that this one goes on from; earlier: of the run behind init_from.run.
    """
    texts: dict[str, bytes] = {}
    digests = {} if plan is None else plan.source_digests()
    values = recipe_to_dict(recipe if plan is None else plan.recipe)  # blends as the sources they stand for
    parts = provenance.parts_of(values, earlier, hashes=hashes, digests=digests, texts=texts)
    if before:
        parts = provenance.later_parts(provenance.parts_of_run(before), parts)
    if unsaid := [part.key for part in parts if not part.licences and not part.recorded]:
        log.warning(
            "no licence is stated for %s; training goes on, an export will ask for it (license: in the recipe)",
            ", ".join(unsaid),
        )
    kept = [Path(earlier["path"]).parent] if earlier is not None else []
    kept += [start.branch.checkpoint.parent] if start.branch is not None else []
    for run in kept:
        texts |= provenance.read_texts(run, parts)
    provenance.write_texts(start.run, texts)
    return [provenance.as_record(part) for part in parts]


def _earlier_run(recipe: Recipe) -> dict[str, Any] | None:
    """The run this one starts from, with its recipe and the runs before it: licences travel even if folders move."""
    if recipe.init_from.run is None:
        return None
    step = checkpoint.find_step(local_folder(recipe.init_from.run.path))
    content = checkpoint.read_json(step.parent / "recipe.json")
    return {
        "path": os.path.abspath(step),
        "recipe_hash": content["recipe_hash"],
        "sha256": checkpoint.sha256(step / "state.json"),
        "recipe": content["recipe"],
        "earlier_run": content.get("earlier_run"),
        "parts": [provenance.as_record(part) for part in provenance.parts_of_run(content)],
        "progress": checkpoint.read_state(step).get("progress", {}),
    }


def write_base(run: Path, frozen: Sequence[str], weights: Weights, copy: bool, world: dist.World) -> None:
    """Writes or checks RUN/base.json; every rank hashes its share of the files. See `checkpoint.write_base`."""
    parts = {name: part for name in frozen if (part := part_of(weights, name)) is not None}
    with dist.agreed(world, f"making {run}"):
        run.mkdir(parents=True, exist_ok=True)
    checkpoint.write_base(
        run,
        {name: weights.where(name) for name in frozen},
        parts,
        copy=copy,
        rank=world.rank,
        world_size=world.world_size,
        gather=lambda value: dist.gather(world, value),
    )


def hash_weights(run: Path, names: Sequence[str], weights: Weights, world: dist.World) -> dict[str, str]:
    """SHA-256 of the files that a new run's weights come from, by absolute path; every rank hashes its share.

    The frozen ones are in RUN/base.json already. A checkpoint of ours stands for itself, by its state.json.
    """
    with dist.agreed(world, f"reading {run / 'base.json'}"):
        known = {place: entry["sha256"] for place, entry in checkpoint.read_json(run / "base.json")["files"].items()}
    places = sorted({os.path.abspath(weights.where(name).rsplit(":", 1)[0]) for name in names} - set(known))
    with dist.agreed(world, "hashing the weights that the run starts from"):
        own = [place for place in places[world.rank :: world.world_size] if Path(place).is_file()]
        desc = "hashing weights" if world.rank == 0 else None
        mine = dict(zip(own, checkpoint.sha256_of([Path(place) for place in own], desc), strict=True))
    return {**known, **{place: digest for part in dist.gather(world, mine) for place, digest in part.items()}}


def check_data(start: Start, data: dict[str, Any], accept: Sequence[str]) -> None:
    """Refuses to go on with other data than before: the same keys can name files that have changed meanwhile."""
    if start.checkpoint is None:
        return
    if any(key.split(".")[0] in ("data", "tokenizer") for key in start.changes):
        return  # allowed with --accept: the order changes with it
    with with_a_way_on(start):
        saved = checkpoint.read_state(start.checkpoint)
    fingerprint = data["fingerprint"]
    before = saved.get("data_fingerprint")
    if before != fingerprint and "data" not in accept:
        raise DataError(
            f"the data differs from what {start.checkpoint} was trained on (fingerprint {fingerprint}, was {before}): "
            "a file, the tokenizer or the template has changed, and the order of samples with it; put it back, or add "
            "--accept data"
        )
    # runs of the first version kept no more than the fingerprint
    if before == fingerprint and saved.get("data", data) != data:
        raise DataError(
            f"the data stands at {data} before step {start.step}, but {start.checkpoint} was saved at {saved['data']}; "
            "the table of windows in data.index_dir does not belong to this run: delete its folder 'windows'"
        )


# ------------------------------------------------------------------------------------------------------------ weights


def verify_earlier_run(recipe: Recipe, world: dist.World) -> None:
    """Compares the checkpoint that `init_from.run` names with its checksums, each rank its share of the files."""
    if recipe.init_from.run is None:
        return
    with dist.agreed(world, f"reading {recipe.init_from.run.path}"):
        checkpoint.Checkpoint(local_folder(recipe.init_from.run.path)).verify_checksums(world.rank, world.world_size)


# ------------------------------------------------------------------------------------------------------------- engine


@dataclass
class Built:
    """The engine, and the frozen tower where it lives outside (`zero.tower: replicated`), with its cache if any."""

    engine: zero.Engine
    tower: InternVit | None
    dtype: torch.dtype
    groups: list[dict[str, Any]]
    cache: FeatureCache | None = None
    draws: Draws | None = None  # what dropout is told at each step; None where there is none


def build(recipe: Recipe, resolved: Resolved, world: dist.World, weights: Weights, *, skip_trained: bool) -> Built:
    """Makes model, optimizer and engine and fills in the weights; each rank reads only what it keeps.

    skip_trained: a checkpoint follows that brings all trained weights.
    """
    dtype = DTYPES[recipe.precision]
    four_bits = recipe.train.quantize == "nf4"
    select(recipe.kernels, world.device.type)  # a choice that cannot run here is refused before anything is loaded
    began = time.monotonic()
    with ReadOncePerNode(weights, world, recipe.distributed.timeout_s) as shared:
        tower = None
        if recipe.tower_is_replicated:
            with dist.agreed(world, "loading the vision tower"):
                tower = _frozen_tower(recipe, shared, dtype, world.device)
        made = zero.partitioned_at_birth(resolved.deepspeed, world.device, dtype)
        with torch.device("meta") if four_bits else made:
            model = class_of(recipe.model)(
                recipe.model,
                with_vision=tower is None,
                activation_checkpointing=recipe.activation_checkpointing,
                tiles_per_chunk=recipe.vision_tiles_per_chunk,
                kernels=recipe.kernels,
            )
            draws = lora.add_adapters(model, recipe.model, recipe.train)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(lora.is_trained(name, recipe.train.modes[module_of(name)]))
        slice_of, write = zero.write_slice(world)
        if four_bits:
            write = _first(hold_in_nf4(model, world.device, dtype), write)
        skipped = {name for name, p in model.named_parameters() if p.requires_grad} if skip_trained else set()
        with dist.agreed(world, "loading weights"):
            fill(model, shared, recipe.model, recipe.seed, slice_of, write, skip=skipped)
        seconds = time.monotonic() - began
        log.info("weights: %.1f MB read by this rank, in place after %.1f s", shared.bytes_read / 1e6, seconds)
    groups = parameter_groups(model.named_parameters(), recipe.optimizer, resolved.module_lr)
    offloaded = recipe.zero.offload_optimizer != "none"
    optimizer = build_optimizer(groups, recipe.optimizer, world.device.type, offloaded)
    cache = open_cache(recipe, tower, dtype)
    compare_calls_s = recipe.debug.collectives_timeout_s if recipe.debug.collectives else None
    engine = zero.build(model, optimizer, resolved.deepspeed, world, compare_calls_s)
    return Built(engine, tower, dtype, groups, cache, draws)


def _first(
    quantize: Callable[[torch.nn.Parameter, Tensor], bool], write: Callable[[torch.nn.Parameter, Tensor], None]
) -> Callable[[torch.nn.Parameter, Tensor], None]:
    """Writes through `quantize` what it takes, all else through `write`."""

    def both(parameter: torch.nn.Parameter, value: Tensor) -> None:
        if not quantize(parameter, value):
            write(parameter, value)

    return both


def _frozen_tower(recipe: Recipe, weights: Weights, dtype: torch.dtype, device: torch.device) -> InternVit:
    with torch.device("meta"):
        tower = InternVit(recipe.model.vision, kernels=recipe.kernels)
    tower.to(dtype)  # still on meta: in memory only once, in its own type
    tower.to_empty(device=device)
    slice_of, write = lambda parameter: None, lambda parameter, value: parameter.data.copy_(value)
    fill(_Prefixed(tower), weights, recipe.model, recipe.seed, slice_of, write)
    return tower.requires_grad_(False).eval()


class _Prefixed(torch.nn.Module):
    """The tower under the name that it has in the whole model."""

    def __init__(self, tower: InternVit) -> None:
        super().__init__()
        self.vision_model = tower


# ------------------------------------------------------------------------------------------------------ save, restore


def describe(built: Built, resolved: Resolved, progress: Progress, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's state.json says of the state after `progress.step`, beside shapes and files.

    data: where the data stands (`DataPlan.state`). prune: whether older ones beyond checkpoint.keep_last go.
    """
    return {
        "recipe_hash": resolved.recipe_hash,
        "data_fingerprint": data["fingerprint"],
        "data": data,
        "adam_step": progress.adam_step,
        "zero_stage": built.engine.stage,
        "lora": lora.scales(resolved.recipe.train),
        "groups": [
            {"name": g["name"], "peak_lr": g["peak_lr"], "weight_decay": g["weight_decay"], "names": g["names"]}
            for g in built.groups
        ],
        "progress": vars(progress),
    }


@contextmanager
def with_a_way_on(start: Start) -> Iterator[None]:
    """Adds to the error of a damaged checkpoint which earlier one the run can go back to."""
    try:
        yield
    except CheckpointError as error:
        earlier = [step for step in checkpoint.committed_steps(start.run) if step < start.step]
        if start.leaves or not earlier:
            raise
        raise CheckpointError(f"{error}; to go back to the checkpoint before it: --resume step_{earlier[-1]}") from None


def restore(built: Built, path: Path) -> Progress:
    """Puts a checkpoint into a freshly built engine; each rank reads only its own slices, whatever saved them."""
    world = built.engine.world
    with dist.agreed(world, f"reading {path}"):
        opened = checkpoint.Checkpoint(path)
        opened.verify_checksums(world.rank, world.world_size)
        if opened.kind != "step":
            raise CheckpointError(f"{path} holds bf16 weights alone and cannot be resumed; name it in init_from.run")
    names = {name: full_shape(parameter) for name, parameter in built.engine.trainable()}
    problems = [f"{name}: not in the checkpoint" for name in sorted(set(names) - set(opened.shapes))]
    problems += [f"{name}: not trained by this recipe" for name in sorted(set(opened.shapes) - set(names))]
    problems += [
        f"{name}: {list(opened.shapes[name])} in the checkpoint, {list(shape)} in the model"
        for name, shape in names.items()
        if name in opened.shapes and opened.shapes[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit this recipe:\n  " + "\n  ".join(problems))

    def read(name: str, key: str, begin: int, end: int) -> Tensor:
        return opened.read_many({(name, key): (begin, end)})[name, key]

    zero.write_slices(built.engine, read, opened.state["adam_step"])
    return Progress.read(opened.state["progress"])
