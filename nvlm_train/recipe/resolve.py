"""What a recipe means on a number of ranks, and what a later start of the same run may change."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nvlm_train.engine.deepspeed_config import deepspeed_config, installed_deepspeed, unsupported
from nvlm_train.engine.memory import predict_memory
from nvlm_train.errors import RecipeError
from nvlm_train.model.flops import Flops, count_flops, count_parameters, trainable_parameters
from nvlm_train.recipe.licences import canonical
from nvlm_train.recipe.load import LoadedRecipe, find_key, flatten
from nvlm_train.recipe.schema import HUB_PREFIX, REQUIRED, RUN_LENGTHS, Recipe, Section, all_keys
from nvlm_train.recipe.yaml import describe

COMMIT = re.compile(r"[0-9a-f]{40}")
NULL_SHARE_WARNING = 0.05  # of the slots of a step that may hold null packs without a warning


@dataclass(frozen=True)
class BatchArithmetic:
    """How the samples of a step, or its packs, fill the ranks; the other one of the two is None.

    Lengths are in the data, so the packs of a number of samples are bounded here and known exactly only from the length
    index: `max_packs` is reached when every sample has max_tokens_per_sample, and one image of the most tiles.

    slots_per_micro_step: ranks x micro_batch_size, the packs that one micro-step can hold.
    max_micro_steps: ceil(max_packs / slots_per_micro_step); a step never has more (accumulation, in other tools).
    max_null_share: share of null packs among the slots of such a step.
    """

    samples: int | None
    packs: int | None
    world_size: int
    micro_batch_size: int
    pack_tokens: int
    slots_per_micro_step: int
    max_packs: int
    max_micro_steps: int
    max_null_share: float
    max_tokens: int


@dataclass(frozen=True)
class Resolved:
    """A recipe on a number of ranks; every figure that follows from the two alone.

    recipe_hash: the same for two recipes that differ in `free` keys only.
    num_steps: optimizer steps of the run; None where they are known after indexing only.
    warmup_steps, decay_steps: of the schedule; None where they depend on num_steps and that is not known.
    module_lr: peak learning rate of each trained module.
    parameters: {"total" | "trainable": {module: count}}; adapters of LoRA are in trainable alone.
    memory: predicted bytes per rank by kind (`engine.memory.KINDS`), `total` and `host`.
    warnings: what is legal but probably not meant.
    """

    recipe: Recipe
    world_size: int
    recipe_hash: str
    num_steps: int | None
    warmup_steps: int | None
    decay_steps: int | None
    module_lr: dict[str, float]
    batch: BatchArithmetic
    parameters: dict[str, dict[str, int]]
    flops: Flops
    deepspeed: dict[str, Any]
    memory: dict[str, int]
    warnings: tuple[str, ...]


def resolve(recipe: Recipe, world_size: int, num_steps: int | None = None) -> Resolved:
    """The recipe on `world_size` ranks, `num_steps` of the run being known from its data or from `known_steps`.

    Raises RecipeError where the ranks cannot be filled.
    """
    if recipe.validation is not None and not recipe.validation.sources and not recipe.validation.held_out_share:
        raise RecipeError(
            "validation: names nothing to validate on; give validation.sources, or validation.held_out_share above 0"
        )
    batch = batch_arithmetic(recipe, world_size)
    hpz = recipe.zero.experimental.hpz_partition_size
    if world_size > hpz and world_size % hpz:
        raise RecipeError(
            f"zero.experimental.hpz_partition_size: {hpz} does not divide {world_size} ranks; use a number that does, "
            "best the ranks of one node, or 1"
        )
    num_steps = num_steps if num_steps is not None else known_steps(recipe)
    counts = count_parameters(recipe.model)
    trainable = trainable_parameters(recipe.model, recipe.train)
    trained = [module for module in counts if recipe.train.modes[module] != "frozen"]
    return Resolved(
        recipe=recipe,
        world_size=world_size,
        recipe_hash=recipe_hash(recipe),
        num_steps=num_steps,
        warmup_steps=warmup_steps(recipe, num_steps),
        decay_steps=recipe.schedule.decay_steps or num_steps,
        module_lr={module: getattr(recipe.optimizer.module_lr, module) or recipe.optimizer.lr for module in trained},
        batch=batch,
        parameters={
            "total": counts,
            "trainable": trainable,
        },
        flops=count_flops(
            recipe.model, recipe.train, recipe.data.max_tokens_per_sample, recipe.activation_checkpointing
        ),
        deepspeed=deepspeed_config(recipe),
        memory=predict_memory(recipe, world_size, counts, trainable),
        warnings=_warnings(recipe, batch, num_steps),
    )


def refuse_unsupported(loaded: LoadedRecipe, deepspeed: str | None = None) -> None:
    """Raises RecipeError naming every option in use that DeepSpeed (default: as installed) is not known to do."""
    problems = []
    for name, message in unsupported(loaded.recipe, deepspeed or installed_deepspeed()):
        origin = loaded.origins.get(name)
        problems.append(f"{origin.place} {name}: {message}" if origin and origin.place else f"{name}: {message}")
    if problems:
        raise RecipeError("\n".join(problems))


def batch_arithmetic(recipe: Recipe, world_size: int) -> BatchArithmetic:
    """How a step fills the ranks. Raises RecipeError where a step has fewer samples, or packs, than there are ranks."""
    samples, packs, micro = recipe.global_batch.samples, recipe.global_batch.packs, recipe.micro_batch_size
    if world_size < 1:
        raise RecipeError(f"world size: {world_size} is not a number of ranks; use 1 or more")
    if packs is not None and packs < world_size:
        raise RecipeError(
            f"global_batch.packs: {packs} cannot fill {world_size} ranks: a rank needs a pack in each step, and "
            f"{world_size - packs} would never have one; use global_batch.packs={world_size} or more, or start on "
            f"{packs} rank{'s' if packs > 1 else ''} or fewer"
        )
    if samples is not None and samples < world_size:
        raise RecipeError(
            f"global_batch.samples: {samples} cannot fill {world_size} ranks: a rank needs a sample in each step, and "
            f"{world_size - samples} would never have one; use global_batch.samples={world_size} or more, or start on "
            f"{samples} rank{'s' if samples > 1 else ''} or fewer"
        )
    slots = world_size * micro
    max_packs = packs if samples is None else math.ceil(samples / _samples_per_pack(recipe))
    assert max_packs is not None  # the schema: one of the two is given
    micro_steps = math.ceil(max_packs / slots)
    return BatchArithmetic(
        samples=samples,
        packs=packs,
        world_size=world_size,
        micro_batch_size=micro,
        pack_tokens=recipe.data.pack_tokens,
        slots_per_micro_step=slots,
        max_packs=max_packs,
        max_micro_steps=micro_steps,
        max_null_share=1 - max_packs / (micro_steps * slots),
        max_tokens=max_packs * recipe.data.pack_tokens
        if samples is None
        else samples * recipe.data.max_tokens_per_sample,
    )


def most_tiles(recipe: Recipe, batch: BatchArithmetic) -> int:
    """Tiles of a step in which every sample has one image of the largest grid, as far as its tokens allow."""
    tiling, vision = recipe.data.tiling, recipe.model.vision
    per_tile = (vision.image_size // vision.patch_size) ** 2 // 4
    tiles = tiling.tiles_of_image
    if recipe.model.architecture != "nvlm_d":  # tiles are not among the tokens
        most = batch.max_packs * (recipe.data.pack_tiles or 0)
        return most if batch.samples is None else min(batch.samples * tiles, most)
    if batch.samples is None:
        packs = batch.max_packs
        return packs * min(recipe.data.pack_tiles or recipe.data.pack_tokens, recipe.data.pack_tokens // per_tile)
    return batch.samples * min(tiles, recipe.data.max_tokens_per_sample // per_tile)


def _samples_per_pack(recipe: Recipe) -> int:
    """How many of the largest samples fit into a pack, each with one image of the most tiles."""
    data = recipe.data
    by_tokens = data.pack_tokens // data.max_tokens_per_sample
    return by_tokens if data.pack_tiles is None else min(by_tokens, data.pack_tiles // data.tiling.tiles_of_image)


def _licences(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, licence) wherever a recipe states one."""
    found = {"license": recipe.license}
    for name in ("model", "vision", "language_model", "run"):
        given = getattr(recipe.init_from, name)
        found[f"init_from.{name}.license"] = given.license if given is not None else None
    found |= {f"data.mixture.{name}.license": source.license for name, source in recipe.data.mixture.items()}
    yield from ((key, stated) for key, stated in found.items() if stated is not None)


def _warnings(recipe: Recipe, batch: BatchArithmetic, num_steps: int | None) -> tuple[str, ...]:
    warnings = []
    if batch.max_null_share > NULL_SHARE_WARNING and batch.packs is not None:
        below = batch.packs // batch.slots_per_micro_step * batch.slots_per_micro_step
        legal = [str(packs) for packs in (below, below + batch.slots_per_micro_step) if packs]
        warnings.append(
            f"global_batch.packs {batch.packs}: {batch.max_null_share:.0%} of the slots of a step hold null packs "
            f"({batch.max_micro_steps} micro-steps of {batch.slots_per_micro_step}); {' or '.join(legal)} packs would "
            "fill them"
        )
    elif batch.max_null_share > NULL_SHARE_WARNING:
        below = batch.max_packs // batch.slots_per_micro_step * batch.slots_per_micro_step
        above = below + batch.slots_per_micro_step
        per_pack = _samples_per_pack(recipe)
        legal = [str(packs * per_pack) for packs in (below, above) if packs]
        warnings.append(
            f"global_batch.samples {batch.samples}: {batch.max_null_share:.0%} of the slots of a step hold null packs "
            f"when all samples are of full length ({batch.max_packs} packs in {batch.max_micro_steps} micro-steps of "
            f"{batch.slots_per_micro_step}); {' or '.join(legal)} samples would fill them"
        )
    for name, path in hub_paths(recipe).items():
        revision = path.partition("@")[2]
        if not COMMIT.fullmatch(revision):
            warnings.append(
                f"{name}: {path} names no commit; `nvlm-train fetch` finds the commit of {revision!r}, and the run's "
                "hash has that one in place of this name"
            )
    hpz = recipe.zero.experimental.hpz_partition_size
    if hpz > 1:
        warnings.append(
            f"zero.experimental.hpz_partition_size {hpz}: hpZ has run on a CPU only; the first steps' losses are "
            "compared with hpZ off"
        )
    warmup = warmup_steps(recipe, num_steps)
    if num_steps is not None and warmup is not None and warmup > num_steps:
        warnings.append(f"schedule.warmup_steps {warmup}: the run ends in the warm-up, at step {num_steps}")
    for key, stated in _licences(recipe):
        if canonical(stated) is None:
            warnings.append(
                f"{key} {stated!r} is neither an SPDX identifier nor a licence known by name, so an export will refuse "
                "it; `unknown` says that nobody knows it"
            )
    return tuple(warnings)


# ------------------------------------------------------------------------------------------------------------- schedule


def known_steps(recipe: Recipe) -> int | None:
    """Steps of the run as far as the recipe alone tells; None: known after indexing (`data.windows.run_steps`)."""
    if recipe.max_samples is not None and recipe.global_batch.samples is not None:
        return -(-recipe.max_samples // recipe.global_batch.samples)
    return recipe.max_steps


def run_length(recipe: Recipe) -> str:
    """The length of the run as the recipe gives it: `num_epochs 3.0`."""
    return next(f"{name} {getattr(recipe, name)}" for name in RUN_LENGTHS if getattr(recipe, name) is not None)


def warmup_steps(recipe: Recipe, num_steps: int | None) -> int | None:
    """Steps of warm-up: as given, or the given share of the run's steps, rounded; None where these are not known."""
    steps = recipe.schedule.warmup_steps
    if isinstance(steps, int):
        return steps
    return None if num_steps is None else round(steps * num_steps)


def lr_factor(step: int, warmup_steps: int, decay_steps: int, name: str, min_ratio: float) -> float:
    """The share of its peak learning rate that every group has in a step.

    step counts from 0, and its update is number n = step + 1: n / warmup_steps while n <= warmup_steps, so that the
    first update already moves and update `warmup_steps` is the first at the peak. Then `constant` stays at 1, and
    `cosine` falls to min_ratio, which update `decay_steps` (the last one, unless the recipe says otherwise) and all
    later ones have:  min + (1 - min) (1 + cos(pi (n - warmup) / (decay - warmup))) / 2.

    Example, cosine with 2 steps of warm-up, 6 of decay, min 0.1: 0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1, ...
    """
    n = step + 1
    if n <= warmup_steps:
        return n / warmup_steps
    if name == "constant":
        return 1.0
    if n >= decay_steps:
        return min_ratio
    progress = (n - warmup_steps) / (decay_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------- identity of a run, resume


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Everything a recipe says, as plain values; `Recipe.model_validate` makes the same recipe of it."""
    return recipe.model_dump(mode="python")


def hub_paths(recipe: Recipe) -> dict[str, str]:
    """The keys that name a folder of the Hub: {"init_from.vision.path": "hf://organisation/name@revision"}."""
    values = flatten({"init_from": recipe.init_from.model_dump(), "tokenizer": recipe.tokenizer.model_dump()})
    return {
        name: value for name, value in values.items() if name.endswith(".path") and str(value).startswith(HUB_PREFIX)
    }


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits over every key that is not `free`, and every revision of the Hub; sections left out count as their
    defaults."""
    kept = {name: value for name, value in _effective(recipe_to_dict(recipe)).items() if resume_of(name) != "free"}
    kept |= hub_paths(recipe)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Difference(NamedTuple):
    """A key in which two recipes differ. A value that is absent is None."""

    key: str
    old: Any
    new: Any
    resume: str

    def __str__(self) -> str:
        return f"{self.key}: {describe(self.old)} -> {describe(self.new)} ({self.resume})"


def compare(old: dict[str, Any], new: Recipe) -> list[Difference]:
    """Every key in which a saved recipe (as `recipe_to_dict` wrote it) and `new` differ, in the order of the schema.

    A key the saved recipe does not know yet counts as its default; a source that only one of them has differs in its
    name, with the mark of the mapping it stands in.
    """
    before, after = _effective(old), _effective(recipe_to_dict(new))
    differences: dict[str, Difference] = {}
    for name in dict.fromkeys((*after, *before)):
        if before.get(name) == after.get(name) and (name in before) == (name in after):
            continue
        container = _container_of_one_side(name, before, after)
        if container is not None:
            # one line for the whole source, with the mark of the mapping it stands in
            key, resume = container
            differences.setdefault(
                key,
                Difference(
                    key,
                    "present" if _has_below(before, key) else None,
                    "present" if _has_below(after, key) else None,
                    resume,
                ),
            )
        elif name in before and name in after:
            differences[name] = Difference(name, before[name], after[name], resume_of(name))
        else:
            key_info = find_key(tuple(name.split(".")))
            default = None if key_info is None or key_info.default == REQUIRED else key_info.default
            if isinstance(default, Section):
                default = None
            difference = Difference(name, before.get(name, default), after.get(name, default), resume_of(name))
            if difference.old != difference.new:
                differences[name] = difference
    return list(differences.values())


def check_resume(saved: dict[str, Any], recipe: Recipe, accept: Sequence[str] = ()) -> list[Difference]:
    """The differences a later start makes, when all of them are allowed.

    `accept` names keys marked `ask`, or sections of them. Raises RecipeError with the whole diff where a `fixed` key
    differs, an `ask` key differs that is not accepted, or `accept` names what cannot be accepted.
    """
    _check_accept(accept, recipe)
    differences = compare(saved, recipe)
    fixed = [item for item in differences if item.resume == "fixed"]
    asked = [item for item in differences if item.resume == "ask" and not _accepted(item.key, accept)]
    if not fixed and not asked:
        return differences
    lines = [f"{recipe.output_dir}: holds a run of another recipe"]
    lines += [f"  {item}" for item in (*fixed, *asked)]
    if fixed:
        lines.append("fixed keys decide what is learned: set them back, or give this recipe an output_dir of its own")
    if asked:
        flags = " ".join(f"--accept {item.key}" for item in asked)
        lines.append(f"ask keys may change when you mean it: {flags}")
    raise RecipeError("\n".join(lines))


def _check_accept(accept: Sequence[str], recipe: Recipe) -> None:
    keys = all_keys()
    problems = []
    for name in accept:
        key = find_key(tuple(name.split(".")))
        if key is None:
            near = difflib.get_close_matches(name, [path for path, k in keys.items() if k.resume == "ask"], n=1)
            problems.append(
                f"--accept {name}: is not a key of a recipe"
                + (f"; did you mean {near[0]}?" if near else "; `nvlm-train recipe keys` lists them")
            )
        elif key.resume == "fixed" and not any(
            k.resume == "ask" for p, k in keys.items() if p.startswith(key.path + ".")
        ):
            problems.append(f"--accept {name}: this key is fixed for the life of a run; use an output_dir of its own")
    if problems:
        raise RecipeError("\n".join(problems))


def _accepted(key: str, accept: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in accept)


def resume_of(name: str) -> str:
    """free, ask or fixed, of a dotted key; a key this version does not know is fixed."""
    parts = tuple(name.split("."))
    key = find_key(parts)
    return key.resume if key is not None else "fixed"


def _effective(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys, with an absent section written out as its defaults where all of its keys have one."""
    full = dict(values)
    for name, key in all_keys(Recipe).items():
        if "." not in name and full.get(name, None) is None and key.section is not None and not key.named:
            try:
                full[name] = key.section().model_dump(mode="python")
            except ValueError:  # a section with required keys stays absent
                continue
    return {name: value for name, value in flatten(full).items() if value != {}}


def _container_of_one_side(name: str, before: dict[str, Any], after: dict[str, Any]) -> tuple[str, str] | None:
    """(data.mixture.coco, ask) for a key of a source that only one of the two recipes has."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        key = find_key(tuple(parts[:depth]))
        if key is not None and key.named:
            source = ".".join(parts[: depth + 1])
            if _has_below(before, source) != _has_below(after, source):
                return source, key.resume
            return None
    return None


def _has_below(flat: dict[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix + ".") for name in flat)
